"""The stages on a GPU: Triton kernels for what is large, plain torch for the rest, whole steps recorded as graphs."""

from collections.abc import Callable

import torch
from torch import Tensor

from qserve.kernels.cuda.attention import attend_paged
from qserve.kernels.cuda.graphs import Graphs
from qserve.kernels.cuda.linear import pack_part
from qserve.kernels.cuda.rotary import can_rotate, rotate_and_store
from qserve.kernels.cuda.rows import normalize
from qserve.kernels.ops import AttentionSpec, Batch, CacheLayer, Norm, Rotary
from qserve.kernels.reference import Part, ReferenceOps
from qserve.kernels.reference_attention import split_heads
from qserve.quant.weight import Weight


class CudaOps(ReferenceOps):
    """The stages of `ops.Ops`; those of `ReferenceOps` that stand here are faster, and take less memory."""

    def __init__(self, *, device: torch.device) -> None:
        super().__init__(device=device)
        self._graphs = Graphs()

    def run_step(self, forward: Callable[[], Tensor], batch: Batch, cache: object) -> Tensor:
        return self._graphs.run_step(forward, batch, cache)

    def rotate_and_store(
        self, qkv: Tensor, attention: AttentionSpec, rotary: Rotary | None, batch: Batch, cache: CacheLayer
    ) -> None:
        rotate = rotate_and_store if can_rotate(attention) else super().rotate_and_store
        rotate(qkv, attention, rotary, batch, cache)

    def attend(self, qkv: Tensor, attention: AttentionSpec, batch: Batch, cache: CacheLayer) -> Tensor:
        queries, _, _ = split_heads(qkv, attention)
        return attend_paged(queries, attention, batch, cache)

    def _normalize(self, x: Tensor, norm: Norm | None) -> Tensor:
        return normalize(x, norm)

    def _pack_part(self, weight: Weight) -> Part:
        return pack_part(weight, device=self._device) or super()._pack_part(weight)
