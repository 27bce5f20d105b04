"""Requests made by schemathesis from OpenAPI documents, valid and broken ones alike: none may end in a 5xx or hang.

    python -m bench.fuzz MODEL --requests 5000
    python -m bench.fuzz --url URL --document openai.yaml      with OpenAI's own document too, where it is at hand

Needs schemathesis (`pip install qserve[fuzz]`, or an environment of its own with schemathesis and httpx, for a
server that runs already). The own document is /openapi.json; of OpenAI's only the paths served here are kept.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from bench.server import serving
from bench.watch import read, wait_until_idle

_SERVED = ("/completions", "/chat/completions", "/models", "/models/{model}", "/embeddings", "/responses")
_TIMEOUT = 120  # longer than any answer takes with so small a context: what takes longer hangs
_MOST = {"n": 4, "best_of": 4, "max_tokens": 16, "max_completion_tokens": 16, "max_output_tokens": 16}
# What says how long an answer may be, where it may be as long as the context by default.
_LENGTHS = {"/v1/chat/completions": "max_completion_tokens", "/v1/responses": "max_output_tokens"}
_SMALL = ("--max-model-len", "256")
_GET_SHARE = 0.02  # of the requests of a document: there is little to vary

Json = dict[str, Any]


def own_document(url: str) -> Json | None:
    response = httpx.get(f"{url}/openapi.json")
    return response.json() if response.status_code == 200 else None


def openai_document(path: Path) -> Json:
    """OpenAI's document, which has no /v1 in its paths, cut down to what is served here."""
    document: Json = yaml.safe_load(path.read_text())
    paths = {f"/v1{name}": item for name, item in document["paths"].items() if name in _SERVED}
    return {**document, "paths": {name: _without_delete(item) for name, item in paths.items()}}


def _without_delete(item: Json) -> Json:
    return {name: value for name, value in item.items() if name != "delete"}


class Fuzzer:
    """Sends what schemathesis makes, and keeps what went wrong."""

    def __init__(self, url: str, *, model: str) -> None:
        self._url = url
        self._model = model
        self._session = requests.Session()
        self.statuses: Counter[str] = Counter()
        self.failures: list[str] = []
        self.num_sent = 0
        self.slowest = ("", 0.0)

    def send(self, case: Any, *, is_tame: bool) -> None:
        if is_tame:
            case.body = _tame(case.body, self._model, path=case.operation.path)
        start = time.perf_counter()
        label = f"{case.method.upper()} {case.operation.path}"
        self.num_sent += 1
        try:
            response = case.call(base_url=self._url, session=self._session, timeout=_TIMEOUT)
        except requests.exceptions.InvalidHeader:
            return  # cannot be sent by this client
        except requests.RequestException as error:
            self.failures.append(f"{label}: {type(error).__name__}: {_show(case.body)}")
            return
        self.slowest = max(self.slowest, (label, time.perf_counter() - start), key=lambda pair: pair[1])
        self.statuses[f"{label} {response.status_code}"] += 1
        if response.status_code >= 500:
            self.failures.append(f"{label}: {response.status_code} {response.text[:200]}: {_show(case.body)}")


def _tame(body: Any, model: str, *, path: str) -> Any:
    """The same body, for the model that is served and cheap to answer, so that what is behind the checks is reached."""
    if not isinstance(body, dict):
        return body
    bounded = {
        name: min(value, _MOST[name]) if name in _MOST and type(value) is int else value for name, value in body.items()
    }
    if path in _LENGTHS:
        bounded.setdefault(_LENGTHS[path], 16)
    return {**bounded, "model": model}


def _show(body: Any) -> str:
    text = repr(body)
    return text if len(text) < 2000 else text[:2000] + "..."


def fuzz(fuzzer: Fuzzer, document: Json, *, num_requests: int, start: int) -> None:
    """`num_requests` over all operations of a document, half of them valid and half broken."""
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    num_posts = sum(operation.method.lower() == "post" for operation in operations)
    num_gets = int(num_requests * _GET_SHARE / max(len(operations) - num_posts, 1))
    left = num_requests - num_gets * (len(operations) - num_posts)
    for number, operation in enumerate(operations):
        is_post = operation.method.lower() == "post"
        amount = left // num_posts if is_post else num_gets
        before = fuzzer.num_sent
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if not is_post and mode is GenerationMode.NEGATIVE:
                continue
            share = -(-amount // 2) if is_post else amount
            _run(operation.as_strategy(generation_mode=mode), fuzzer, amount=share, start=start + number)
        label = f"{operation.method.upper()} {operation.path}"
        print(f"{label:<32} {fuzzer.num_sent - before} sent, {len(fuzzer.failures)} failures so far", flush=True)


def _run(strategy: Any, fuzzer: Fuzzer, *, amount: int, start: int) -> None:
    @seed(start)
    @settings(
        max_examples=max(amount, 1),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def send_one(case: Any) -> None:
        fuzzer.send(case, is_tame=fuzzer.num_sent % 10 != 0)

    send_it: Callable[[], None] = send_one
    send_it()


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
        return
    with serving(*([arguments.model] if arguments.model else []), *_SMALL) as url:
        yield url


def _documents(arguments: argparse.Namespace, url: str) -> Mapping[str, Json]:
    found: dict[str, Json] = {}
    own = own_document(url)
    if own is None:
        print("the server has no /openapi.json")
    else:
        found["own"] = own
    if arguments.document and Path(arguments.document).is_file():
        found["openai"] = openai_document(Path(arguments.document))
    else:
        print("OpenAI's document is not at hand (--document FILE): only the server's own is used")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Send requests made from OpenAPI documents.")
    parser.add_argument("model", nargs="?", help="what to serve; by default the demo model")
    parser.add_argument("--url", help="a server that runs already; start it with a small --max-model-len")
    parser.add_argument("--document", help="OpenAI's OpenAPI document")
    parser.add_argument("--requests", type=int, default=5000, help="over all documents (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with _server(arguments) as url:
        documents = _documents(arguments, url)
        before = read(url)
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        fuzzer = Fuzzer(url, model=model)
        start = time.monotonic()
        for name, document in documents.items():
            print(f"--- {name}")
            fuzz(fuzzer, document, num_requests=arguments.requests // len(documents), start=arguments.seed)
        after = wait_until_idle(url, seconds=60)
    for failure in fuzzer.failures[:20]:
        print("FAILED", failure)
    for label, number in sorted(fuzzer.statuses.items()):
        print(f"{number:>7} {label}")
    print(f"slowest: {fuzzer.slowest[1]:.2f} s, {fuzzer.slowest[0]}\nbefore: {before.shown}\nafter:  {after.shown}")
    result = {
        "sent": fuzzer.num_sent,
        "failures": len(fuzzer.failures),
        "seconds": round(time.monotonic() - start, 1),
        "is_idle": after.is_idle,
        "memory_mib": [before.memory_mib, after.memory_mib],
        "files": [before.num_files, after.num_files],
    }
    print(json.dumps(result))
    return 0 if after.is_idle and fuzzer.num_sent and not fuzzer.failures else 1


if __name__ == "__main__":
    sys.exit(main())
