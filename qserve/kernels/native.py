"""The stages of `ops.Ops` on the compiled kernels, for CPUs.

Each call fills one structure of `csrc/stage.h` and runs it. Knows no layout (`packing.py`) and no instruction set
(`build.py`).
"""

from collections.abc import Callable, Sequence
from ctypes import Structure, addressof, c_char_p, pointer
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qserve.errors import UnsupportedWeight
from qserve.kernels.arena import Arena
from qserve.kernels.build import Progress, Variant, choose_variant, count_cores, load_library
from qserve.kernels.linear import Linear, join_biases, join_weights, look_up, moved
from qserve.kernels.ops import CUTS, Activation, AttentionSpec, Batch, CacheLayer, Norm, NormKind, Rotary
from qserve.kernels.packing import KERNEL_ACTIVATIONS, LANES, PackedWeight, pack_weight
from qserve.kernels.recorder import MAX_LOGITS, Recorder
from qserve.kernels.reference import normalize
from qserve.kernels.reference_activations import ROUND_TRIPS
from qserve.kernels.stages import (
    CACHE_TYPES,
    FLOAT_TYPES,
    AttentionStruct,
    CacheStruct,
    LinearStruct,
    NormStruct,
    Runner,
    SamplingStruct,
    StageKind,
    StageStruct,
    StepStruct,
    WeightStruct,
    address,
)
from qserve.quant.weight import QuantizedWeight, Weight

_GATES = {Activation.SILU: 1, Activation.GELU: 2, Activation.GELU_TANH: 3, Activation.RELU: 4}  # 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLinear:
    """Packed weights and the structures that point at them."""

    weights: tuple[PackedWeight, ...]
    bias: Tensor | None
    struct: LinearStruct
    kernel: str
    round_input: Callable[[Tensor], Tensor] | None  # done before the kernel, where that does not do it itself

    @property
    def in_features(self) -> int:
        return self.weights[0].in_features

    @property
    def out_features(self) -> int:
        return sum(weight.out_features for weight in self.weights)

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self.weights)


class NativeOps:
    """The stages of `ops.Ops`. Not for two threads at once, but for packing."""

    def __init__(self, runner: Runner, variant: Variant) -> None:
        self._runner = runner
        self._variant = variant
        self._arena = Arena()
        self._mirrors: dict[tuple[int, ...], tuple[Any, Structure]] = {}  # by identity of what they mirror, kept here
        self._step = StepStruct()
        self._batch: Batch | None = None
        self._recorder = Recorder()
        self._rounded: Tensor | None = None  # keeps a stage's input while the kernel reads it

    @property
    def variant(self) -> str:
        return self._variant.name

    @property
    def num_threads(self) -> int:
        return self._runner.num_threads

    def close(self) -> None:
        """End the threads."""
        self._runner.close()

    def pack(
        self, weights: Sequence[Weight], *, biases: Sequence[Tensor | None], is_gated: bool = False
    ) -> NativeLinear:
        return pack_linear(weights, biases=biases, is_gated=is_gated, variant=self._variant, arena=self._arena)

    def keep(self, table: Weight) -> Weight:
        return moved(table, self._arena.place)

    def run_step(self, forward: Callable[[], Tensor], batch: Batch, cache: object) -> Tensor:
        """forward(), recorded the first time and replayed in one call from then on."""
        self._set_batch(batch)
        return self._recorder.run_step(forward, self._runner, num_tokens=len(batch.token_ids), cache=cache)

    def embed(self, token_ids: Tensor, table: Weight, *, scale: float) -> Tensor:
        if isinstance(table, QuantizedWeight):
            self._recorder.give_up()
            rows = look_up(table, token_ids).to(torch.float32)
            return rows if scale == 1.0 else rows * scale
        is_batch = self._batch is not None and token_ids is self._batch.token_ids
        stage = StageStruct(
            kind=StageKind.EMBED if is_batch else StageKind.SELECT,
            input=table.data_ptr(),
            index=token_ids.data_ptr(),
            step=pointer(self._step),
            table_type=FLOAT_TYPES[table.dtype],
            scale=scale,
        )
        return self._run(stage, rows=len(token_ids), width=table.shape[1])

    def norm_linear(self, x: Tensor, norm: Norm | None, linear: Linear) -> Tensor:
        return self._run(self._linear_stage(x, linear, norm=norm), rows=x.shape[0], width=linear.out_features)

    def gated_linear(self, x: Tensor, norm: Norm | None, linear: Linear, *, activation: Activation) -> Tensor:
        stage = self._linear_stage(x, linear, norm=norm)
        stage.gate = _GATES[activation]
        return self._run(stage, rows=x.shape[0], width=linear.out_features // 2)

    def rotate_and_store(
        self, qkv: Tensor, attention: AttentionSpec, rotary: Rotary | None, batch: Batch, cache: CacheLayer
    ) -> None:
        stage = self._attention_stage(StageKind.ROTATE, qkv, attention, rotary, batch, cache)
        self._run(stage, rows=qkv.shape[0], width=qkv.shape[1], output=qkv)

    def attend(self, qkv: Tensor, attention: AttentionSpec, batch: Batch, cache: CacheLayer) -> Tensor:
        stage = self._attention_stage(StageKind.ATTEND, qkv, attention, None, batch, cache)
        return self._run(stage, rows=qkv.shape[0], width=attention.query_size)

    def linear_add(
        self, x: Tensor, linear: Linear, residual: Tensor, *, post_norm: Norm | None = None, multiplier: float = 1.0
    ) -> Tensor:
        return self._add(self._linear_stage(x, linear), residual, post_norm, multiplier)

    def head(
        self, x: Tensor, norm: Norm | None, linear: Linear, *, scale: float = 1.0, soft_cap: float | None = None
    ) -> Tensor:
        stage = self._linear_stage(x, linear, norm=norm)
        stage.scale = scale
        stage.soft_cap = soft_cap or 0.0
        rows, width = x.shape[0], linear.out_features
        # New memory for every step's logits would cost a tenth of it; many rows are rare, and their memory is large.
        room = self._recorder.reuse(StageKind.LINEAR, rows=rows, width=width) if rows <= MAX_LOGITS else None
        return self._run(stage, rows=rows, width=width, output=room)

    def sample(self, logits: Tensor, draws: Tensor, allowed: Sequence[bytes | None] | None = None) -> Tensor:
        rows, vocabulary = logits.shape
        numbers = draws.shape[1] - len(CUTS)
        assert logits.stride(1) == 1, logits.stride()
        assert draws.is_contiguous(), draws.stride()
        assert len(draws) == rows, draws.shape
        assert all(bits is None or len(bits) * 8 >= vocabulary for bits in allowed or ()), vocabulary
        tokens = torch.empty(rows, numbers, dtype=torch.int64)
        bits = None if allowed is None else (c_char_p * rows)(*allowed)
        sampling = SamplingStruct(
            logits=logits.data_ptr(),
            draws=draws.data_ptr(),
            allowed=None if bits is None else addressof(bits),
            tokens=tokens.data_ptr(),
            rows=rows,
            numbers=numbers,
            stride=logits.stride(0),
            vocabulary=vocabulary,
        )
        self._runner.sample(sampling)
        return tokens

    def _linear_stage(self, x: Tensor, linear: Linear, *, norm: Norm | None = None) -> StageStruct:
        assert isinstance(linear, NativeLinear), type(linear)
        if linear.round_input is not None:
            self._recorder.give_up()
            x = self._rounded = linear.round_input(normalize(x, norm)).contiguous()
            norm = None
        assert x.stride(1) == 1, x.stride()
        assert x.dtype == torch.float32, x.dtype
        stage = StageStruct(
            kind=StageKind.LINEAR,
            input=x.data_ptr(),
            input_stride=x.stride(0),
            linear=pointer(linear.struct),
            scale=1.0,
        )
        self._set_norm(stage, "norm", norm)
        return stage

    def _add(self, stage: StageStruct, residual: Tensor, post_norm: Norm | None, multiplier: float) -> Tensor:
        """The residual's memory takes the result."""
        stage.residual = residual.data_ptr()
        stage.scale = multiplier
        self._set_norm(stage, "post_norm", post_norm)
        return self._run(stage, rows=residual.shape[0], width=residual.shape[1], output=residual)

    def _run(self, stage: StageStruct, *, rows: int, width: int, output: Tensor | None = None) -> Tensor:
        if output is None:
            output = self._recorder.allocate(stage.kind, rows=rows, width=width)
        assert output.stride(1) == 1, output.stride()
        stage.output = output.data_ptr()
        stage.output_stride = output.stride(0)
        stage.rows = rows
        stage.width = width
        self._runner.run(stage, 1)
        self._recorder.add(stage)
        return output

    def _attention_stage(
        self,
        kind: StageKind,
        qkv: Tensor,
        attention: AttentionSpec,
        rotary: Rotary | None,
        batch: Batch,
        cache: CacheLayer,
    ) -> StageStruct:
        assert qkv.stride(1) == 1, qkv.stride()
        self._set_batch(batch)
        return StageStruct(
            kind=kind,
            input=qkv.data_ptr(),
            input_stride=qkv.stride(0),
            attention=self._mirror((attention, rotary), self._mirror_attention),
            cache=self._mirror((cache,), _mirror_cache),
            step=pointer(self._step),
        )

    def _set_norm(self, stage: StageStruct, name: str, norm: Norm | None) -> None:
        if norm is not None:
            setattr(stage, name, self._mirror((norm,), _mirror_norm))

    def _mirror(self, originals: tuple[Any, ...], make: Callable[..., Structure]) -> Any:
        """A pointer to the structure for these objects, made once; both live as long as this."""
        key = tuple(map(id, originals))
        if key not in self._mirrors:
            self._mirrors[key] = (originals, make(*originals))
        return pointer(self._mirrors[key][1])

    def _mirror_attention(self, attention: AttentionSpec, rotary: Rotary | None) -> AttentionStruct:
        norms = {
            name: self._mirror((norm,), _mirror_norm)
            for name, norm in (("query_norm", attention.query_norm), ("key_norm", attention.key_norm))
            if norm is not None
        }
        return AttentionStruct(
            **norms,
            cos=None if rotary is None else rotary.cos.data_ptr(),
            sin=None if rotary is None else rotary.sin.data_ptr(),
            half=0 if rotary is None else rotary.cos.shape[1],
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            window=attention.sliding_window or 0,
            scale=attention.scale,
            soft_cap=attention.soft_cap or 0.0,
        )

    def _set_batch(self, batch: Batch) -> None:
        """Recorded stages point at this one structure, so a new batch is a change of its fields."""
        if batch is self._batch:
            return
        self._batch = batch
        step = self._step
        step.token_ids = batch.token_ids.data_ptr()
        step.positions = batch.positions.data_ptr()
        step.slots = batch.slots.data_ptr()
        step.query_starts = batch.query_starts.data_ptr()
        step.context_lens = batch.context_lens.data_ptr()
        step.block_tables = batch.block_tables.data_ptr()
        step.tokens = len(batch.token_ids)
        step.chunks, step.max_blocks = batch.block_tables.shape


def open_native(
    *, num_threads: int = 0, variant: str | None = None, cache: Path | None = None, progress: Progress | None = None
) -> NativeOps:
    """The kernels for this processor, compiled if they have not been; KernelsUnavailable without a compiler.

    num_threads 0 takes every core that this process may use; `variant` names one of `build.VARIANTS`.
    """
    chosen = choose_variant(variant)
    library = load_library(chosen, cache=cache, progress=progress)
    return NativeOps(Runner(library, num_threads=num_threads or count_cores()), chosen)


def pack_linear(
    weights: Sequence[Weight], *, biases: Sequence[Tensor | None], is_gated: bool, variant: Variant, arena: Arena
) -> NativeLinear:
    bias = join_biases(weights, biases)
    joined = join_weights(weights)
    is_paired = is_gated and len(joined) == 1 and joined[0].shape[0] % (2 * LANES) == 0
    if is_paired:
        joined = [moved(joined[0], _interleave)]
        bias = None if bias is None else _interleave(bias)
    round_input = _choose_rounding(joined)
    packed = tuple(
        pack_weight(weight, is_rounded=round_input is not None, empty=arena.empty).placed(arena.place)
        for weight in joined
    )
    columns = accumulate((weight.out_features for weight in packed), initial=0)
    structs = [weight.to_struct(column=column) for weight, column in zip(packed, columns, strict=False)]
    struct = LinearStruct(
        weights=(WeightStruct * len(structs))(*structs),
        bias=address(bias),
        num_weights=len(structs),
        in_features=packed[0].in_features,
        out_features=sum(weight.out_features for weight in packed),
        is_paired=is_paired,
    )
    kernel = "+".join(dict.fromkeys(f"{variant.name}-{weight.name}" for weight in packed))
    return NativeLinear(weights=packed, bias=bias, struct=struct, kernel=kernel, round_input=round_input)


def _interleave(rows: Tensor) -> Tensor:
    """The first tile of the gate's rows, the first of the others, the second of the gate's, ..."""
    bits = rows.view(torch.uint8) if rows.element_size() == 1 else rows  # torch moves no float8 numbers, but bytes
    return bits.view(2, -1, LANES, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape).view(rows.dtype)


def _choose_rounding(weights: Sequence[Weight]) -> Callable[[Tensor], Tensor] | None:
    """The input's way through its rarer quantizations, in plain torch, once for all weights that share the input."""
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if all(weight.activation in KERNEL_ACTIVATIONS for weight in quantized):
        return None
    first = quantized[0]
    if len(quantized) < len(weights) or len({(w.activation, w.pre_scale is None) for w in quantized}) > 1:
        kinds = ", ".join("float" if isinstance(w, Tensor) else w.activation.value for w in weights)
        raise UnsupportedWeight(
            f"Weights that share one input quantize it differently: {kinds}. Quantize them alike, or leave all float."
        )
    round_trip, pre_scale = ROUND_TRIPS[first.activation], first.pre_scale
    return round_trip if pre_scale is None else lambda x: round_trip(x * pre_scale)


def _mirror_norm(norm: Norm) -> NormStruct:
    return NormStruct(
        weight=norm.weight.data_ptr(),
        bias=address(norm.bias),
        eps=norm.eps,
        is_layer=norm.kind is NormKind.LAYER,
        size=norm.weight.numel(),
    )


def _mirror_cache(cache: CacheLayer) -> CacheStruct:
    parts = [part for part in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if part is not None]
    num_heads = cache.keys.shape[1]
    block_bytes = cache.keys.stride(0) * cache.keys.itemsize
    assert {part.stride(0) * part.itemsize for part in parts} == {block_bytes}
    assert num_heads == 1 or {part.stride(1) * part.itemsize * num_heads for part in parts} == {block_bytes}
    if cache.key_scales is not None:  # kernels may read codes past a head's keys, and throw away what they get
        assert cache.values.data_ptr() == cache.keys.data_ptr() + cache.keys[0, 0].numel()
    return CacheStruct(
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
        key_scales=address(cache.key_scales),
        value_scales=address(cache.value_scales),
        head_bytes=block_bytes // num_heads,
        type=CACHE_TYPES[cache.keys.dtype],
        block_size=cache.keys.shape[2],
    )
