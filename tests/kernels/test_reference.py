"""The torch stages against formulas written out row by row."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qserve.device.batch import make_batch
from qserve.engine.request import Chunk, Request, SamplingParams
from qserve.kernels.linear import join_biases, join_weights
from qserve.kernels.ops import Activation, AttentionSpec, Batch, CacheLayer, Norm, NormKind, Rotary
from qserve.kernels.reference import ReferenceOps, normalize
from qserve.kernels.reference_attention import quantize_heads
from qserve.quant.weight import QuantizedWeight

CPU = torch.device("cpu")
OPS = ReferenceOps(device=CPU)
BLOCK_SIZE, NUM_BLOCKS = 4, 64
ATTENTION = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=6, scale=0.4)


def _batch() -> Batch:
    """A long prompt's second chunk, two decode rows of very different length, and a whole short prompt."""
    spans = [(9, 23), (1, 2), (40, 41), (0, 5)]
    chunks = [
        Chunk(
            request=Request(str(i), [1] * end, SamplingParams(max_tokens=1)),
            start=start,
            end=end,
            block_ids=tuple(range(i, NUM_BLOCKS, 4)),
        )
        for i, (start, end) in enumerate(spans)
    ]
    return make_batch(chunks, block_size=BLOCK_SIZE, device=CPU)


def _cache(dtype: torch.dtype = torch.float32, value_dim: int = 6) -> CacheLayer:
    torch.manual_seed(2)
    return CacheLayer(
        keys=torch.randn(NUM_BLOCKS, 2, BLOCK_SIZE, 6).to(dtype),
        values=torch.randn(NUM_BLOCKS, 2, BLOCK_SIZE, value_dim).to(dtype),
    )


def _attend_row(query: Tensor, position: int, table: Tensor, attention: AttentionSpec, cache: CacheLayer) -> Tensor:
    """One row, head by head and key by key, in float64."""
    outputs = []
    first = 0 if attention.sliding_window is None else max(0, position - attention.sliding_window + 1)
    for head in range(attention.num_heads):
        shared = head // (attention.num_heads // attention.num_kv_heads)
        places = [(int(table[p // BLOCK_SIZE]), shared, p % BLOCK_SIZE) for p in range(first, position + 1)]
        scores = [float(query[head].double() @ cache.keys[place].double()) * attention.scale for place in places]
        if attention.soft_cap is not None:
            scores = [attention.soft_cap * math.tanh(score / attention.soft_cap) for score in scores]
        shares = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0)
        outputs.append(sum(share * cache.values[place].double() for share, place in zip(shares, places, strict=True)))
    return torch.cat([torch.as_tensor(output) for output in outputs])


def test_heads_as_codes() -> None:
    heads = torch.randn(50, 3, 20) * torch.rand(50, 3, 1) * 100
    heads[0, 0], heads[1, 1, :4] = 0, torch.tensor([-127.0, 0.5, 1.5, 126.5])
    heads[1, 1, 4:] = 0
    codes, scales = quantize_heads(heads)
    assert codes[0, 0].tolist() == [0] * 20
    assert codes[1, 1, :4].tolist() == [-127, 0, 2, 126]  # ties to even
    assert (heads - codes * scales.unsqueeze(-1)).abs().amax(-1).le(scales * 0.50001).all()
    assert codes[2:].abs().amax(-1).eq(127).all()


def test_attention_over_codes_is_that_over_what_they_stand_for() -> None:
    batch, plain = _batch(), _cache()
    (key_codes, key_scales), (value_codes, value_scales) = (
        quantize_heads(part.flatten(1, 2)) for part in (plain.keys, plain.values)
    )
    codes = CacheLayer(
        keys=key_codes.view(plain.keys.shape),
        values=value_codes.view(plain.values.shape),
        key_scales=key_scales.view(plain.keys.shape[:3]),
        value_scales=value_scales.view(plain.values.shape[:3]),
    )
    rounded = CacheLayer(
        keys=(key_codes * key_scales.unsqueeze(-1)).view(plain.keys.shape),
        values=(value_codes * value_scales.unsqueeze(-1)).view(plain.values.shape),
    )
    qkv = torch.randn(len(batch.token_ids), (4 + 2 + 2) * 6)
    assert torch.equal(OPS.attend(qkv, ATTENTION, batch, codes), OPS.attend(qkv, ATTENTION, batch, rounded))


@pytest.mark.parametrize(
    "attention",
    [
        ATTENTION,
        replace(ATTENTION, sliding_window=7),
        replace(ATTENTION, soft_cap=0.8),
        replace(ATTENTION, sliding_window=1, soft_cap=2.0),
    ],
)
@pytest.mark.parametrize(("dtype", "value_dim"), [(torch.float32, 6), (torch.bfloat16, 6), (torch.float32, 3)])
def test_attention(attention: AttentionSpec, dtype: torch.dtype, value_dim: int) -> None:
    batch, cache = _batch(), _cache(dtype, value_dim)
    qkv = torch.randn(len(batch.token_ids), (4 + 2 + 2) * 6)
    found = OPS.attend(qkv, attention, batch, cache)
    rows = [chunk for chunk, count in enumerate(batch.chunk_tokens) for _ in range(count)]
    for row, chunk in enumerate(rows):
        query = qkv[row, : 4 * 6].view(4, 6)
        expected = _attend_row(query, int(batch.positions[row]), batch.block_tables[chunk], attention, cache)
        torch.testing.assert_close(found[row], expected.float(), atol=1e-5, rtol=1e-5)


def test_rotate_and_store() -> None:
    batch, cache = _batch(), _cache()
    head_norm = Norm(weight=torch.rand(6) + 0.5, eps=1e-6)
    wide_norm = Norm(weight=torch.rand(12) + 0.5, eps=1e-6)
    attention = replace(ATTENTION, query_norm=head_norm, key_norm=wide_norm)
    rotary = Rotary(cos=torch.randn(50, 2), sin=torch.randn(50, 2))  # four of six columns turn
    before = torch.randn(len(batch.token_ids), 8 * 6)
    qkv = before.clone()
    OPS.rotate_and_store(qkv, attention, rotary, batch, cache)
    for row, position in enumerate(batch.positions.tolist()):
        queries = torch.stack([normalize(head, head_norm) for head in before[row, :24].view(4, 6)])
        keys = normalize(before[row, 24:36], wide_norm).view(2, 6)
        slot = int(batch.slots[row])
        for found, heads in (
            (qkv[row, :24].view(4, 6), queries),
            (cache.keys[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE], keys),
        ):
            expected = heads.clone()
            for pair in range(2):
                cos, sin = rotary.cos[position, pair], rotary.sin[position, pair]
                expected[:, pair] = heads[:, pair] * cos - heads[:, pair + 2] * sin
                expected[:, pair + 2] = heads[:, pair + 2] * cos + heads[:, pair] * sin
            torch.testing.assert_close(found, expected)
        values = cache.values[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE]
        assert torch.equal(values, before[row, 36:].view(2, 6))


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 8)])
def test_norms(bias: Tensor | None) -> None:
    x, weight = torch.randn(3, 8) + 1, torch.rand(8)
    added = 0 if bias is None else bias
    rms = Norm(weight=weight, bias=bias, eps=1e-3)
    torch.testing.assert_close(normalize(x, rms), x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight + added)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    torch.testing.assert_close(
        normalize(x, replace(rms, kind=NormKind.LAYER)), centred / (variance + 1e-3).sqrt() * weight + added
    )
    assert normalize(x, None) is x


def test_what_is_added_to_the_residual() -> None:
    norm = Norm(weight=torch.rand(5), eps=1e-6)
    weight, bias, residual = torch.randn(5, 4), torch.randn(5), torch.randn(3, 5)
    linear = OPS.pack([weight], biases=[bias])
    x = torch.randn(3, 4)
    expected = residual + 0.5 * normalize(x @ weight.T + bias, norm)
    torch.testing.assert_close(OPS.linear_add(x, linear, residual, post_norm=norm, multiplier=0.5), expected)


def test_gates_stand_left_of_what_they_open() -> None:
    gate, up, x = torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 4)
    linear = OPS.pack([gate, up], biases=[None, None], is_gated=True)
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(OPS.gated_linear(x, None, linear, activation=Activation.SILU), expected)


def test_head_and_embedding() -> None:
    weight, x = torch.randn(9, 4), torch.randn(2, 4)
    logits = OPS.head(x, None, OPS.pack([weight], biases=[None]), scale=0.5, soft_cap=2.0)
    torch.testing.assert_close(logits, 2.0 * torch.tanh((x @ weight.T) * 0.5 / 2.0))
    codes = torch.randint(-8, 8, (9, 4), dtype=torch.int8)
    table = QuantizedWeight(codes=codes, scales=torch.rand(9, 2), group_size=2, bits=4, dtype=torch.bfloat16)
    ids = torch.tensor([3, 8, 3])
    assert torch.equal(OPS.embed(ids, table, scale=3.0), table.dequantize()[ids].float() * 3.0)


def test_neighbours_join_only_where_nothing_differs() -> None:
    def weight(**changes: object) -> QuantizedWeight:
        plain = QuantizedWeight(
            codes=torch.ones(3, 4, dtype=torch.int8), scales=torch.ones(3, 2), group_size=2, bits=4, dtype=torch.float32
        )
        return replace(plain, **changes)  # type: ignore[arg-type]

    assert [part.shape[0] for part in join_weights([weight(), weight(), weight()])] == [9]
    for other in (
        weight(bits=8),
        weight(pre_scale=torch.ones(4)),
        weight(zero_points=torch.zeros(3, 2, dtype=torch.int8)),
        weight(scales=torch.ones(3, 2, dtype=torch.bfloat16)),
        torch.ones(3, 4),
    ):
        assert [part.shape[0] for part in join_weights([weight(), other, weight()])] == [3, 3, 3]
    assert [part.shape[0] for part in join_weights([torch.ones(3, 4), torch.ones(2, 4)])] == [5]
    biases = join_biases([torch.ones(3, 4), torch.ones(2, 4)], [None, torch.tensor([1.0, 2.0])])
    assert biases is not None
    assert biases.tolist() == [0, 0, 0, 1, 2]
