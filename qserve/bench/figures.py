"""From the answers of one run to its figures, under the names and by the definitions of `vllm bench serve`.

Times are in milliseconds. A request that failed counts in `failed` and nowhere else. Where a server does not tell its
tokens, what would be counted in them is None.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qserve.bench.answer import Answer

Figures = dict[str, Any]

METRICS = ("ttft", "tpot", "itl", "e2el")


def make_figures(
    answers: Sequence[Answer],
    duration: float,
    *,
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> Figures:
    """Figures of one run that took `duration` seconds; `goodput` gives the longest time by metric, in milliseconds."""
    whole = [answer for answer in answers if not answer.failure]
    num_input = total(answer.num_prompt_tokens for answer in whole)
    num_output = total(answer.num_output_tokens for answer in whole)
    figures: Figures = {
        "num_prompts": len(answers),
        "duration": duration,
        "completed": len(whole),
        "failed": len(answers) - len(whole),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "total_cached_tokens": sum(answer.num_cached_tokens for answer in whole),
        "request_throughput": len(whole) / duration,
        "request_goodput": _goodput(whole, goodput) / duration if goodput else None,
        "output_throughput": None if num_output is None else num_output / duration,
        "total_token_throughput": None
        if num_input is None or num_output is None
        else (num_input + num_output) / duration,
        "max_output_tokens_per_s": None if num_output is None else max_tokens_in_a_second(whole),
        "max_concurrent_requests": max_concurrent(whole),
    }
    for metric, seconds in samples(whole).items():
        figures |= describe(metric, seconds, percentiles=percentiles)
    return figures


def samples(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """The values in seconds that each metric is made of: one a request, but for the gaps between chunks."""
    return {
        "ttft": [answer.ttft for answer in answers],
        "tpot": [answer.tpot for answer in answers if answer.tpot is not None],
        "itl": [gap for answer in answers for gap in answer.itls],
        "e2el": [answer.e2el for answer in answers],
    }


def describe(metric: str, seconds: Sequence[float], *, percentiles: Sequence[float]) -> Figures:
    """Mean, median, standard deviation and percentiles in milliseconds; None where there is nothing."""
    milliseconds = np.array(seconds, dtype=np.float64) * 1e3
    parts: dict[str, Callable[[Any], Any]] = {"mean": np.mean, "median": np.median, "std": np.std}
    parts |= {f"p{percentile:g}": partial(np.percentile, q=percentile) for percentile in percentiles}
    return {
        f"{name}_{metric}_ms": float(part(milliseconds)) if milliseconds.size else None for name, part in parts.items()
    }


def max_tokens_in_a_second(answers: Sequence[Answer]) -> float:
    """Over the seconds since the first request; an answer's tokens are spread evenly over its chunks."""
    if not answers:
        return 0.0
    start = min(answer.started_at for answer in answers)
    times = [at - start for answer in answers for at in answer.chunk_times]
    shares = [
        (answer.num_output_tokens or 0) / len(answer.chunk_times) for answer in answers for _ in answer.chunk_times
    ]
    return float(np.bincount(np.array(times, dtype=np.int64), weights=shares).max())


def max_concurrent(answers: Sequence[Answer]) -> int:
    """The most requests that ran at one moment."""
    turns = sorted(
        turn for answer in answers for turn in ((answer.started_at, 1), (answer.started_at + answer.e2el, -1))
    )
    return int(np.cumsum([change for _, change in turns]).max()) if turns else 0


def total(numbers: Any) -> int | None:
    """The sum, or None if one of them is not known."""
    known = list(numbers)
    return None if any(number is None for number in known) else sum(known)


def _goodput(answers: Sequence[Answer], limits: Mapping[str, float]) -> int:
    """How many meet every limit; a request of one token meets any limit on the time of a token."""
    return sum(
        all((getattr(answer, metric) or 0.0) * 1e3 <= limit for metric, limit in limits.items()) for answer in answers
    )
