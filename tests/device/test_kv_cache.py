"""The cache's layers: zero, of the shapes asked for, and nobody's memory is another's."""

import pytest
import torch

from qserve.device.kv_cache import CacheShape, block_bytes, make_cache

CPU = torch.device("cpu")
SHAPES = (CacheShape(num_heads=3, head_dim=64), CacheShape(num_heads=1, head_dim=5, value_dim=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_layers_are_zero_and_apart(dtype: torch.dtype) -> None:
    cache = make_cache(SHAPES, num_blocks=6, block_size=4, dtype=dtype, device=CPU)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    assert [tuple(part.shape) for pair in pairs for part in pair] == [
        *((6, 3, 4, 64), (6, 3, 4, 64)),
        *((6, 1, 4, 5), (6, 1, 4, 7)),
    ]
    scales = [part for layer in cache.layers for part in (layer.key_scales, layer.value_scales) if part is not None]
    assert [tuple(part.shape) for part in scales] == ([(6, 3, 4)] * 2 + [(6, 1, 4)] * 2 if dtype is torch.int8 else [])
    assert cache.num_bytes == 6 * block_bytes(SHAPES, block_size=4, dtype=dtype)
    parts = [*(part for pair in pairs for part in pair), *scales]
    for number, part in enumerate(parts):
        assert not part.any()
        part.fill_(number + 1)
    assert all((part == number + 1).all() for number, part in enumerate(parts))


def test_codes_take_little_more_than_half_of_bfloat16() -> None:
    sizes = [block_bytes(SHAPES[:1], block_size=16, dtype=dtype) for dtype in (torch.bfloat16, torch.int8)]
    assert sizes == [3 * 16 * 2 * 64 * 2, 3 * 16 * 2 * (64 + 4)]
