"""A step's stages, recorded once and replayed in one call: what a small model's decode step costs is mostly calls.

Knows no stage's meaning. A recording holds for one number of tokens and one cache; what else changes from step to
step is read through the batch's structure, to which the stages point.
"""

from collections.abc import Callable
from ctypes import Array

import torch
from torch import Tensor

from qserve.kernels.arena import map_memory
from qserve.kernels.stages import Runner, StageStruct

MAX_TOKENS = 64  # above, arithmetic takes so long that calls cost nothing beside it
_LINE = 16  # floats in a line of the cache


class Recording:
    """Stages in order, and the tensor that the last one fills."""

    def __init__(self, cache: object) -> None:
        self.cache = cache  # kept, so that its identity stays its own
        self.stages: list[StageStruct] = []
        self.is_whole = True
        self._array: Array[StageStruct] | None = None
        self._result: Tensor | None = None

    def finish(self, result: Tensor) -> None:
        self._array = (StageStruct * len(self.stages))(*self.stages)
        self._result = result

    def replay(self, runner: Runner) -> Tensor:
        assert self._array is not None, "not finished"
        assert self._result is not None, "not finished"
        runner.run(self._array, len(self._array))
        return self._result


class Recorder:
    """Recordings by number of tokens and cache, and the memory that steps share.

    In a step, a stage's result stands until the next stage of its kind and width: all layers write to the same few
    buffers, one set for recordings of all numbers of tokens, and one for longer steps, which new memory would cost a
    tenth of their time.
    """

    def __init__(self) -> None:
        self._recordings: dict[tuple[int, int], Recording] = {}
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._long_buffers: dict[tuple[int, int], Tensor] = {}
        self._is_long = False
        self._current: Recording | None = None

    def run_step(self, forward: Callable[[], Tensor], runner: Runner, *, num_tokens: int, cache: object) -> Tensor:
        if num_tokens > MAX_TOKENS:
            return self._run_long(forward)
        key = (num_tokens, id(cache))
        known = self._recordings.get(key)
        if known is None:
            return self._record(key, forward, cache)
        return known.replay(runner) if known.is_whole else forward()

    def add(self, stage: StageStruct) -> None:
        if self._current is not None:
            self._current.stages.append(stage)

    def give_up(self) -> None:
        """Something outside the stages takes part in this step: it cannot be replayed."""
        if self._current is not None:
            self._current.is_whole = False

    def allocate(self, kind: int, *, rows: int, width: int) -> Tensor:
        """Room for a stage's result, (rows, width): the step's own, or new outside of one."""
        if self._current is None and not self._is_long:
            return torch.empty(rows, _row_stride(width))[:, :width]
        return self.reuse(kind, rows=rows, width=width)

    def reuse(self, kind: int, *, rows: int, width: int) -> Tensor:
        """The room that the last stage of this kind and width had."""
        buffers = self._long_buffers if rows > MAX_TOKENS else self._buffers
        known = buffers.get((kind, width))
        if known is None or len(known) < rows:
            known = buffers[kind, width] = _map_rows(max(rows, MAX_TOKENS), width)
        return known[:rows]

    def _run_long(self, forward: Callable[[], Tensor]) -> Tensor:
        self._is_long = True
        try:
            return forward()
        finally:
            self._is_long = False

    def _record(self, key: tuple[int, int], forward: Callable[[], Tensor], cache: object) -> Tensor:
        self._current = recording = Recording(cache)
        try:
            result = forward()
        finally:
            self._current = None
        recording.finish(result)
        self._recordings[key] = recording
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
