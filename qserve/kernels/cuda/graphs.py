"""Steps recorded as CUDA graphs: a small model's step is a thousand launches, which cost more than what they launch.

Knows no stage. A step may be recorded if what it does depends on tensors alone.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from qserve.kernels.ops import Batch

_MOST = 128  # recorded steps that are kept; the one that was not used for the longest time goes first

_Key = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch  # whose tensors the graph reads
    hidden: Tensor  # which it writes

    def replay(self, batch: Batch) -> Tensor:
        for field in fields(Batch):
            ours, given = getattr(self.batch, field.name), getattr(batch, field.name)
            if isinstance(ours, Tensor) and field.name != "sample_rows":  # which no stage reads
                ours.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.hidden


class Graphs:
    """Runs the first step of a shape as it is, records the second, and replays that from then on."""

    def __init__(self) -> None:
        self._recorded: OrderedDict[_Key, _Recorded | None] = OrderedDict()
        self._memory: Any = None  # of all: one step runs at a time

    def run_step(self, forward: Callable[[], Tensor], batch: Batch, cache: object) -> Tensor:
        """What forward() gives for the batch, which stands until the next step."""
        key = (len(batch.token_ids), *batch.block_tables.shape, id(cache))
        if key not in self._recorded:
            self._keep(key, None)
            return forward()
        recorded = self._recorded[key] or self._record(forward, batch)
        self._keep(key, recorded)
        return recorded.replay(batch)

    def _keep(self, key: _Key, recorded: _Recorded | None) -> None:
        self._recorded[key] = recorded
        self._recorded.move_to_end(key)
        if len(self._recorded) > _MOST:
            self._recorded.popitem(last=False)

    def _record(self, forward: Callable[[], Tensor], batch: Batch) -> _Recorded:
        graph = torch.cuda.CUDAGraph()
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            hidden = forward()
        return _Recorded(graph, batch, hidden)
