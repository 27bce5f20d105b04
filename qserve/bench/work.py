"""What is asked of every target: the same prompts, and as many tokens.

Prompts are token ids drawn at random, so that their number is exact and no cache knows them, all with one beginning if
a shared prefix is asked for; or the rows of a jsonl file. Other prompts come for each repeat, the same for each target.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from qserve.config import option
from qserve.errors import UsageError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_FIRST_ID = 100  # below stand special tokens, in most vocabularies
_PREFIX_STREAM = 1  # of random numbers; the prefix is the same in every repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkConfig:
    """The work."""

    num_prompts: int = option(0, "requests of one run; 0 takes 4 for each client, and 16 at least")
    input_len: int = option(128, "tokens of a prompt")
    output_len: int = option(64, "tokens asked for")
    prefix_len: int = option(0, "tokens at the beginning that all prompts share, out of --input-len")
    dataset: str = option("", "a jsonl file instead, each row with a prompt or messages, and max_tokens if it likes")
    vocab_size: int = option(0, "ids of prompts are below it; 0 asks the server, or takes 8192")
    temperature: float = option(0.0, "0 is greedy")
    ignore_eos: bool = option(False, "send ignore_eos, which is not OpenAI's: every answer is then of full length")
    extra_body: str = option("", "a JSON object whose fields are added to every request")
    seed: int = option(0, "of the prompts and of the times of arrival")


@dataclass(frozen=True, slots=True)
class Job:
    """One request, less the model's name."""

    path: str
    body: Mapping[str, Any]

    def encode(self, model: str, extra: Mapping[str, Any] | None = None) -> bytes:
        return json.dumps({"model": model, **self.body, **(extra or {})}).encode()


class Work:
    """Makes the jobs of every run."""

    def __init__(self, config: WorkConfig, *, vocab_size: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._rows = _read_rows(Path(config.dataset)) if config.dataset else []
        self._extra = _parse_extra(config)
        if not 0 <= config.prefix_len < config.input_len:
            raise UsageError(
                f"--prefix-len is {config.prefix_len} and --input-len {config.input_len}: the prefix is a part of it, "
                "and at least one token must come after."
            )
        if vocab_size <= _FIRST_ID:
            raise UsageError(f"the vocabulary size is {vocab_size}: expected more than {_FIRST_ID}. See --vocab-size.")

    def count(self, *, concurrency: int | None) -> int:
        """The requests of one run."""
        return self._config.num_prompts or max(16, 4 * (concurrency or 16))

    def make_jobs(self, number: int, *, run: int) -> list[Job]:
        """Other jobs for every `run`; those of a file are the same again, and a server may remember them."""
        if self._rows:
            return [self._job_of(row) for row in islice(cycle(self._rows), number)]
        return [self._completion(prompt) for prompt in self.make_prompts(number, run=run)]

    def make_prompts(self, number: int, *, run: int) -> list[list[int]]:
        """Token ids, as many in each as asked for."""
        config = self._config
        prefix = self._draw([config.seed, 0, _PREFIX_STREAM], (config.prefix_len,))
        tails = self._draw([config.seed, run + 1], (number, config.input_len - config.prefix_len))
        return [prefix.tolist() + tail.tolist() for tail in tails]

    def _draw(self, seed: Sequence[int], shape: tuple[int, ...]) -> Any:
        return np.random.default_rng(seed).integers(_FIRST_ID, self._vocab_size, size=shape)

    def _job_of(self, row: Mapping[str, Any]) -> Job:
        asked = row.get("max_tokens")
        if "messages" in row:
            return Job(CHAT, {"messages": row["messages"], **self._common(asked)})
        return self._completion(row["prompt"], asked)

    def _completion(self, prompt: str | list[int], max_tokens: int | None = None) -> Job:
        return Job(COMPLETIONS, {"prompt": prompt, **self._common(max_tokens)})

    def _common(self, max_tokens: int | None) -> dict[str, Any]:
        return {
            "max_tokens": max_tokens or self._config.output_len,
            "temperature": self._config.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }


def _parse_extra(config: WorkConfig) -> dict[str, Any]:
    try:
        extra = json.loads(config.extra_body or "{}")
    except ValueError as error:
        raise UsageError(f"--extra-body is {config.extra_body!r}, which is not JSON: {error}.") from error
    if not isinstance(extra, dict):
        raise UsageError(f"--extra-body is {config.extra_body!r}: expected a JSON object.")
    return {**({"ignore_eos": True} if config.ignore_eos else {}), **extra}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UsageError(f"--dataset {path} cannot be read: {error.strerror}.") from error
    rows = [_read_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f"--dataset {path} has no rows: expected one JSON object a line.")
    return rows


def _read_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict) or not ("prompt" in row or "messages" in row):
        raise UsageError(f'{where}: expected an object with "prompt" or "messages".')
    return row
