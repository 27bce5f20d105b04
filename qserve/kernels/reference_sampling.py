"""The next token of each row in plain torch, on any device: the oracle of the compiled sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qserve.kernels.ops import CUTS, LEAST_TEMPERATURE


def sample(logits: Tensor, draws: Tensor, allowed: Sequence[bytes | None] | None = None) -> Tensor:
    """What `Ops.sample` says, on the device of the logits."""
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for row, bits in enumerate(allowed or ()):
        if bits is not None:
            logits[row, ~_unpack(bits, logits)] = -torch.inf
    temperature, top_k, top_p, min_p = draws[:, : len(CUTS)].to(logits.device).T.unsqueeze(-1)  # each (rows, 1)
    numbers = draws[:, len(CUTS) :].to(logits.device)
    best = logits.argmax(dim=-1, keepdim=True)
    most = logits.gather(1, best)
    best = torch.where(most == -torch.inf, -1, best).expand(-1, numbers.shape[1])
    if not draws[:, 0].any():
        return best
    weights = torch.exp((logits - most) / temperature.clamp(min=LEAST_TEMPERATURE).to(torch.float32))
    is_cut = (draws[:, 1 : len(CUTS)] != draws.new_tensor([0.0, 1.0, 0.0])).any()
    drawn = _invert(_cut(weights, top_k, top_p, min_p) if is_cut else weights, numbers)
    return torch.where((temperature > 0) & most.isfinite(), drawn, best)


def _unpack(bits: bytes, logits: Tensor) -> Tensor:
    """One flag for each token, (vocabulary,)."""
    eight = torch.tensor([*bits], device=logits.device)[:, None] >> torch.arange(8, device=logits.device)
    return (eight & 1).bool().flatten()[: logits.shape[1]]


def _cut(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Nothing for what is not left, which is the best of each row, and of equals the first."""
    in_order, order = weights.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(weights.shape[1], device=weights.device)
    in_order = in_order.where((top_k == 0) | (places < top_k), 0.0)
    ends = in_order.cumsum(dim=-1, dtype=torch.float64)
    is_likely = (top_p == 1) | (ends - in_order < top_p * ends[:, -1:])
    is_left = is_likely & (in_order >= min_p.to(weights.dtype))
    return torch.zeros_like(weights).scatter(1, order, in_order.where(is_left | (places == 0), 0.0))


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The first places at which the cumulative weight exceeds these shares of the whole, (rows, numbers)."""
    ends = weights.cumsum(dim=-1, dtype=torch.float64)
    last = ends[:, -1:].contiguous()
    # Rounding may put a target on the very end: then it is the last that adds to it.
    return torch.minimum(torch.searchsorted(ends, numbers * last, right=True), torch.searchsorted(ends, last))
