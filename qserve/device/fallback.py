"""Any other causal LM of transformers, over our cache and our linears.

transformers builds the model and runs everything but its attention and its linears: the attention interface hands us
queries, keys and values, which go into the paged cache, and every `nn.Linear` becomes a packed one. Whether that is
right for a model is not taken on trust: when it is loaded, a short text must give the same logits as transformers' own
eager attention does, whole and in chunks beside another text. A model that keeps other state than keys and values, or
that does not use the attention interface, is refused.

Unlike the decoder's, a fallback model stands in memory in float32 once before its linears are packed.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qserve.device.batch import make_batch
from qserve.device.kv_cache import CacheShape, KVCache
from qserve.device.paged_attention import (
    INTERFACE_NAME,
    PROBE_BLOCK_SIZE,
    PROBE_TOKENS,
    PagedAttention,
    register_attention,
)
from qserve.engine.request import Chunk, Request, SamplingParams
from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture
from qserve.kernels.linear import Linear
from qserve.kernels.ops import Batch, Ops
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight

_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear`. Its `weight` has a shape and a dtype, for those who ask, and no numbers."""

    def __init__(self, linear: Linear, ops: Ops) -> None:
        super().__init__()
        self.packed = linear
        self.ops = ops
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = torch.empty(linear.out_features, linear.in_features, device="meta")
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).to(torch.float32).contiguous()
        return self.ops.norm_linear(rows, None, self.packed).view(*x.shape[:-1], self.out_features)


class Fallback:
    """A model of transformers as the runner wants it."""

    def __init__(self, theirs: Any, attention: PagedAttention) -> None:
        self._theirs = theirs
        self._attention = attention
        self._shapes: tuple[CacheShape, ...] = ()
        self._given, self._head = _split_head(theirs)

    @property
    def vocab_size(self) -> int:
        size: int = self._theirs.config.get_text_config().vocab_size
        return size

    @property
    def cache_shapes(self) -> tuple[CacheShape, ...]:
        return self._shapes

    @property
    def num_bytes(self) -> int:
        packed = [module.packed.num_bytes for module in self._theirs.modules() if isinstance(module, PackedLinear)]
        return sum(packed) + sum(int(parameter.nbytes) for parameter in self._theirs.parameters())

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        self._attention.layers = list(cache.layers)
        return self._hidden(batch)

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden  # their base model ends with its last norm

    def logits(self, hidden: Tensor) -> Tensor:
        """transformers' own way from hidden states to logits, scales and caps included."""
        self._given.hidden = hidden.unsqueeze(0)
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._head(input_ids=ids, use_cache=False).logits[0]
        return logits.to(torch.float32)

    @torch.inference_mode()
    def check(self, *, device: torch.device, max_positions: int, tolerance: float) -> None:
        """Raise UnsupportedArchitecture unless the cache gives what transformers' eager attention gives."""
        name = self._theirs.config.model_type
        ids = [(7919 * place + 13) % self.vocab_size for place in range(PROBE_TOKENS)]
        theirs = self._theirs
        theirs.set_attn_implementation("eager")
        expected = theirs(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
        theirs.set_attn_implementation(INTERFACE_NAME)
        whole = self._probe(ids, cuts=[PROBE_TOKENS], device=device)
        self._shapes = self._attention.shapes
        if not self._shapes:
            raise UnsupportedArchitecture(
                f"{name}: the model asks transformers' attention interface for nothing, so its state is no key-value"
                " cache. Serve a model whose layers attend."
            )
        self._check_window(max_positions)
        chunked = self._probe(ids, cuts=[9, 10, PROBE_TOKENS], device=device)
        error = max(float((found - expected).abs().max() / expected.abs().max()) for found in (whole, chunked))
        if not error <= tolerance:
            raise UnsupportedArchitecture(
                f"{name}: over a paged cache the logits of a short text are off by {error:.1e} of their size, expected"
                f" at most {tolerance:.0e}: the model keeps other state than keys and values, or masks them in a way of"
                " its own. Serve another model."
            )

    def _check_window(self, max_positions: int) -> None:
        config = self._theirs.config.get_text_config()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        is_known = getattr(config, "layer_types", None) or any(self._attention.windows)
        if window and max_positions > window and not is_known:
            raise UnsupportedArchitecture(
                f"{config.model_type}: config.json has a sliding window of {window}, but no layer says that it is its"
                f" own. Serve the model with at most {window} positions (--max-model-len {window})."
            )

    def _hidden(self, batch: Batch) -> Tensor:
        self._attention.batch = batch
        output = self._theirs.base_model(
            input_ids=batch.token_ids.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False
        )
        self._attention.batch = None
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _probe(self, ids: list[int], *, cuts: list[int], device: torch.device) -> Tensor:
        """Logits of all positions, computed in chunks that end at `cuts`, another text beside them."""
        count = -(-len(ids) // PROBE_BLOCK_SIZE)
        request, other = (Request(name, tokens, SamplingParams(max_tokens=1)) for name, tokens in _pair(ids))
        pieces = []
        for start, end in zip([0, *cuts], cuts, strict=False):
            chunks = [
                Chunk(request=other, start=start, end=end, block_ids=tuple(range(count, 2 * count))),
                Chunk(request=request, start=start, end=end, block_ids=tuple(range(count))),
            ]
            hidden = self._hidden(make_batch(chunks, block_size=PROBE_BLOCK_SIZE, device=device))
            pieces.append(hidden[end - start :])
        return self.logits(torch.cat(pieces))


def load_fallback(
    config: Mapping[str, Any],
    weights: Mapping[str, Weight],
    *,
    ops: Ops,
    device: torch.device,
    max_positions: int,
) -> Fallback:
    """Build, fill, pack and check; UnsupportedArchitecture says why a model cannot be served."""
    their_class, their_config = _find_class(config)
    _refuse_what_a_probe_cannot_see(their_config, max_positions=max_positions)
    state: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedWeight] = {}
    for name, weight in weights.items():
        state[name] = _to_float(weight)
        if isinstance(weight, QuantizedWeight):
            quantized[name] = weight
    theirs = _build(their_class, their_config, state).to(device)
    del state
    if "position_ids" not in inspect.signature(theirs.base_model.forward).parameters or theirs.base_model is theirs:
        raise UnsupportedArchitecture(
            f"{their_config.model_type}: the model takes no position_ids, so a chunk cannot be told where it stands."
            " Serve another model."
        )
    _pack_linears(theirs, weights, quantized, ops)
    attention = PagedAttention(their_config.get_text_config())
    register_attention()
    attention.join(theirs)
    model = Fallback(theirs, attention)
    is_rounded = any(weight.activation is not ActivationQuantization.NONE for weight in quantized.values())
    # Where inputs are rounded to codes, noise tips some of them; a wrong mask does far more than that.
    model.check(device=device, max_positions=max_positions, tolerance=0.2 if is_rounded else 1e-3)
    return model


def _find_class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    name = config.get("model_type")
    if name not in CONFIG_MAPPING:
        raise UnsupportedArchitecture(
            f"config.json: model_type is {name!r}, which neither the decoder nor the installed transformers knows."
            " Models that bring their own code are not run; a newer transformers may know this one."
        )
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    their_config = CONFIG_MAPPING[name].from_dict(values)
    if type(their_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedArchitecture(
            f"config.json: model_type {name!r} is no causal language model. Serve one that generates text."
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(their_config)], their_config


def _refuse_what_a_probe_cannot_see(their_config: Any, *, max_positions: int) -> None:
    """A short text shows nothing of what changes only in a long one."""
    config = their_config.get_text_config()
    name = their_config.model_type
    types = set(getattr(config, "layer_types", None) or ())
    if not types <= _KNOWN_LAYER_TYPES:
        others = ", ".join(sorted(types - _KNOWN_LAYER_TYPES))
        raise UnsupportedArchitecture(
            f"{name}: layers of type {others} keep other state than keys and values, or mask them in another way;"
            f" expected {' and '.join(sorted(_KNOWN_LAYER_TYPES))}. Serve another model."
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    for parameters in (rotary, *(part for part in rotary.values() if isinstance(part, dict))):
        kind = parameters.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_positions > limit:
            raise UnsupportedArchitecture(
                f"{name}: rotary scaling {kind!r} changes with the length of the text, but cached keys cannot."
                f" Serve the model with at most {limit} positions (--max-model-len {limit})."
            )


def _build(their_class: Any, their_config: Any, state: dict[str, Tensor]) -> Any:
    theirs, info = their_class.from_pretrained(
        None,
        config=their_config,
        state_dict=state,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if info["mismatched_keys"]:
        tensor, found, expected = sorted(info["mismatched_keys"])[0]
        raise BrokenCheckpoint(
            f"{tensor} has shape {tuple(found)}, but config.json implies {tuple(expected)}."
            " The two are not of one model: take both from the same source."
        )
    if info["missing_keys"]:
        raise BrokenCheckpoint(
            f"{len(info['missing_keys'])} tensors are missing, the first is {sorted(info['missing_keys'])[0]}."
            " Download the checkpoint again, whole."
        )
    return theirs.eval()


def _to_float(weight: Weight) -> Tensor:
    values = weight if isinstance(weight, Tensor) else replace(weight, dtype=torch.float32).dequantize()
    return values.to(torch.float32) if values.is_floating_point() else values


def _pack_linears(
    theirs: nn.Module, weights: Mapping[str, Weight], quantized: Mapping[str, QuantizedWeight], ops: Ops
) -> None:
    """Packed from the checkpoint's own weight where the names agree, else from what transformers made of it."""
    rounding = {name for name, weight in quantized.items() if weight.activation is not ActivationQuantization.NONE}
    for name, module in list(theirs.named_modules()):
        if type(module) is not nn.Linear:
            continue
        key = f"{name}.weight"
        source = quantized[key] if key in quantized else weights.get(key, module.weight.data)
        bias = None if module.bias is None else module.bias.data
        theirs.set_submodule(name, PackedLinear(ops.pack([source], biases=[bias]), ops))
        rounding.discard(key)
    if rounding:
        raise UnsupportedArchitecture(
            f"{sorted(rounding)[0]} quantizes its input, but transformers has no linear of that name to give it to."
            " Serve the model with weight-only quantization."
        )


class _Given(nn.Module):
    """Stands where the layers stood and gives back hidden states that were computed before."""

    hidden: Tensor

    @property
    def decoder(self) -> "_Given":
        return self  # some classes call the part inside

    def forward(self, *_: Any, **__: Any) -> "_GivenOutput":
        return _GivenOutput(self.hidden)


class _GivenOutput:
    """An output of a base model that has hidden states, first or by name, and None for all else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _split_head(theirs: Any) -> tuple[_Given, Any]:
    """The model once more, all modules shared but the layers, so that only its last steps are computed."""
    given = _Given()
    head = copy.copy(theirs)
    head._modules = {**theirs._modules, theirs.base_model_prefix: given}
    return given, head


def _pair(ids: list[int]) -> tuple[tuple[str, list[int]], tuple[str, list[int]]]:
    return ("probe", ids), ("beside", ids[::-1])
