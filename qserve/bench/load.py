"""When requests are sent: so many at a time, or so many in a second, or both. Knows not what a request is."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qserve.errors import UsageError

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One point of a sweep."""

    request_rate: float = math.inf  # requests a second; without end: all at once
    concurrency: int | None = None  # requests under way at once, at most
    burstiness: float = 1.0  # 1 is a Poisson process, less is burstier, more is steadier

    @property
    def label(self) -> str:
        clients = [] if self.concurrency is None else [f"{self.concurrency} client{'s' * (self.concurrency > 1)}"]
        rate = [] if math.isinf(self.request_rate) else [f"{self.request_rate:g}/s"]
        return ", ".join(rate + clients) or "all at once"


def make_loads(*, rates: str, concurrency: str, burstiness: float) -> list[Load]:
    """Every rate with every concurrency, each given as numbers with commas between; empty is without limit."""
    if burstiness <= 0:
        raise UsageError(f"--burstiness is {burstiness:g}: expected a number above 0; 1 is a Poisson process.")
    parsed_rates = _parse(rates, "--request-rate", minimum=1e-6) or [math.inf]
    counts = _parse(concurrency, "--concurrency", minimum=1)
    parsed_concurrency: list[int | None] = [int(count) for count in counts] if counts else [None]
    return [
        Load(request_rate=rate, concurrency=number, burstiness=burstiness)
        for rate in parsed_rates
        for number in parsed_concurrency
    ]


def make_arrivals(load: Load, number: int, *, seed: int) -> list[float]:
    """Seconds after the start; gaps are gamma distributed, and stretched so that the rate is met exactly."""
    if math.isinf(load.request_rate):
        return [0.0] * number
    gaps = np.random.default_rng(seed).gamma(shape=load.burstiness, size=number)
    gaps *= number / load.request_rate / gaps.sum()
    return [0.0, *np.cumsum(gaps)[:-1].tolist()]


async def offer(send: Callable[[J], Awaitable[R]], jobs: Sequence[J], load: Load, *, seed: int) -> list[R]:
    """Sends every job when the load says so; the results in the order of the jobs."""
    gate = nullcontext() if load.concurrency is None else asyncio.Semaphore(load.concurrency)
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def pass_gate(job: J) -> R:
        async with gate:
            return await send(job)

    running = []
    for job, arrival in zip(jobs, make_arrivals(load, len(jobs), seed=seed), strict=True):
        if (wait := start + arrival - loop.time()) > 0:
            await asyncio.sleep(wait)
        running.append(asyncio.ensure_future(pass_gate(job)))
    return await asyncio.gather(*running)


def _parse(text: str, flag: str, *, minimum: float) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{flag} is {text!r}: expected numbers with commas between, such as 1,8,32.") from error
    if any(number < minimum for number in numbers):
        raise UsageError(f"{flag} is {text!r}: expected numbers of {minimum:g} and above.")
    return numbers
