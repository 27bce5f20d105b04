"""What a server's /metrics tells while it is put under strain: what it holds, and how large it has become."""

import re
import time
from dataclasses import dataclass

import httpx

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look at a server."""

    seconds: float  # of time.monotonic
    num_running: int
    num_waiting: int
    cache_usage: float
    memory_mib: float
    num_files: int

    @property
    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, and no block of the cache is held."""
        return not (self.num_running or self.num_waiting or self.cache_usage)

    @property
    def shown(self) -> str:
        return (
            f"running {self.num_running}, waiting {self.num_waiting}, cache {self.cache_usage:.0%}, "
            f"{self.memory_mib:.0f} MiB, {self.num_files} files"
        )


def read(url: str) -> Reading:
    text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    found = {name: float(value) for name, value in re.findall(r"^(?:\w+:)?(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE)}
    return Reading(
        seconds=time.monotonic(),
        num_running=int(found["num_requests_running"]),
        num_waiting=int(found["num_requests_waiting"]),
        cache_usage=found["kv_cache_usage_perc"],
        memory_mib=found["process_resident_memory_bytes"] / _MIB,
        num_files=int(found["process_open_fds"]),
    )


def wait_until_idle(url: str, *, seconds: float) -> Reading:
    """The first reading of an idle server; the last one, if the time was too short."""
    deadline = time.monotonic() + seconds
    reading = read(url)
    while not reading.is_idle and time.monotonic() < deadline:
        time.sleep(0.1)
        reading = read(url)
    return reading


def slope_per_minute(readings: list[Reading]) -> float:
    """MiB a minute: the straight line through the readings, by least squares."""
    if len(readings) < 2:
        return 0.0
    times = [reading.seconds / 60 for reading in readings]
    mean_time, mean_memory = sum(times) / len(times), sum(r.memory_mib for r in readings) / len(readings)
    spread = sum((t - mean_time) ** 2 for t in times)
    together = sum((t - mean_time) * (r.memory_mib - mean_memory) for t, r in zip(times, readings, strict=True))
    return together / spread
