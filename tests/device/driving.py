"""Drives a model of ours over its cache without an engine, and takes weights from a model of transformers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qserve.device.architectures import read_spec
from qserve.device.batch import make_batch
from qserve.device.decoder import Decoder, load_decoder
from qserve.device.kv_cache import KVCache, make_cache
from qserve.device.runner import Model, ModelRunner
from qserve.device.sampler import Sampler
from qserve.engine.request import Chunk, Request, SamplingParams
from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from qserve.quant.weight import Weight

CPU = torch.device("cpu")
BLOCK_SIZE = 8
MAX_POSITIONS = 512
GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


def config_of(theirs: Any) -> dict[str, Any]:
    """The model's config.json, read back as a server reads it."""
    return json.loads(theirs.config.to_json_string())  # type: ignore[no-any-return]


def weights_of(theirs: Any) -> dict[str, Weight]:
    """What `save_pretrained` would write: tied tensors once, under the embedding's name."""
    weights = {name: tensor.detach().clone() for name, tensor in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def load(
    config: Mapping[str, Any],
    weights: Mapping[str, Weight],
    *,
    max_positions: int = MAX_POSITIONS,
    device: torch.device = CPU,
    ops: Ops | None = None,
) -> Decoder:
    """By plain torch, unless `ops` are given, which are for the same device."""
    spec = read_spec(config)
    assert spec is not None
    ops = ops or ReferenceOps(device=device)
    return load_decoder(spec, weights, ops=ops, device=device, max_positions=max_positions)


def cache_for(
    model: Model, *, dtype: torch.dtype = torch.float32, num_blocks: int = 256, device: torch.device = CPU
) -> KVCache:
    return make_cache(model.cache_shapes, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=device)


def runner_for(
    model: Model, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> ModelRunner:
    sampler = Sampler(seed=seed)
    return ModelRunner(model, cache_for(model, dtype=dtype, device=device), device=device, sampler=sampler)


def prompt(length: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (length,), generator=generator).tolist()


def whole_logits(model: Model, token_ids: Sequence[int]) -> Tensor:
    return chunked_logits(model, [token_ids], sizes=[len(token_ids)])[0]


@torch.inference_mode()
def chunked_logits(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> list[Tensor]:
    """Logits of every position of every prompt, all prompts in one batch, prompt i by sizes[i] tokens a step.

    Blocks are dealt out in turn, so that no prompt's blocks lie side by side.
    """
    cache = cache_for(model, dtype=dtype, device=device)
    requests = [Request(str(i), list(ids), GREEDY) for i, ids in enumerate(prompts)]
    blocks = [tuple(range(i, cache.num_blocks, len(prompts))) for i in range(len(prompts))]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while any(start < request.num_tokens for start, request in zip(done, requests, strict=True)):
        active = [i for i, request in enumerate(requests) if done[i] < request.num_tokens]
        ends = {i: min(done[i] + sizes[i], requests[i].num_tokens) for i in active}
        chunks = [Chunk(request=requests[i], start=done[i], end=ends[i], block_ids=blocks[i]) for i in active]
        batch = make_batch(chunks, block_size=BLOCK_SIZE, device=device)
        rows = model.logits(model.forward(batch, cache)).clone().split(batch.chunk_tokens)
        for i, piece in zip(active, rows, strict=True):
            logits[i].append(piece)
            done[i] = ends[i]
    return [torch.cat(pieces) for pieces in logits]


def generate(runner: ModelRunner, requests: Sequence[Request], *, num_tokens: int) -> None:
    """Let every request grow by so many tokens, one chunk for the prompt and then one token a step."""
    starts = [0] * len(requests)
    blocks = [tuple(range(i, runner.num_blocks, len(requests))) for i in range(len(requests))]
    for _ in range(num_tokens):
        chunks = [
            Chunk(request=request, start=starts[i], end=request.num_tokens, block_ids=blocks[i])
            for i, request in enumerate(requests)
        ]
        starts = [request.num_tokens for request in requests]
        for request, sampled in zip(requests, runner.run(chunks), strict=True):
            [token_id] = sampled.token_ids
            request.token_ids.append(token_id)


@torch.inference_mode()
def their_logits(theirs: Any, token_ids: Sequence[int]) -> Tensor:
    return theirs(torch.tensor([token_ids])).logits[0]  # type: ignore[no-any-return]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
