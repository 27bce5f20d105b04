"""The losses and their gradient against torch's own chain of operations."""

import pytest
import torch
from torch.nn import functional as F

from training.qat.loss import losses


@pytest.mark.parametrize("kl_share", [0.0, 0.3, 1.0])
def test_values_and_gradient(kl_share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 300, 40, generator=generator) * 3).requires_grad_()
    teacher = torch.randn(2, 300, 40, generator=generator) * 3
    targets = torch.randint(40, (2, 300), generator=generator)
    text = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    log_p, log_q = logits.flatten(0, 1).log_softmax(-1), teacher.flatten(0, 1).log_softmax(-1)
    kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    objective = kl_share * kl + (1 - kl_share) * text
    found = losses(logits, targets, teacher, kl_share=kl_share)
    torch.testing.assert_close(found.detach(), torch.stack([objective, text, kl]).detach())
    (wanted,) = torch.autograd.grad(objective * 2, logits)
    (ours,) = torch.autograd.grad(found[0] * 2, logits)
    torch.testing.assert_close(ours, wanted)


def test_without_a_teacher_it_is_the_texts_loss() -> None:
    logits, targets = torch.randn(5, 7), torch.randint(7, (5,))
    found = losses(logits, targets, None, kl_share=0.0)
    torch.testing.assert_close(found[:2], F.cross_entropy(logits, targets).expand(2))
    assert found[2] == 0
