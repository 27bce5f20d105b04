"""The steps of a run: windows in an order that the seed gives, micro-batches, one update of the optimizer.

Processes are accelerate's business: alone, replicated or sharded, the same code. Why not transformers' Trainer: it
writes its checkpoints as pickles and in place, so that a kill leaves half of one, and all that would remain of it here
are these lines. Knows no files and no command line.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qserve.errors import UsageError
from training.config import TrainOptions
from training.qat.loss import losses
from training.qat.model import Trainee
from training.qat.sharding import shard
from training.scores import score

_MOMENTS = (0.9, 0.95)


class Training:
    """A model, its optimizer and the number of steps that are done."""

    def __init__(
        self,
        trainee: Trainee,
        options: TrainOptions,
        *,
        windows: Tensor,  # (windows, sequence_length + 1)
        teacher: Any | None,  # a float model, or None: the trainee itself with rounding suspended
        kl_share: float,
        accelerator: Accelerator,
        is_sharded: bool = False,  # each process keeps a part of the model, instead of all of it
    ) -> None:
        self.trainee = trainee
        self.options = options
        self.windows = windows
        self.teacher = teacher
        self.kl_share = kl_share
        self.accelerator = accelerator
        self.step = 0
        self.num_steps = num_steps(options, num_windows=len(windows))
        self.start_step = math.ceil(options.start * self.num_steps) if trainee.rounders else self.num_steps
        self._is_checked = False
        if is_sharded:
            for model in (trainee.model, teacher):
                if model is not None:
                    shard(model, device=accelerator.device.type, num_processes=accelerator.num_processes)
        optimizer: Any = torch.optim.AdamW(_groups(trainee, options), betas=_MOMENTS, fused=True)
        prepared = (trainee.model, optimizer) if is_sharded else accelerator.prepare(trainee.model, optimizer)
        self.model, self.optimizer = prepared
        self.model.train()
        for rounder in trainee.rounders.values():
            rounder.keeps_values = not is_sharded  # all weights' values together would be the whole model again

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps

    @property
    def tokens_per_step(self) -> int:
        return self.options.batch_size * self.options.sequence_length

    @property
    def rate(self) -> float:
        """The share of the learning rate at this step: a rise, then a cosine."""
        rise = max(1, round(self.options.warmup * self.num_steps))
        if self.step < rise:
            return (self.step + 1) / rise
        passed = (self.step - rise) / max(1, self.num_steps - rise)
        return self.options.final_rate + (1 - self.options.final_rate) * (1 + math.cos(math.pi * passed)) / 2

    def advance(self) -> Tensor:
        """One step; gives (3,) the objective, the text's loss and the divergence, this process's means."""
        self._switch_on_when_due()
        mine = self._indices()[self.accelerator.process_index :: self.accelerator.num_processes]
        found = torch.zeros(3, device=self.accelerator.device)
        batches = [
            mine[begin : begin + self.options.micro_batch] for begin in range(0, len(mine), self.options.micro_batch)
        ]
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                each = self._losses(self.windows[batch]) * (len(batch) / len(mine))
                self.accelerator.backward(each[0])
            found += each.detach()
        self._update()
        self._require_rounding()
        return found

    def _losses(self, batch: Tensor) -> Tensor:
        batch = batch.to(self.accelerator.device, torch.int64)  # (windows, sequence_length + 1)
        inputs, targets = batch[:, :-1], batch[:, 1:]
        with self._autocast():
            teacher = self._teach(inputs) if self.kl_share else None
            logits = self.model(input_ids=inputs, use_cache=False).logits
        return losses(logits, targets, teacher, kl_share=self.kl_share)

    @torch.no_grad()
    def _teach(self, inputs: Tensor) -> Tensor:
        if self.teacher is not None:
            return self.teacher(input_ids=inputs, use_cache=False).logits  # type: ignore[no-any-return]
        with self.trainee.switch.suspended():
            return self.model(input_ids=inputs, use_cache=False).logits  # type: ignore[no-any-return]

    def measure(self, windows: Tensor) -> float:
        """The text's mean loss over windows, in float32 and as the artifact computes."""
        self.model.eval()
        loss = score(self.model, windows).loss
        self.model.train()
        return loss

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * self.rate
        self.accelerator.clip_grad_norm_([parameter for _, parameter in self.trainee.trainable()], self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for rounder in self.trainee.rounders.values():
            rounder.forget()  # torch's fused AdamW does not count the version of what it changes
        self.step += 1

    def _switch_on_when_due(self) -> None:
        self.trainee.switch.is_on = self.step >= self.start_step
        if self.step == self.start_step:
            self.trainee.begin_ranges()

    def _require_rounding(self) -> None:
        """After the first step that rounds: whatever the loss has not passed through would be converted untrained."""
        if self._is_checked or not self.trainee.switch.is_on or not self.trainee.rounders:
            return
        self._is_checked = True
        idle = [name for name, rounder in self.trainee.rounders.items() if not rounder.num_calls]
        if idle:
            raise UsageError(
                f"{len(idle)} of {len(self.trainee.rounders)} fake quantizers did not run in the first step, beginning "
                f"with {idle[0]}: the model computes its loss past them, and what was not trained would be converted. "
                "Train a model that calls these layers, or leave the head float with prepare --head float"
            )

    def _indices(self) -> Tensor:
        """Of this step's windows, over all processes; every pass over the text has an order of its own."""
        first = self.step * self.options.batch_size
        wanted = range(first, first + self.options.batch_size)
        orders = {index // len(self.windows): torch.empty(0) for index in wanted}
        for lap in orders:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + lap)
            orders[lap] = torch.randperm(len(self.windows), generator=generator)
        return torch.stack([orders[index // len(self.windows)][index % len(self.windows)] for index in wanted])

    def _autocast(self) -> Any:
        is_bf16 = self.options.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=is_bf16)


def num_steps(options: TrainOptions, *, num_windows: int) -> int:
    """Of a run: the tokens asked for, or once over the text."""
    wanted = options.tokens // options.sequence_length if options.tokens else num_windows
    return max(1, wanted // options.batch_size)


def _groups(trainee: Trainee, options: TrainOptions) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; scales, being logarithms, have a rate of their own."""
    ranges = {
        id(parameter): parameter
        for rounder in trainee.rounders.values()
        if rounder.ranges is not None
        for parameter in rounder.ranges.parameters()
    }
    others = [parameter for _, parameter in trainee.trainable() if id(parameter) not in ranges]
    matrices = [parameter for parameter in others if parameter.ndim > 1]
    vectors = [parameter for parameter in others if parameter.ndim <= 1]
    groups = [
        _group(matrices, options.learning_rate, options.weight_decay),
        _group(vectors, options.learning_rate, 0.0),
        _group(list(ranges.values()), options.range_learning_rate, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(parameters: Sequence[Tensor], rate: float, decay: float) -> dict[str, Any]:
    return {"params": list(parameters), "lr": rate, "highest": rate, "weight_decay": decay}
