"""Compiled rotary embedding and paged attention against the plain formula, and against themselves in other pieces."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qserve.device.kv_cache import CacheShape, make_cache
from qserve.kernels.ops import AttentionSpec, CacheLayer, Norm, Ops, Rotary
from qserve.kernels.reference import ReferenceOps
from tests.kernels.native import VARIANTS, make_batch, open_variant, relative_error

REFERENCE = ReferenceOps(device=torch.device("cpu"))
LENGTHS = (300, 17, 150, 1)
NUM_BLOCKS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    spec: AttentionSpec
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    half: int | None = None


def attention(num_heads: int, num_kv_heads: int, head_dim: int, **changes: Any) -> AttentionSpec:
    return AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=head_dim**-0.5, **changes
    )


def norm(size: int) -> Norm:
    return Norm(weight=torch.rand(size, generator=torch.Generator().manual_seed(size)) + 0.5, eps=1e-5)


BFLOAT16, INT8 = torch.bfloat16, torch.int8
CASES = {
    "grouped": Case(spec=attention(9, 3, 64)),
    "window": Case(spec=attention(8, 1, 32, sliding_window=70), block_size=32, half=8),
    "soft-cap-and-head-norms": Case(
        spec=attention(4, 4, 80, soft_cap=30.0, query_norm=norm(80), key_norm=norm(320)), half=40
    ),
    "small-blocks": Case(spec=attention(4, 2, 16), block_size=4),
    "bfloat16-lanes": Case(spec=attention(4, 2, 80), dtype=BFLOAT16),
    "small-blocks-bfloat16": Case(spec=attention(4, 2, 20, sliding_window=5), block_size=8, dtype=BFLOAT16),
    "tiles": Case(spec=attention(9, 3, 64), dtype=BFLOAT16),
    "tiles-one-head-each": Case(spec=attention(3, 3, 128, sliding_window=33), block_size=64, dtype=BFLOAT16),
    "tiles-many-heads": Case(spec=attention(8, 1, 256), block_size=32, dtype=BFLOAT16),
    "tiles-more-heads-than-rows": Case(spec=attention(40, 2, 32, sliding_window=150), block_size=48, dtype=BFLOAT16),
    "tiles-soft-cap": Case(spec=attention(6, 2, 96, soft_cap=20.0, query_norm=norm(96)), dtype=BFLOAT16),
    "tiles-heads-of-two-turns": Case(spec=attention(21, 7, 32), dtype=BFLOAT16),  # five together, then two
    "int8": Case(spec=attention(9, 3, 64), dtype=INT8),
    "int8-heads-of-two-turns": Case(spec=attention(20, 20, 64), dtype=INT8),  # sixteen, then four
    "int8-one-head-each": Case(spec=attention(3, 3, 128, sliding_window=33), block_size=64, dtype=INT8),
    "int8-many-heads": Case(spec=attention(8, 1, 256), block_size=32, dtype=INT8),
    "int8-more-heads-than-rows": Case(spec=attention(40, 2, 32, sliding_window=150), block_size=48, dtype=INT8),
    "int8-soft-cap-and-head-norms": Case(
        spec=attention(4, 4, 80, soft_cap=30.0, query_norm=norm(80), key_norm=norm(320)), dtype=INT8, half=40
    ),
    "int8-small-heads": Case(spec=attention(6, 2, 20), dtype=INT8),
    "int8-odd-heads": Case(spec=attention(4, 2, 10), dtype=INT8),
    "int8-small-blocks": Case(spec=attention(4, 2, 36, sliding_window=5), block_size=8, dtype=INT8),
}


def make_layer(case: Case, *, fill: float) -> CacheLayer:
    """Filled with what a former owner left: codes are always numbers, their scales need not be."""
    cache = make_cache(
        [CacheShape(num_heads=case.spec.num_kv_heads, head_dim=case.spec.head_dim)],
        num_blocks=NUM_BLOCKS,
        block_size=case.block_size,
        dtype=case.dtype,
        device=torch.device("cpu"),
    )
    layer = cache.layers[0]
    for part in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
        if part is not None:
            part.fill_(fill if part.is_floating_point() else -77)
    return layer


class Run:
    """Sequences of one case over one cache, computed in any chunks."""

    def __init__(self, case: Case, ops: Ops, *, fill: float) -> None:
        generator = torch.Generator().manual_seed(3)
        spec = case.spec
        self._case, self._ops = case, ops
        self._cache = make_layer(case, fill=fill)
        width = spec.query_size + 2 * spec.key_size
        self._rows = [torch.randn(length, width, generator=generator) for length in LENGTHS]
        angles = torch.rand(max(LENGTHS), case.half or spec.head_dim // 2, generator=generator) * 6
        self._rotary = Rotary(cos=angles.cos(), sin=angles.sin())
        free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
        self._tables = [[free.pop() for _ in range(-(-length // case.block_size))] for length in LENGTHS]

    def __call__(self, steps: list[list[tuple[int, int, int]]]) -> list[Tensor]:
        """A step is (sequence, start, end) for each of its chunks."""
        outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
        for step in steps:
            batch = make_batch(
                [(start, end) for _, start, end in step],
                [self._tables[sequence] for sequence, _, _ in step],
                self._case.block_size,
            )
            qkv = torch.cat([self._rows[sequence][start:end] for sequence, start, end in step])
            self._ops.rotate_and_store(qkv, self._case.spec, self._rotary, batch, self._cache)
            mixed = self._ops.attend(qkv, self._case.spec, batch, self._cache)
            for (sequence, _, _), rows in zip(step, mixed.split(batch.chunk_tokens), strict=True):
                outputs[sequence].append(rows)
        return [torch.cat(rows) for rows in outputs if rows]


# AMX rounds weights and queries to twice eight bits; with codes so do all, and to a whole number of the largest.
MOST_ERRORS = {torch.float32: 2e-6, BFLOAT16: 1e-5, INT8: 1e-4}
WHOLE = [[(sequence, 0, length) for sequence, length in enumerate(LENGTHS)]]


def random_steps(seed: int) -> list[list[tuple[int, int, int]]]:
    chooser = random.Random(seed)
    done = [0] * len(LENGTHS)
    steps = []
    while any(count < length for count, length in zip(done, LENGTHS, strict=True)):
        step = []
        for sequence, length in enumerate(LENGTHS):
            if done[sequence] < length:
                size = min(chooser.choice([1, 1, 2, 5, 30, 64]), length - done[sequence])
                step.append((sequence, done[sequence], done[sequence] + size))
                done[sequence] += size
        steps.append(step)
    return steps


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_the_formula_and_the_same_bits_in_any_chunks(variant: str, name: str) -> None:
    case = CASES[name]
    ops = open_variant(variant)
    most = MOST_ERRORS[case.dtype]
    expected = Run(case, REFERENCE, fill=0.0)(WHOLE)
    whole = Run(case, ops, fill=float("nan"))(WHOLE)  # what was never written is never used
    for found, wanted in zip(whole, expected, strict=True):
        assert relative_error(found, wanted) < most
    for threads, seed in ((2, 0), (1, 1)):
        chunked = Run(case, open_variant(variant, threads), fill=float("nan"))(random_steps(seed))
        assert all(torch.equal(found, wanted) for found, wanted in zip(chunked, whole, strict=True))


def test_without_rotary_nothing_turns() -> None:
    case = CASES["grouped"]
    batch = make_batch([(0, 5)], [[0]], 16)
    qkv = torch.randn(5, case.spec.query_size + 2 * case.spec.key_size)
    cache = CacheLayer(keys=torch.zeros(1, 3, 16, 64), values=torch.zeros(1, 3, 16, 64))
    before = qkv.clone()
    open_variant(VARIANTS[0]).rotate_and_store(qkv, case.spec, None, batch, cache)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, INT8])
def test_a_lone_row_and_a_crowd_have_the_same_bits(dtype: torch.dtype) -> None:
    """A long context is split by parts and heads for a lone row, by neither in a crowd."""
    case = Case(spec=attention(6, 2, 64), dtype=dtype)
    last = LENGTHS[0] - 1
    ops, prompt = open_variant(VARIANTS[0]), [(0, 0, last)]
    alone = Run(case, ops, fill=float("nan"))([prompt, [(0, last, last + 1)]])[0]
    crowded = Run(case, ops, fill=float("nan"))([prompt, [(0, last, last + 1)] * 40])[0]
    assert all(torch.equal(row, alone[last]) for row in crowded[last:])


def test_numbers_that_no_row_may_see_change_nothing() -> None:
    """What a block's former owner left behind, however odd."""
    for dtype in (torch.float32, BFLOAT16, INT8):
        case = Case(spec=attention(6, 2, 64), dtype=dtype)
        runs = [
            Run(case, open_variant(VARIANTS[0]), fill=fill)(WHOLE) for fill in (0.0, float("nan"), float("-inf"), 3e38)
        ]
        assert all(torch.equal(found, wanted) for run in runs[1:] for found, wanted in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_are_those_of_plain_torch(variant: str) -> None:
    """Told by a head of one block whose keys are one-hot: what attention gives back is the value's code times scale."""
    for head_dim, block_size in ((64, 16), (20, 16), (10, 4)):
        case = Case(spec=attention(2, 2, head_dim), block_size=block_size, dtype=INT8)
        layer, plain = make_layer(case, fill=0.0), make_layer(case, fill=0.0)
        qkv = torch.randn(48, 6 * head_dim, generator=torch.Generator().manual_seed(head_dim)) * 1e3
        qkv[3], qkv[4, ::2], qkv[5] = 0, 0, 1e-33
        qkv[6, :head_dim] = torch.arange(head_dim) - 0.5  # ties
        batch = make_batch([(0, 48)], [list(range(-(-48 // block_size)))], block_size)
        open_variant(variant).rotate_and_store(qkv, case.spec, None, batch, layer)
        REFERENCE.rotate_and_store(qkv, case.spec, None, batch, plain)
        for found, expected in ((layer.key_scales, plain.key_scales), (layer.value_scales, plain.value_scales)):
            assert found is not None
            assert expected is not None
            assert torch.equal(found, expected)
        whole = head_dim % 4 == 0 and block_size % 16 == 0
        keys, values = plain.keys, plain.values
        blocks, heads = keys.shape[:2]
        if whole:
            keys = keys.unflatten(3, (-1, 4)).transpose(2, 3)  # (blocks, heads, head_dim / 4, block_size, 4)
            values = values.unflatten(2, (-1, 4)).transpose(3, 4)  # (blocks, heads, block_size / 4, head_dim, 4)
        else:
            keys = keys.transpose(2, 3)
        assert torch.equal(layer.keys.flatten(2), keys.reshape(blocks, heads, -1))
        assert torch.equal(layer.values.flatten(2), values.reshape(blocks, heads, -1))
