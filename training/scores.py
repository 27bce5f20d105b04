"""How good a model is on packed text: loss, and how near it comes to a reference. Knows no files.

Every window is computed by itself, so a score does not depend on how windows are batched.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS = 256  # logits that are turned into probabilities at once
Progress = Callable[[int, int], None]  # windows done, of how many


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Means over `tokens` predicted tokens, in nats. Divergence and agreement are to a reference, if there is one."""

    tokens: int
    loss: float
    kl: float | None = None  # KL(reference || model)
    agreement: float | None = None  # share of tokens at which both find the same token likeliest

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


@torch.no_grad()
def score(model: Any, windows: Tensor, *, reference: Any = None, progress: Progress | None = None) -> Scores:
    """`windows` (windows, length + 1): all but the first token of each are predicted."""
    totals = torch.zeros(3, dtype=torch.float64)
    for done, window in enumerate(windows, start=1):
        inputs, targets = window[None, :-1].long(), window[1:].long()
        logits = _logits(model, inputs)
        totals += _sums(logits, targets, None if reference is None else _logits(reference, inputs))
        if progress is not None:
            progress(done, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    loss, kl, agreement = (totals / tokens).tolist()
    if reference is None:
        return Scores(tokens=tokens, loss=loss)
    return Scores(tokens=tokens, loss=loss, kl=kl, agreement=agreement)


def _logits(model: Any, inputs: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=inputs.to(device), use_cache=False).logits[0].cpu()  # type: ignore[no-any-return]


def _sums(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """(3,): summed loss, divergence, agreement."""
    sums = torch.zeros(3, dtype=torch.float64)
    for begin in range(0, len(targets), _ROWS):
        rows = slice(begin, begin + _ROWS)
        log_p = logits[rows].float().log_softmax(-1)
        sums[0] -= log_p.gather(-1, targets[rows].unsqueeze(-1)).double().sum()
        if reference is not None:
            log_q = reference[rows].float().log_softmax(-1)
            sums[1] += (log_q - log_p).mul_(log_q.exp()).double().sum()
            sums[2] += (log_q.argmax(-1) == log_p.argmax(-1)).sum()
    return sums
