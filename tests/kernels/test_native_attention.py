"""Compiled rotary embedding and paged attention against the plain formula, and against themselves in other pieces."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

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


BFLOAT16 = torch.bfloat16
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
}


class Run:
    """Sequences of one case over one cache, computed in any chunks."""

    def __init__(self, case: Case, ops: Ops, *, fill: float) -> None:
        generator = torch.Generator().manual_seed(3)
        spec, shape = case.spec, (NUM_BLOCKS, case.spec.num_kv_heads, case.block_size, case.spec.head_dim)
        self._case, self._ops = case, ops
        self._cache = CacheLayer(
            keys=torch.full(shape, fill, dtype=case.dtype), values=torch.full(shape, fill, dtype=case.dtype)
        )
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
    most = 1e-5 if case.dtype is BFLOAT16 else 2e-6  # AMX rounds weights and queries to twice eight bits
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


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
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
    for dtype in (torch.float32, BFLOAT16):
        case = Case(spec=attention(6, 2, 64), dtype=dtype)
        runs = [
            Run(case, open_variant(VARIANTS[0]), fill=fill)(WHOLE) for fill in (0.0, float("nan"), float("-inf"), 3e38)
        ]
        assert all(torch.equal(found, wanted) for run in runs[1:] for found, wanted in zip(run, runs[0], strict=True))
