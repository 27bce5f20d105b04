"""Minutes of mixed load: streams, whole answers, disconnects, bad requests, long prompts, constrained answers.

    python -m bench.soak MODEL --minutes 10
    python -m bench.soak --url URL --warm-up 0 --minutes 1

At the end nothing may be held, no answer may have been a 5xx or none at all, and memory must have stayed flat: the
slope of what is resident is printed, over the minutes and over their second half, and fails above --most-growth MiB a
minute over all of them. Before them the same load runs for --warm-up minutes, for some memory is taken up to a limit:
the blocks of the cache as each is first written, the 64 grammars that are kept compiled (the clients begin with more of
them), buffers for the largest step, pages of libraries as their code is first run, and malloc's own reserves.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import httpx

from bench.server import serving
from bench.watch import Reading, read, slope_per_minute, wait_until_idle

_COMPLETIONS, _CHAT, _RESPONSES, _MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
_WORDS = (
    *("the", "river", "runs", "slow", "under", "a", "grey", "sky", "while"),
    *("seven", "birds", "look", "for", "bread", "near", "an", "old", "wooden", "bridge"),
)
_SAMPLE_SECONDS = 2.0
_NUM_GRAMMARS = 80  # few of them alike, so that as many are compiled as the server keeps
_TIMEOUT = 300

Json = dict[str, Any]


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, client: httpx.AsyncClient, *, seed: int) -> None:
        self._client = client
        self._random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []

    async def run(self, *, num_grammars: int, until: float) -> None:
        """One client: requests that bring so many grammars, and then one after the other, of a kind drawn by weight."""
        for _ in range(num_grammars):
            await self._try(Soak.constrained)
        kinds, weights = zip(*((kind, weight) for kind, weight in _KINDS.items()), strict=True)
        while time.monotonic() < until:
            (kind,) = self._random.choices(kinds, weights)
            await self._try(kind)

    async def _try(self, kind: "Kind") -> None:
        status: int | str
        try:
            status = await asyncio.wait_for(kind(self), _TIMEOUT)
        except (httpx.HTTPError, TimeoutError) as error:
            status = type(error).__name__
        self.seen[f"{kind.__name__} {status}"] += 1
        if not isinstance(status, int) or status >= 500:
            self.failures.append(f"{kind.__name__}: {status}")

    def text(self, num_words: int) -> str:
        return " ".join(self._random.choices(_WORDS, k=num_words))

    async def short(self) -> int:
        return await self._post(_COMPLETIONS, {"prompt": self.text(10), "max_tokens": 16})

    async def chat(self) -> int:
        messages = [{"role": "user", "content": self.text(20)}]
        return await self._post(_CHAT, {"messages": messages, "max_tokens": 24, "logprobs": True, "top_logprobs": 3})

    async def stream(self) -> int:
        return await self._read(_COMPLETIONS, {"prompt": self.text(30), "max_tokens": 48, "n": 2, "seed": 7})

    async def response(self) -> int:
        """With a call, or as it comes."""
        tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
        body = {"input": self.text(20), "max_output_tokens": 32, "tools": [tool]}
        return await self._read(_RESPONSES, {**body, "tool_choice": self._random.choice(["auto", "required"])})

    async def message(self) -> int:
        return await self._read(_MESSAGES, {"messages": [{"role": "user", "content": self.text(20)}], "max_tokens": 24})

    async def leave(self) -> int:
        """Goes away in the middle, or before the first byte."""
        body = {"prompt": self.text(200), "max_tokens": 400, "ignore_eos": True}
        if self._random.random() < 0.3:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._post(_COMPLETIONS, body), self._random.random() * 0.3)
            return 0
        num_lines = self._random.randrange(20)
        async with self._stream(_COMPLETIONS, body) as response:
            async for _ in response.aiter_lines():
                num_lines -= 1
                if num_lines < 0:
                    break
        return response.status_code

    async def long(self) -> int:
        body = {"prompt": self.text(600), "max_tokens": 4, "echo": self._random.random() < 0.3, "logprobs": 1}
        return await self._post(_COMPLETIONS, body)

    async def bad(self) -> int:
        bodies: list[Json] = [
            {},
            {"prompt": "x", "temperature": 9},
            {"prompt": "x", "model": "none"},
            {"prompt": [1, -1]},
            {"prompt": "x", "max_tokens": 10**9},
            {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "none"}}}},
        ]
        return await self._post(_COMPLETIONS, self._random.choice(bodies))

    async def constrained(self) -> int:
        """Where the server has no structured output yet, this is one more bad request."""
        names = self._random.sample(_WORDS, 3)
        schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": names}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return await self._post(_COMPLETIONS, {"prompt": self.text(10), "max_tokens": 40, "response_format": form})

    async def timed(self) -> int:
        return await self._post(_COMPLETIONS, {"prompt": self.text(10), "max_tokens": 400, "timeout": 0.2})

    async def tokens(self) -> int:
        return await self._post("/tokenize", {"prompt": self.text(300)})

    async def _post(self, path: str, body: Json) -> int:
        return (await self._client.post(path, json=body)).status_code

    async def _read(self, path: str, body: Json) -> int:
        """A stream, to its end."""
        async with self._stream(path, body) as response:
            async for _ in response.aiter_lines():
                pass
        return response.status_code

    @asynccontextmanager
    async def _stream(self, path: str, body: Json) -> AsyncIterator[httpx.Response]:
        async with self._client.stream("POST", path, json={**body, "stream": True}) as response:
            yield response


Kind = Callable[[Soak], Coroutine[Any, Any, int]]
_KINDS: dict[Kind, int] = {
    Soak.short: 4,
    Soak.chat: 3,
    Soak.stream: 4,
    Soak.response: 2,
    Soak.message: 2,
    Soak.leave: 3,
    Soak.long: 2,
    Soak.bad: 2,
    Soak.constrained: 2,
    Soak.timed: 1,
    Soak.tokens: 1,
}


async def soak(url: str, *, warm_up: float, minutes: float, num_clients: int, seed: int) -> tuple[Soak, list[Reading]]:
    """What the clients have seen, and the readings of the minutes after the warm-up."""
    limits = httpx.Limits(max_connections=None)
    readings: list[Reading] = []
    since = time.monotonic() + warm_up * 60
    until = since + minutes * 60

    async def watch() -> None:
        while time.monotonic() < until:
            reading = await asyncio.to_thread(read, url)
            readings.extend([reading] if reading.seconds >= since else [])
            await asyncio.sleep(_SAMPLE_SECONDS)

    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, limits=limits) as client:
        running = Soak(client, seed=seed)
        each = -(-_NUM_GRAMMARS // num_clients) if warm_up else 0
        await asyncio.gather(watch(), *(running.run(num_grammars=each, until=until) for _ in range(num_clients)))
    return running, readings


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.url:
        yield arguments.url
        return
    with serving(*([arguments.model] if arguments.model else []), "--max-model-len", "2048") as url:
        yield url


def main() -> int:
    parser = argparse.ArgumentParser(description="Keep a server busy in every way for some minutes.")
    parser.add_argument("model", nargs="?", help="what to serve; by default the demo model")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--warm-up", type=float, default=8, help="minutes that come before (default 8)")
    parser.add_argument("--minutes", type=float, default=10, help="that count (default 10)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--most-growth", type=float, default=1.0, help="MiB a minute (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with _server(arguments) as url:
        before = read(url)
        running, readings = asyncio.run(
            soak(
                url,
                warm_up=arguments.warm_up,
                minutes=arguments.minutes,
                num_clients=arguments.clients,
                seed=arguments.seed,
            )
        )
        after = wait_until_idle(url, seconds=60)
    growth, late_growth = slope_per_minute(readings), slope_per_minute(readings[len(readings) // 2 :])
    for label, number in sorted(running.seen.items()):
        print(f"{number:>7} {label}")
    for label, reading in {"before": before, "warm": readings[0], "last": readings[-1], "after": after}.items():
        print(f"{label:<6} {reading.shown}")
    print(f"memory grew {growth:+.2f} MiB a minute, {late_growth:+.2f} in the second half")
    for failure in running.failures[:20]:
        print("FAILED", failure)
    result = {
        "requests": sum(running.seen.values()),
        "failures": len(running.failures),
        "is_idle": after.is_idle,
        "mib_per_minute": round(growth, 3),
        "mib_per_minute_late": round(late_growth, 3),
        "memory_mib": [round(reading.memory_mib, 1) for reading in (before, readings[0], readings[-1], after)],
        "files": [before.num_files, after.num_files],
    }
    print(json.dumps(result))
    return 0 if after.is_idle and not running.failures and growth <= arguments.most_growth else 1


if __name__ == "__main__":
    sys.exit(main())
