"""The seam between the decoder and its kernels: the stages of a layer as a Protocol, and the data that they share.

Knows no model, no request and no file. `reference.py` is the plain torch twin of every stage and the oracle of the
others; the decoder calls only what stands here.

Between two stages everything is float32, contiguous, (tokens, features). A layer is six calls:

    qkv = norm_linear(x, input_norm, qkv_linear)                queries, keys, values side by side
    rotate_and_store(qkv, attention, rotary, batch, cache)      in place; writes keys and values into the cache
    a = attend(qkv, attention, batch, cache)
    x = linear_add(a, out_linear, x, ...)
    gated = gated_linear(x, post_norm, gate_up_linear, ...)     activation(gate) * up
    x = linear_add(gated, down_linear, x, ...)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from qserve.kernels.linear import Linear
from qserve.quant.weight import Weight

CUTS = ("temperature", "top_k", "top_p", "min_p")
LEAST_TEMPERATURE = 1e-30  # a lower one is taken for it: logits are divided by it


class NormKind(StrEnum):
    """RMS divides by the root of the mean square; LAYER takes the mean away first."""

    RMS = "rms"
    LAYER = "layer"


class Activation(StrEnum):
    """What is applied to the gate."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu-tanh"
    RELU = "relu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """y = normalized(x) * weight + bias, in float32. Gemma's (1 + weight) is added when the weight is read."""

    weight: Tensor  # (features,), float32
    bias: Tensor | None = None  # (features,), float32
    eps: float
    kind: NormKind = NormKind.RMS


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One layer's attention. Columns of qkv: num_heads * head_dim queries, num_kv_heads * head_dim keys, then values.

    A query at position i sees keys at positions j with i - sliding_window < j <= i. A score is q.k * scale, then
    soft_cap * tanh(score / soft_cap). A query or key norm whose weight is head_dim long is taken over each head alone,
    a longer one over all heads together.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Cosines and sines by position, any attention factor multiplied in. Column i turns the pair (i, i + half).

    Only the first 2 * half columns of a head turn; the others pass.
    """

    cos: Tensor  # (positions, half), float32
    sin: Tensor  # (positions, half), float32


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayer:
    """One layer's keys and values. Slot s is position s % block_size of block s // block_size.

    Keys and values are float32 or bfloat16, or int8 codes, which times a scale stand for one head of a position.

    Kernels may lay out the keys and the values of a block and head as they like (`csrc/cache_layout.h`): only their
    size is sure to be what the shape says. From one block and head to the next is as far in all the tensors.
    """

    keys: Tensor  # (num_blocks, num_kv_heads, block_size, head_dim)
    values: Tensor  # the same
    key_scales: Tensor | None = None  # (num_blocks, num_kv_heads, block_size), float32
    value_scales: Tensor | None = None  # the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The chunks of one step as flat tensors: chunk c has the rows [query_starts[c], query_starts[c + 1]).

    Its tokens are the last of context_lens[c] tokens, all of which stand in the blocks of block_tables[c] once
    `rotate_and_store` has run. A table is as wide as the longest or wider; past a chunk's own blocks it is 0, unread.
    """

    token_ids: Tensor  # (tokens,), int64
    positions: Tensor  # (tokens,), int64
    slots: Tensor  # (tokens,), int64
    query_starts: Tensor  # (chunks + 1,), int32
    context_lens: Tensor  # (chunks,), int32
    block_tables: Tensor  # (chunks, max_blocks), int32
    sample_rows: Tensor  # (samples,), int64: the rows whose logits are wanted
    # The same two as plain numbers, so that nobody waits for a device to read them.
    chunk_tokens: tuple[int, ...]
    chunk_ends: tuple[int, ...]


class Ops(Protocol):
    """The stages. No stage may let a row's result depend on the rows beside it."""

    def run_step(self, forward: Callable[[], Tensor], batch: Batch, cache: object) -> Tensor:
        """forward(), which calls nothing but stages and takes nothing from outside that changes but the batch.

        Kernels may record its stages and replay them for a batch of as many tokens and the same cache; then a stage's
        result stands only until the next stage of its kind and width, and the step's until the next step.
        """

    def pack(self, weights: Sequence[Weight], *, biases: Sequence[Tensor | None], is_gated: bool = False) -> Linear:
        """Lay out weights that share one input, their outputs side by side; each weight has its bias or None.

        What is_gated is for `gated_linear` alone. Several threads may pack at once.
        """

    def keep(self, table: Weight) -> Weight:
        """The table where `embed` reads it: on the device, and for kernels in memory that belongs to no file."""

    def embed(self, token_ids: Tensor, table: Weight, *, scale: float) -> Tensor:
        """Rows of the table times scale: (tokens, hidden)."""

    def norm_linear(self, x: Tensor, norm: Norm | None, linear: Linear) -> Tensor:
        """linear(norm(x)): (tokens, out_features)."""

    def gated_linear(self, x: Tensor, norm: Norm | None, linear: Linear, *, activation: Activation) -> Tensor:
        """activation(gate) * up, halves of linear(norm(x)), the gate on the left: (tokens, out_features / 2)."""

    def rotate_and_store(
        self, qkv: Tensor, attention: AttentionSpec, rotary: Rotary | None, batch: Batch, cache: CacheLayer
    ) -> None:
        """Normalize and turn queries and keys in place; write keys and values into their slots."""

    def attend(self, qkv: Tensor, attention: AttentionSpec, batch: Batch, cache: CacheLayer) -> Tensor:
        """Causal attention of each row over its own chunk's cache: (tokens, num_heads * head_dim)."""

    def linear_add(
        self, x: Tensor, linear: Linear, residual: Tensor, *, post_norm: Norm | None = None, multiplier: float = 1.0
    ) -> Tensor:
        """residual + multiplier * post_norm(linear(x)); the residual is left as it is or reused, never read again."""

    def head(
        self, x: Tensor, norm: Norm | None, linear: Linear, *, scale: float = 1.0, soft_cap: float | None = None
    ) -> Tensor:
        """Logits, scaled and then capped: (rows, vocabulary) float32, until the next call."""

    def sample(self, logits: Tensor, draws: Tensor, allowed: Sequence[bytes | None] | None = None) -> Tensor:
        """Tokens that may come next, of each row of logits, as many as it has numbers: (rows, numbers) int64.

        Where the temperature is 0, the likeliest, of equals the first. Elsewhere each number, in [0, 1), is put through
        the cumulative distribution, in the order of the vocabulary, of what is left of softmax(logits / temperature) by
        top-k, then top-p, a share of what top-k left, then min-p. What is not a number is never chosen, nor what is not
        allowed, which is gone before all else; -1 where nothing is left.

        Args:
            logits: (rows, vocabulary) float32.
            draws: (rows, 4 + numbers) float64 on the CPU, columns as `CUTS` names them, then the numbers; top_k 0,
                top_p 1 and min_p 0 cut nothing.
            allowed: for each row one bit a token, the lowest bit of the first byte for token 0; None allows all.
        """
