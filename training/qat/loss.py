"""What training makes smaller: the text's own loss, the divergence from the float model, or a mixture.

One function that computes values and gradient together, some rows at a time: over a vocabulary of 50,000 the usual
chain of operations keeps a dozen copies of the logits. Knows no models.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Logits at once: temporaries of a whole batch would leave the cache, and be asked of the system anew each time.
_BLOCK = 2**19


def losses(logits: Tensor, targets: Tensor, teacher: Tensor | None, *, kl_share: float) -> Tensor:
    """(3,): the objective, the text's loss, KL(teacher || student), each the mean over tokens, in nats.

    `logits` and `teacher` are (..., vocabulary), `targets` (...). Only the objective has a gradient; it is
    kl_share * KL + (1 - kl_share) * text.
    """
    vocabulary = logits.shape[-1]
    flat = None if teacher is None else teacher.reshape(-1, vocabulary)
    return _losses(logits.reshape(-1, vocabulary), targets.reshape(-1), flat, kl_share)


class _Losses(torch.autograd.Function):
    """d objective / d logits = p - kl_share * q - (1 - kl_share) * onehot, for probabilities p and the teacher's q."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, teacher: Tensor | None, kl_share: float) -> Tensor:
        number, step = len(targets), max(1, _BLOCK // logits.shape[-1])
        gradient = torch.empty_like(logits)
        text = kl = torch.zeros((), device=logits.device)
        for begin in range(0, number, step):
            rows = slice(begin, begin + step)
            log_p = logits[rows].float().log_softmax(-1)
            chosen = targets[rows].unsqueeze(-1)
            text = text - log_p.gather(-1, chosen).sum()
            slope = log_p.exp()
            if teacher is not None:
                log_q = teacher[rows].float().log_softmax(-1)
                q = log_q.exp()
                kl = kl + (log_q.sub_(log_p)).mul_(q).sum()
                slope.sub_(q, alpha=kl_share)
            slope.scatter_add_(-1, chosen, torch.full_like(chosen, kl_share - 1, dtype=slope.dtype))
            gradient[rows] = slope.div_(number)
        ctx.save_for_backward(gradient)
        text, kl = text / number, kl / number
        return torch.stack([kl_share * kl + (1 - kl_share) * text, text, kl])

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None


_losses: Callable[..., Tensor] = _Losses.apply
