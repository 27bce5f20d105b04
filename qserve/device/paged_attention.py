"""The attention that transformers' models call in place of their own: over our paged cache.

Knows nothing of a model but what its attention modules pass along: queries, keys, values, scale, window and soft cap.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qserve.device.kv_cache import CacheShape, make_cache
from qserve.kernels.ops import AttentionSpec, Batch, CacheLayer
from qserve.kernels.reference_attention import attend_paged, store

INTERFACE_NAME = "qserve_paged"
# Of the short text that shows the model's layers; their cache is made as they ask for it.
PROBE_TOKENS = 24
PROBE_BLOCK_SIZE = 4


def register_attention() -> None:
    """The interface is one table for the whole process; the entry has no state, each module holds its own."""
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE_NAME, _attend)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    attention: PagedAttention = module.qserve_attention
    return attention(module, query, key, value, options), None


class PagedAttention:
    """What the attention interface calls, layer after layer; holds the step that is under way.

    The first step defines the layers: each module that asks for attention is one, in the order in which they ask.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._layers: dict[int, int] = {}  # of a module's id
        self.batch: Batch | None = None
        self.layers: list[CacheLayer] = []
        self.windows: list[int | None] = []

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Any) -> Tensor:
        """query (1, heads, tokens, head_dim), key and value with kv_heads: (1, tokens, heads, value_dim)."""
        assert self.batch is not None, "attention was asked for outside of a step"
        index = self._layers.setdefault(id(module), len(self._layers))
        queries, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))  # (tokens, heads, dim)
        if index == len(self.windows):
            self.windows.append(self._window(index, options.get("sliding_window")))
        if index == len(self.layers):
            self.layers.append(self._new_layer(keys, values))
        scale = options.get("scaling")
        attention = AttentionSpec(
            num_heads=queries.shape[1],
            num_kv_heads=keys.shape[1],
            head_dim=queries.shape[2],
            scale=queries.shape[2] ** -0.5 if scale is None else float(scale),
            sliding_window=self.windows[index],
            soft_cap=options.get("softcap"),
        )
        store(keys, values, self.batch.slots, self.layers[index])
        mixed = attend_paged(queries, attention, self.batch, self.layers[index])
        return mixed.view(1, queries.shape[0], queries.shape[1], values.shape[2])

    def join(self, theirs: nn.Module) -> None:
        """Let every module of the model find its way here."""
        for module in theirs.modules():
            module.qserve_attention = self  # type: ignore[assignment]

    @property
    def shapes(self) -> tuple[CacheShape, ...]:
        return tuple(
            CacheShape(num_heads=part.keys.shape[1], head_dim=part.keys.shape[3], value_dim=part.values.shape[3])
            for part in self.layers
        )

    def _window(self, index: int, given: int | None) -> int | None:
        """What the call says; where it says nothing, what the configuration says of the layer."""
        types = getattr(self._config, "layer_types", None)
        if given is None and types and types[index] == "sliding_attention":
            return int(self._config.sliding_window)
        return given

    def _new_layer(self, keys: Tensor, values: Tensor) -> CacheLayer:
        shape = CacheShape(num_heads=keys.shape[1], head_dim=keys.shape[2], value_dim=values.shape[2])
        num_blocks = 4 * PROBE_TOKENS // PROBE_BLOCK_SIZE
        cache = make_cache(
            [shape], num_blocks=num_blocks, block_size=PROBE_BLOCK_SIZE, dtype=torch.float32, device=keys.device
        )
        return cache.layers[0]
