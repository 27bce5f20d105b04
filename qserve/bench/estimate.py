"""How sure a figure is that was measured several times.

The interval is Student's for the mean, at 95 %. Ratios are made repeat by repeat, for what ran side by side shared the
machine's moods, and averaged over their logarithms.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The 0.975 quantile of Student's t by degrees of freedom; beyond the table the normal distribution is near enough.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`half_width` is that of the interval around the mean; None after a single measurement."""

    mean: float
    median: float
    half_width: float | None
    number: int


def estimate(values: Sequence[float]) -> Estimate:
    return Estimate(
        mean=float(np.mean(values)),
        median=float(np.median(values)),
        half_width=_half_width(values),
        number=len(values),
    )


def estimate_ratio(values: Sequence[float], references: Sequence[float]) -> Estimate:
    """Of values to references, both in the order of the repeats. The interval is made symmetric around the mean."""
    logs = np.log(np.array(values) / np.array(references))
    mean, half_width = float(np.exp(np.mean(logs))), _half_width(logs.tolist())
    return Estimate(
        mean=mean,
        median=float(np.exp(np.median(logs))),
        half_width=None if half_width is None else mean * float(np.sinh(half_width)),
        number=len(values),
    )


def _half_width(values: Sequence[float]) -> float | None:
    freedom = len(values) - 1
    if freedom < 1:
        return None
    quantile = _QUANTILES[freedom - 1] if freedom <= len(_QUANTILES) else _NORMAL
    return quantile * float(np.std(values, ddof=1)) / float(np.sqrt(len(values)))
