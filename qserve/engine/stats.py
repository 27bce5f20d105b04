"""What the engine has done and how full it is, as plain numbers for whoever counts."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

# Upper bounds as vLLM's metrics have them, so that its dashboards fit.
_TOKEN_GAPS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Distribution:
    """How often values fell up to each bound; the last count is of those above all bounds. One thread writes."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True, kw_only=True)
class Stats:
    """The first group tells the present, the second everything since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_held_blocks: int = 0

    num_steps: int = 0
    num_computed_tokens: int = 0  # positions, guesses and those computed again after a preemption among them
    num_prompt_tokens: int = 0  # of requests that were admitted
    num_cached_tokens: int = 0  # of these, found in the prefix cache
    num_generated_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0  # that were guessed and computed
    num_accepted_tokens: int = 0  # of these, right
    num_preemptions: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    token_gaps: Distribution = field(default_factory=lambda: Distribution(_TOKEN_GAPS))  # seconds
    step_tokens: Distribution = field(default_factory=lambda: Distribution(_STEP_TOKENS))
