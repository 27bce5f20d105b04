"""One decoder-only transformer, driven by an ArchitectureSpec and made of the kernels' stages.

Knows no request and no file format. Weights are taken one layer at a time, by each core one, and packed at once, so
that memory never holds more than what is packed and a layer for each core beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qserve.device.architectures import ArchitectureSpec, LayerSpec
from qserve.device.kv_cache import CacheShape, KVCache
from qserve.device.rotary import make_rotary
from qserve.device.weights import NamedWeights
from qserve.errors import BrokenCheckpoint
from qserve.kernels.linear import Linear
from qserve.kernels.ops import AttentionSpec, Batch, Norm, Ops, Rotary
from qserve.kernels.reference import normalize
from qserve.quant.weight import QuantizedWeight, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The packed weights of one layer; a norm that is None is not there."""

    attention: AttentionSpec
    rotary: Rotary | None
    attention_norm: Norm | None
    qkv: Linear
    out: Linear
    attention_post_norm: Norm | None
    feed_forward_norm: Norm | None
    gate_up: Linear
    down: Linear
    feed_forward_post_norm: Norm | None


class Decoder:
    """Token ids and a cache in, hidden states and logits out."""

    def __init__(
        self,
        spec: ArchitectureSpec,
        ops: Ops,
        *,
        embedding: Weight,
        layers: Sequence[Layer],
        final_norm: Norm,
        head: Linear,
    ) -> None:
        self._spec = spec
        self._ops = ops
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._head = head

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

    @property
    def cache_shapes(self) -> tuple[CacheShape, ...]:
        attentions = [layer.attention for layer in self._layers]
        return tuple(CacheShape(num_heads=spec.num_kv_heads, head_dim=spec.head_dim) for spec in attentions)

    @property
    def num_bytes(self) -> int:
        linears = [linear for layer in self._layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return sum(linear.num_bytes for linear in (*linears, self._head)) + _num_bytes(self._embedding)

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states after the last layer, before its norm: (tokens, hidden_size) float32, until the next step."""
        return self._ops.run_step(lambda: self._run_layers(batch, cache), batch, cache)

    def _run_layers(self, batch: Batch, cache: KVCache) -> Tensor:
        ops, spec = self._ops, self._spec
        multiplier = spec.residual_multiplier
        x = ops.embed(batch.token_ids, self._embedding, scale=spec.embedding_scale)
        for layer, kept in zip(self._layers, cache.layers, strict=True):
            qkv = ops.norm_linear(x, layer.attention_norm, layer.qkv)
            ops.rotate_and_store(qkv, layer.attention, layer.rotary, batch, kept)
            mixed = ops.attend(qkv, layer.attention, batch, kept)
            x = ops.linear_add(mixed, layer.out, x, post_norm=layer.attention_post_norm, multiplier=multiplier)
            gated = ops.gated_linear(x, layer.feed_forward_norm, layer.gate_up, activation=spec.activation)
            x = ops.linear_add(gated, layer.down, x, post_norm=layer.feed_forward_post_norm, multiplier=multiplier)
        return x

    def finish(self, hidden: Tensor) -> Tensor:
        """The last norm, in plain torch: few rows ever need it alone."""
        return normalize(hidden, self._final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the rows of hidden states that are given: (rows, vocab_size) float32, until the next call."""
        spec = self._spec
        return self._ops.head(
            hidden, self._final_norm, self._head, scale=spec.logits_scale, soft_cap=spec.logits_soft_cap
        )


def load_decoder(
    spec: ArchitectureSpec,
    weights: Mapping[str, Weight],
    *,
    ops: Ops,
    device: torch.device,
    max_positions: int,
) -> Decoder:
    """Take the weights in, layer by layer; BrokenCheckpoint where one is missing, left over or of another shape."""
    return _Loader(spec, NamedWeights(weights), ops=ops, device=device, max_positions=max_positions).load()


@contextmanager
def _each_core() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses, in each of which it uses one.

    Packing is thousands of small operations. Shared out one by one among threads that wait for each other spinning,
    they took 20 times as long wherever another process had a core.
    """
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


class _Loader:
    def __init__(
        self, spec: ArchitectureSpec, weights: NamedWeights, *, ops: Ops, device: torch.device, max_positions: int
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._ops = ops
        self._device = device
        self._rotaries = {
            name: make_rotary(rotary, max_positions=max_positions, device=device)
            for name, rotary in spec.rotaries.items()
        }

    def load(self) -> Decoder:
        with _each_core() as pool:
            ends = pool.submit(self._ends)  # the longest first
            layers = list(pool.map(self._layer, range(len(self._spec.layers)), self._spec.layers))
            embedding, head = ends.result()
        self._weights.check_layers()
        return Decoder(
            self._spec,
            self._ops,
            embedding=embedding,
            layers=layers,
            final_norm=self._norm(f"{self._weights.prefix}norm", self._spec.hidden_size),
            head=head,
        )

    def _layer(self, index: int, layer: LayerSpec) -> Layer:
        spec, family, attention = self._spec, self._spec.family, layer.attention
        start = f"{self._weights.prefix}layers.{index}."
        hidden, inner, query_size, key_size = (
            spec.hidden_size,
            spec.intermediate_size,
            attention.query_size,
            attention.key_size,
        )
        sizes = [query_size, key_size, key_size] if len(family.qkv) == 3 else [query_size + 2 * key_size]
        gate_up_sizes = [2 * inner // len(family.gate_up)] * len(family.gate_up)
        return Layer(
            attention=self._with_head_norms(attention, f"{start}self_attn."),
            rotary=None if layer.rotary is None else self._rotaries[layer.rotary],
            attention_norm=self._optional_norm(start, family.attention_norm),
            qkv=self._linear(f"{start}self_attn.", family.qkv, sizes, hidden),
            out=self._linear(f"{start}self_attn.", ("o_proj",), [hidden], query_size),
            attention_post_norm=self._optional_norm(start, family.attention_post_norm),
            feed_forward_norm=self._optional_norm(start, family.feed_forward_norm),
            gate_up=self._linear(f"{start}mlp.", family.gate_up, gate_up_sizes, hidden, is_gated=True),
            down=self._linear(f"{start}mlp.", ("down_proj",), [hidden], inner),
            feed_forward_post_norm=self._optional_norm(start, family.feed_forward_post_norm),
        )

    def _linear(
        self, start: str, names: Sequence[str], sizes: Sequence[int], in_features: int, *, is_gated: bool = False
    ) -> Linear:
        rows = list(zip(names, sizes, strict=True))
        weights = [self._weights.weight(f"{start}{name}.weight", (size, in_features)) for name, size in rows]
        biases = [self._bias(start, name, size) for name, size in rows]
        return self._ops.pack(weights, biases=biases, is_gated=is_gated)

    def _bias(self, start: str, name: str, size: int) -> Tensor | None:
        if name not in self._spec.biased:
            return None
        return self._weights.vector(f"{start}{name}.bias", size, device=self._device)

    def _norm(self, name: str, size: int) -> Norm:
        weight = self._weights.vector(f"{name}.weight", size, device=self._device)
        return Norm(weight=weight + self._spec.family.norm_offset, eps=self._spec.norm_eps)

    def _optional_norm(self, start: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(f"{start}{name}", self._spec.hidden_size)

    def _with_head_norms(self, attention: AttentionSpec, start: str) -> AttentionSpec:
        kind = self._spec.family.head_norms
        if kind is None:
            return attention
        is_each = kind == "each"
        return replace(
            attention,
            query_norm=self._norm(f"{start}q_norm", attention.head_dim if is_each else attention.query_size),
            key_norm=self._norm(f"{start}k_norm", attention.head_dim if is_each else attention.key_size),
        )

    def _ends(self) -> tuple[Weight, Linear]:
        """Embedding and head; where they are tied, the one that is there is both."""
        embedding_name, head_name = self._weights.embedding_name, self._weights.head_name
        shape = (self._spec.vocab_size, self._spec.hidden_size)
        if (embedding_name is None or head_name is None) and not self._spec.is_tied:
            missing = f"{self._weights.prefix}embed_tokens.weight" if embedding_name is None else "lm_head.weight"
            raise BrokenCheckpoint(
                f"{missing} is missing, and config.json does not tie embedding and head (tie_word_embeddings is false)."
                " Download the checkpoint again, whole."
            )
        default = f"{self._weights.prefix}embed_tokens.weight"
        embedding = self._weights.weight(embedding_name or head_name or default, shape)
        head = self._weights.weight(head_name or embedding_name or default, shape)
        return self._ops.keep(embedding), self._ops.pack([head], biases=[None])


def _num_bytes(weight: Weight) -> int:
    if isinstance(weight, QuantizedWeight):
        parts = (weight.codes, weight.scales, weight.zero_points, weight.offsets)
        return sum(part.nbytes for part in parts if part is not None)
    return weight.nbytes
