"""The cache's layers: zero, of the shapes asked for, and nobody's memory is another's."""

import torch

from qserve.device.kv_cache import CacheShape, block_bytes, make_cache

SHAPES = (CacheShape(num_heads=3, head_dim=64), CacheShape(num_heads=1, head_dim=5, value_dim=7))


def test_layers_are_zero_and_apart() -> None:
    cache = make_cache(SHAPES, num_blocks=6, block_size=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    assert [tuple(part.shape) for part in parts] == [(6, 3, 4, 64), (6, 3, 4, 64), (6, 1, 4, 5), (6, 1, 4, 7)]
    assert cache.num_bytes == 6 * block_bytes(SHAPES, block_size=4, dtype=torch.bfloat16)
    for number, part in enumerate(parts):
        assert part.is_contiguous()
        assert not part.any()
        part.fill_(number + 1)
    assert all((part == number + 1).all() for number, part in enumerate(parts))
