"""A step's stages, recorded once and replayed in one call: what a small model's decode step costs is mostly calls.

Knows no stage's meaning. A recording holds for one cache and any number of tokens, for every stage of a step has a row
for each; what else changes from step to step is read through the batch's structure, to which the stages point.
"""

from collections.abc import Callable
from ctypes import sizeof

import torch
from torch import Tensor

from qserve.kernels.arena import map_memory
from qserve.kernels.stages import Runner, StageStruct

MAX_LOGITS = 64  # rows of results that are kept room for outside of a step
_LINE = 16  # floats in a line of the cache


class Recording:
    """Stages in order, and the tensor that the last one fills."""

    def __init__(self, cache: object, *, num_tokens: int) -> None:
        self.cache = cache  # kept, so that its identity stays its own
        self.is_whole = True
        self._num_tokens = num_tokens
        self._stages: list[StageStruct] = []

    def add(self, stage: StageStruct) -> None:
        assert stage.rows == self._num_tokens, (stage.rows, self._num_tokens)
        self._stages.append(stage)

    def finish(self, result: Tensor) -> None:
        self._result = result
        self._array = (StageStruct * len(self._stages))(*self._stages)
        first, step = StageStruct.rows.offset // 4, sizeof(StageStruct) // 4
        self._rows = torch.frombuffer(self._array, dtype=torch.int32)[first::step]

    def replay(self, runner: Runner, *, num_tokens: int) -> Tensor:
        """The result, (num_tokens, width)."""
        if num_tokens != self._num_tokens:
            self._num_tokens = num_tokens
            self._rows.fill_(num_tokens)
            self._result = self._result.as_strided((num_tokens, self._result.shape[1]), self._result.stride())
        runner.run(self._array, len(self._array))
        return self._result


class Recorder:
    """Recordings by cache, and the memory that steps share.

    In a step, a stage's result stands until the next stage of its kind and width: all layers write to the same few
    buffers, and new memory would cost a tenth of a step's time. A step of more tokens than any before makes new ones,
    and recordings that point to the old are of no more use.
    """

    def __init__(self) -> None:
        self._recordings: dict[int, Recording] = {}
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._max_tokens = MAX_LOGITS
        self._is_in_step = False
        self._current: Recording | None = None

    def run_step(self, forward: Callable[[], Tensor], runner: Runner, *, num_tokens: int, cache: object) -> Tensor:
        if num_tokens > self._max_tokens:
            self._max_tokens = max(num_tokens, 2 * self._max_tokens)
            self._recordings.clear()
            self._buffers.clear()
        known = self._recordings.get(id(cache))
        if known is not None and known.is_whole:
            return known.replay(runner, num_tokens=num_tokens)
        self._is_in_step = True
        try:
            return forward() if known is not None else self._record(forward, cache, num_tokens)
        finally:
            self._is_in_step = False

    def add(self, stage: StageStruct) -> None:
        if self._current is not None:
            self._current.add(stage)

    def give_up(self) -> None:
        """Something outside the stages takes part in this step: it cannot be replayed."""
        if self._current is not None:
            self._current.is_whole = False

    def allocate(self, kind: int, *, rows: int, width: int) -> Tensor:
        """Room for a stage's result, (rows, width): the step's own, or new outside of one."""
        if not self._is_in_step:
            return torch.empty(rows, _row_stride(width))[:, :width]
        return self._reuse(kind, width, self._max_tokens)[:rows]

    def reuse(self, kind: int, *, rows: int, width: int) -> Tensor:
        """The room that the last stage of this kind and width had, for up to MAX_LOGITS rows."""
        return self._reuse(kind, width, MAX_LOGITS)[:rows]

    def _reuse(self, kind: int, width: int, rows: int) -> Tensor:
        known = self._buffers.get((kind, width))
        if known is None or len(known) < rows:
            known = self._buffers[kind, width] = _map_rows(rows, width)
        return known

    def _record(self, forward: Callable[[], Tensor], cache: object, num_tokens: int) -> Tensor:
        self._current = recording = Recording(cache, num_tokens=num_tokens)
        try:
            result = forward()
        finally:
            self._current = None
        recording.finish(result)
        self._recordings[id(cache)] = recording
        return result


def _row_stride(width: int) -> int:
    """An odd number of cache lines, in floats.

    Kernels write columns, and rows a power of two apart would all fight for the same few places of the caches.
    """
    return (-(-width // _LINE) | 1) * _LINE


def _map_rows(rows: int, width: int) -> Tensor:
    stride = _row_stride(width)
    memory = map_memory(rows * stride * 4).view(torch.float32)
    return memory[: rows * stride].view(rows, stride)[:, :width]
