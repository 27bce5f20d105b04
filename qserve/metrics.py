"""What is counted and shown at /metrics, under the names and with the buckets of vLLM: its dashboards carry over.

A leaf: knows nothing of the engine; numbers that the engine already keeps are read from a function at scrape time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_HTTP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_CHOICES = (1, 2, 5, 10, 20)
_FINISH_REASONS = ("stop", "length", "abort")

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
    ("prompt_tokens_cached_total", "Of these, found in the cache", lambda now: now.num_cached_tokens),
    ("generation_tokens_total", "Tokens generated", lambda now: now.num_generated_tokens),
    ("num_preemptions_total", "Times a request lost its blocks", lambda now: now.num_preemptions),
    ("spec_decode_num_drafts_total", "Guesses of several tokens", lambda now: now.num_drafts),
    ("spec_decode_num_draft_tokens_total", "Tokens guessed and computed", lambda now: now.num_draft_tokens),
    ("spec_decode_num_accepted_tokens_total", "Of these, right", lambda now: now.num_accepted_tokens),
    ("prefix_cache_queries_total", "Prompt tokens looked up in the cache", lambda now: now.num_prompt_tokens),
    ("prefix_cache_hits_total", "Prompt tokens found in the cache", lambda now: now.num_cached_tokens),
)


class Counts(Protocol):
    """How often values fell up to each bound, and above them all."""

    @property
    def bounds(self) -> Sequence[float]: ...
    @property
    def counts(self) -> Sequence[int]: ...
    @property
    def total(self) -> float: ...


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
    def num_drafts(self) -> int: ...
    @property
    def num_draft_tokens(self) -> int: ...
    @property
    def num_accepted_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def token_gaps(self) -> Counts: ...
    @property
    def step_tokens(self) -> Counts: ...


_DISTRIBUTIONS: tuple[tuple[str, str, Callable[[EngineNumbers], Counts]], ...] = (
    ("inter_token_latency_seconds", "Between two tokens of a request", lambda now: now.token_gaps),
    ("iteration_tokens_total", "Tokens computed in one step", lambda now: now.step_tokens),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one generation. Seconds are None for what did not happen."""

    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_preemptions: int
    total_seconds: float
    queue_seconds: float | None  # until it was first admitted
    first_token_seconds: float | None
    last_token_seconds: float | None  # as the two before, from arrival on

    @property
    def prefill_seconds(self) -> float | None:
        return _minus(self.first_token_seconds, self.queue_seconds)

    @property
    def decode_seconds(self) -> float | None:
        return _minus(self.last_token_seconds, self.first_token_seconds)

    @property
    def inference_seconds(self) -> float | None:
        return _minus(self.last_token_seconds, self.queue_seconds)

    @property
    def seconds_per_token(self) -> float | None:
        decode = self.decode_seconds
        return None if decode is None or self.num_output_tokens < 2 else decode / (self.num_output_tokens - 1)


# name, help, buckets (None: as many tokens as the context has), and what is observed at a generation's end
_PER_REQUEST: tuple[tuple[str, str, Sequence[float] | None, Callable[[Outcome], float | None]], ...] = (
    ("time_to_first_token_seconds", "Until the first token", _FIRST_TOKEN, lambda end: end.first_token_seconds),
    (
        "request_time_per_output_token_seconds",
        "A token's share of the time after the first",
        _PER_TOKEN,
        lambda end: end.seconds_per_token,
    ),
    ("e2e_request_latency_seconds", "From arrival to the end", _LATENCY, lambda end: end.total_seconds),
    ("request_queue_time_seconds", "Waiting to be computed", _LATENCY, lambda end: end.queue_seconds),
    ("request_prefill_time_seconds", "Computing the prompt", _LATENCY, lambda end: end.prefill_seconds),
    ("request_decode_time_seconds", "From the first token to the last", _LATENCY, lambda end: end.decode_seconds),
    ("request_inference_time_seconds", "From admission to the last token", _LATENCY, lambda end: end.inference_seconds),
    ("request_prompt_tokens", "Tokens of a prompt", None, lambda end: end.num_prompt_tokens),
    ("request_generation_tokens", "Tokens made for a prompt", None, lambda end: end.num_output_tokens),
    ("request_params_max_tokens", "Tokens that might have been made", None, lambda end: end.max_tokens),
    (
        "request_prefill_kv_computed_tokens",
        "Prompt tokens that were computed, not found in the cache",
        None,
        lambda end: end.num_prompt_tokens - end.num_cached_tokens,
    ),
    (
        "request_num_preemptions",
        "Times a request lost its blocks",
        (0, *_CHOICES),
        lambda end: end.num_preemptions,
    ),
)


class Metrics:
    """The counters of one served model."""

    def __init__(
        self,
        model_name: str,
        read_stats: Callable[[], EngineNumbers],
        *,
        prefix: str = "qserve",
        max_model_len: int,
        cache: Mapping[str, object] | None = None,
    ) -> None:
        """`cache` is what is fixed about the key-value cache; vLLM shows it as labels of a gauge that is always 1."""
        self._registry = CollectorRegistry()
        self._read_stats = read_stats
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._cache = {name: str(value) for name, value in (cache or {}).items()}
        self._token_buckets = one_two_five(max_model_len)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._success = self._counters("request_success", "Generations that ended", "finished_reason", _FINISH_REASONS)
        self._rejections = self._counters(
            "admission_rejections", "Generations that found the queue full", "reason", ("requests", "tokens")
        )
        self._per_request = [
            (self._histogram(name, text, buckets), compute) for name, text, buckets, compute in _PER_REQUEST
        ]
        self._longest = self._histogram("request_max_num_generation_tokens", "The longest of a request's choices", None)
        self._num_choices = self._histogram("request_params_n", "Choices asked for", _CHOICES)
        # These two have vLLM's names too, and no prefix there either.
        self._http = Counter(
            "http_requests", "Answers over HTTP", ["handler", "method", "status"], registry=self._registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's head to the end of its answer",
            ["handler", "method"],
            buckets=_HTTP_SECONDS,
            registry=self._registry,
        )

    def observe(self, outcome: Outcome) -> None:
        """Count a generation that has ended."""
        self._success[outcome.finish_reason].inc()
        for histogram, compute in self._per_request:
            value = compute(outcome)
            if value is not None:
                histogram.observe(value)

    def observe_answer(self, outcomes: Sequence[Outcome]) -> None:
        """Count what one caller asked for: several generations, or one."""
        self._num_choices.observe(len(outcomes))
        self._longest.observe(max(outcome.num_output_tokens for outcome in outcomes))

    def observe_rejection(self, reason: str) -> None:
        self._rejections[reason].inc()

    def observe_http(self, *, handler: str, method: str, status: int, seconds: float) -> None:
        self._http.labels(handler=handler, method=method, status=f"{status // 100}xx").inc()
        self._http_seconds.labels(handler=handler, method=method).observe(seconds)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """prometheus-client asks its registered collectors for their metrics by this name."""
        stats = self._read_stats()
        labels = list(self._labels.values())
        for name, text, compute in _FROM_STATS:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"{self._prefix}:{name}", text, labels=list(self._labels))
            family.add_metric(labels, compute(stats))
            yield family
        for name, text, choose in _DISTRIBUTIONS:
            distribution = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=list(self._labels))
            values = choose(stats)
            distribution.add_metric(labels, _cumulate(values), values.total)
            yield distribution
        if self._cache:
            shown = {**self._labels, **self._cache}
            cache = GaugeMetricFamily(f"{self._prefix}:cache_config_info", "The cache, as labels", labels=list(shown))
            cache.add_metric(list(shown.values()), 1)
            yield cache

    def _histogram(self, name: str, text: str, buckets: Sequence[float] | None) -> Histogram:
        metric = Histogram(
            f"{self._prefix}:{name}",
            text,
            list(self._labels),
            buckets=self._token_buckets if buckets is None else buckets,
            registry=self._registry,
        )
        return metric.labels(**self._labels)

    def _counters(self, name: str, text: str, label: str, values: Sequence[str]) -> dict[str, Counter]:
        """One counter for each value of a label, all of them there from the start."""
        metric = Counter(f"{self._prefix}:{name}", text, [*self._labels, label], registry=self._registry)
        return {value: metric.labels(**self._labels, **{label: value}) for value in values}


def one_two_five(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, ... as far as `most`."""
    powers = [10**exponent for exponent in range(len(str(most)))]
    return tuple(step * power for power in powers for step in (1, 2, 5) if step * power <= most)


def _cumulate(values: Counts) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in values.bounds), "+Inf"]
    return list(zip(bounds, accumulate(values.counts), strict=True))


def _minus(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier
