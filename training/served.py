"""A model as a running server tells it: log-probabilities of given tokens over HTTP, from an echoed prompt.

Speaks OpenAI's completions and nothing else; of the server it knows the command that starts it.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.errors import UsageError
from training.scores import Progress, Scores

_PATIENCE = 600  # seconds: for one answer, and for a server to load its model
_TOKEN = "token_id:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a server says of one token: how likely it was, and which would have been likeliest."""

    logprob: float
    likeliest: int


class Server:
    """A server at `url`, such as http://127.0.0.1:8000."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def tell(self, ids: Sequence[int]) -> list[Told]:
        """Of every token but the first."""
        body = {"prompt": list(ids), "max_tokens": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        told = self.complete(body)["choices"][0]["logprobs"]
        pairs = zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)
        return [Told(logprob=logprob, likeliest=_likeliest(top)) for logprob, top in pairs]

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a completion; raises UsageError with the server's own message."""
        request = urllib.request.Request(
            f"{self.url}/v1/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                return json.load(answer)  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            raise UsageError(f"{self.url} refused: {error.read().decode(errors='replace')}") from error
        except urllib.error.URLError as error:
            raise UsageError(f"{self.url} does not answer ({error.reason}); is a server running there?") from error

    @property
    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    """A server of our own for `model`, as long as the block lasts."""
    port = _free_port()
    command = [sys.executable, "-m", "qserve.cli", "serve", str(model), "--port", str(port), *options]
    server = Server(f"http://127.0.0.1:{port}")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            deadline = time.monotonic() + _PATIENCE
            while not server.is_ready:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise UsageError(f"qserve serve {model} did not start: {log.read()[-2000:]}")
                time.sleep(0.1)
            yield server
        finally:
            process.terminate()
            process.wait()


def score_served(
    server: Server, windows: Tensor, *, likeliest: Tensor | None = None, progress: Progress | None = None
) -> Scores:
    """As `training.scores.score`, but for the divergence, which takes more than a server tells.

    `likeliest` (windows, length) is what a reference finds likeliest.
    """
    loss, agreeing = 0.0, 0
    for done, window in enumerate(windows, start=1):
        told = server.tell(window.tolist())
        loss -= sum(token.logprob for token in told)
        if likeliest is not None:
            agreeing += int((torch.tensor([token.likeliest for token in told]) == likeliest[done - 1]).sum())
        if progress is not None:
            progress(done, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Scores(tokens=tokens, loss=loss / tokens, agreement=None if likeliest is None else agreeing / tokens)


def _likeliest(top: dict[str, float]) -> int:
    return int(max(top, key=lambda name: top[name]).removeprefix(_TOKEN))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
