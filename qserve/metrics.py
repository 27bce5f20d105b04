"""What is counted and shown at /metrics, under the names that vLLM gave them, so that its dashboards carry over.

A leaf: knows nothing of the engine; numbers that the engine already keeps are read from a function at scrape time.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SHORT_TIMES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_LONG_TIMES = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

# name, help, and what it is computed from; a name that ends with _total is a counter
_FROM_STATS: tuple[tuple[str, str, Callable[["EngineNumbers"], float]], ...] = (
    ("num_requests_running", "Requests that are computed now", lambda now: now.num_running),
    ("num_requests_waiting", "Requests that wait to be computed", lambda now: now.num_waiting),
    (
        "kv_cache_usage_perc",
        "Share of the cache blocks in use, 0 to 1",
        lambda now: now.num_held_blocks / now.num_blocks,
    ),
    ("prompt_tokens_total", "Prompt tokens of admitted requests", lambda now: now.num_prompt_tokens),
    ("generation_tokens_total", "Tokens generated", lambda now: now.num_generated_tokens),
    ("num_preemptions_total", "Times a request lost its blocks", lambda now: now.num_preemptions),
    ("prefix_cache_queries_total", "Prompt tokens looked up in the cache", lambda now: now.num_prompt_tokens),
    ("prefix_cache_hits_total", "Prompt tokens found in the cache", lambda now: now.num_cached_tokens),
)


class EngineNumbers(Protocol):
    """The engine's own numbers, of one moment."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_held_blocks(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_generated_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...


class Metrics:
    """The counters of one served model."""

    def __init__(self, model_name: str, read_stats: Callable[[], EngineNumbers], *, prefix: str = "qserve") -> None:
        self._registry = CollectorRegistry()
        self._read_stats = read_stats
        self._prefix = prefix
        self._labels = {"model_name": model_name}
        self._registry.register(self)
        self._success = Counter(
            f"{prefix}:request_success",
            "Requests that ended",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._first_token = self._histogram("time_to_first_token_seconds", "Until the first token", _SHORT_TIMES)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "A token's share of the time after the first", _SHORT_TIMES
        )
        self._total = self._histogram("e2e_request_latency_seconds", "From arrival to the end", _LONG_TIMES)

    def observe(self, *, finish_reason: str, seconds: float, first_token: float | None, num_output_tokens: int) -> None:
        """Count a request that has ended; `first_token` is None when it never had one."""
        self._success.labels(finished_reason=finish_reason, **self._labels).inc()
        self._total.observe(seconds)
        if first_token is not None:
            self._first_token.observe(first_token)
            if num_output_tokens > 1:
                self._per_token.observe((seconds - first_token) / (num_output_tokens - 1))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """prometheus-client asks its registered collectors for their metrics by this name."""
        stats = self._read_stats()
        for name, text, compute in _FROM_STATS:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"{self._prefix}:{name}", text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), compute(stats))
            yield family

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"{self._prefix}:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
        return metric.labels(**self._labels)
