"""Where the time of a start goes. A leaf; the server and what builds the model put their parts into one clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by part, in the order in which they were measured."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - start

    def report(self) -> str:
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in self._seconds.items())
        return f"{sum(self._seconds.values()):.2f} s ({parts})"
