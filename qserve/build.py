"""The bill of materials: from a path and the configs to a running LLM. The only module that sees every package.

It assembles and decides nothing that a part could decide itself.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.detect import detect
from qserve.checkpoint.hub import resolve
from qserve.checkpoint.load import open_weights
from qserve.checkpoint.save import read_provenance
from qserve.clock import Clock
from qserve.config import DeviceConfig, EngineConfig, ServerConfig
from qserve.device.kv_cache import block_bytes, make_cache
from qserve.device.load import load_model, model_limit
from qserve.device.runner import Model, ModelRunner
from qserve.device.sampler import Sampler
from qserve.engine.engine import Engine
from qserve.engine.loop import EngineLoop
from qserve.engine.scheduler import Scheduler
from qserve.errors import UsageError
from qserve.kernels.arena import give_back_free_memory, keep_free_memory, populate_in_background
from qserve.kernels.build import KernelsUnavailable, count_cores
from qserve.kernels.cuda.open import open_cuda
from qserve.kernels.native import open_native
from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from qserve.llm import LLM, ModelInfo
from qserve.metrics import Metrics
from qserve.text.templates import load_chat_template
from qserve.text.tokenizer import load_tokenizer

_log = logging.getLogger(__name__)
# Tokens of the chunks that are computed before anything is served. On a CPU they make scratch memory and threads; on a
# GPU each is one that the kernels are compiled for anew.
_WARM_UP = {"cpu": (64, 1), "cuda": (128, 32, 1)}
_CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def build_llm(
    model: str | Path,
    *,
    server: ServerConfig | None = None,
    engine: EngineConfig | None = None,
    device: DeviceConfig | None = None,
    clock: Clock | None = None,
) -> LLM:
    """Load a model, named by its directory or as ORG/NAME on the hub, and start its engine; log what `clock` says.

    Raises ArtifactError for what is wrong with the files, UsageError for options that cannot be in force.
    """
    server, engine, device = server or ServerConfig(), engine or EngineConfig(), device or DeviceConfig()
    clock = clock or Clock()
    where = _choose_device(device)
    torch.set_num_threads(device.threads or count_cores())
    with clock.measure("checkpoint"):
        path = resolve(str(model))
        checkpoint = detect(path)
        for warning in checkpoint.warnings:
            _log.warning("%s", warning)
    with clock.measure("tokenizer"):
        tokenizer = load_tokenizer(checkpoint.home)
        template = load_chat_template(checkpoint.home, tokenizer.special, file=server.chat_template)
    with clock.measure("kernels"):
        ops, kernels = _make_ops(device, where)
    with clock.measure("weights"):
        keep_free_memory()
        limit = _max_model_len(checkpoint, engine)
        loaded = load_model(checkpoint.config, open_weights(checkpoint), ops=ops, device=where, max_positions=limit)
        give_back_free_memory()
    with clock.measure("warm-up"):
        num_blocks = engine.max_running * -(-limit // engine.block_size)  # all that could ever be held at once
        runner = _make_runner(loaded, ops, checkpoint, engine=engine, device=device, max_blocks=num_blocks)
        runner.warm_up([min(size, engine.max_step_tokens) for size in _WARM_UP[where.type]])
    own_name = path.resolve().name if Path(model).expanduser().exists() else str(model)
    room = runner.num_blocks * engine.block_size
    cache_dtype = str(_cache_dtype(device, checkpoint)).removeprefix("torch.")
    if room < limit:
        _log.warning("the cache holds %d tokens, so the context is cut from %d; --kv-cache-mb gives more", room, limit)
    details = {**_describe(checkpoint), "kernels": kernels}
    info = _make_info(server.served_model_name or (own_name,), runner, max_model_len=min(limit, room), details=details)
    loop = EngineLoop(Engine(Scheduler(engine, runner.num_blocks), runner)).start()
    metrics = Metrics(
        info.name,
        lambda: loop.stats,
        prefix=server.metrics_prefix,
        max_model_len=info.max_model_len,
        cache={
            "block_size": engine.block_size,
            "num_blocks": runner.num_blocks,
            "cache_dtype": cache_dtype,
            "enable_prefix_caching": engine.prefix_caching,
        },
    )
    _log.info(
        "%s is loaded in %s; context %d tokens; cache of %d tokens in %s, %d bytes each",
        *(info.name, clock.report(), info.max_model_len),
        *(room, cache_dtype, runner.memory.block // engine.block_size),
    )
    return LLM(info=info, tokenizer=tokenizer, template=template, loop=loop, metrics=metrics)


def _make_info(
    names: tuple[str, ...], runner: ModelRunner, *, max_model_len: int, details: Mapping[str, Any]
) -> ModelInfo:
    memory = {"weights": runner.memory.weights, "cache": runner.memory.cache}
    return ModelInfo(
        name=names[0],
        other_names=names[1:],
        max_model_len=max_model_len,
        vocabulary_size=runner.vocab_size,
        created=int(time.time()),
        details={**details, "memory": memory},
    )


def _choose_device(config: DeviceConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but torch finds no CUDA device here. Leave it out for the CPU.")
    return torch.device(config.device)


def _make_ops(config: DeviceConfig, device: torch.device) -> tuple[Ops, str]:
    """The kernels and their name. Without a compiler the server still serves, slowly, and says so."""
    if config.kernels == "reference":
        return ReferenceOps(device=device), "reference"
    try:
        if device.type == "cuda":
            return open_cuda(device)
        ops = open_native(num_threads=config.threads)
    except KernelsUnavailable as error:
        if config.kernels == "native":
            raise
        _log.warning("plain torch computes, which is several times slower: %s", error)
        return ReferenceOps(device=device), "reference"
    return ops, ops.variant


def _max_model_len(checkpoint: Checkpoint, config: EngineConfig) -> int:
    own = model_limit(checkpoint.config)
    if own is None and not config.max_model_len:
        raise UsageError(
            f"The config of {checkpoint.path} does not tell how long its context is: give --max-model-len."
        )
    if own is not None and config.max_model_len > own:
        raise UsageError(f"--max-model-len is {config.max_model_len}, but the model's own limit is {own}.")
    return config.max_model_len or own or 0


def _make_runner(
    model: Model, ops: Ops, checkpoint: Checkpoint, *, engine: EngineConfig, device: DeviceConfig, max_blocks: int
) -> ModelRunner:
    dtype = _cache_dtype(device, checkpoint)
    size = block_bytes(model.cache_shapes, block_size=engine.block_size, dtype=dtype)
    num_blocks = device.kv_cache_mb * 2**20 // size
    if num_blocks < 2:
        raise UsageError(
            f"--kv-cache-mb {device.kv_cache_mb} holds {num_blocks} blocks of {size} bytes: at least 2 are needed."
        )
    where = torch.device(device.device)
    cache = make_cache(
        model.cache_shapes,
        num_blocks=min(num_blocks, max_blocks),
        block_size=engine.block_size,
        dtype=dtype,
        device=where,
    )
    if where.type == "cpu":
        populate_in_background(cache.memory)
    return ModelRunner(model, cache, device=where, sampler=Sampler(choose=ops.sample))


def _cache_dtype(config: DeviceConfig, checkpoint: Checkpoint) -> torch.dtype:
    if config.kv_cache_dtype == "auto":
        return torch.bfloat16 if checkpoint.is_quantized else torch.float32
    return _CACHE_DTYPES[config.kv_cache_dtype]


def _describe(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What GET /v1/models/{id} tells beyond OpenAI's fields; nothing of our paths."""
    provenance = read_provenance(checkpoint.home)
    bytes_by_kind: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        kind = tensor.class_name if tensor.is_quantized else str(tensor.dtype).removeprefix("torch.")
        bytes_by_kind[kind] = bytes_by_kind.get(kind, 0) + tensor.num_bytes
    return {
        "recipe": checkpoint.recipe.name if checkpoint.recipe else None,
        "model_type": checkpoint.config.get("model_type"),
        "loss": provenance.get("loss"),
        "provenance": provenance or None,
        "bytes": {"total": checkpoint.num_bytes, "by_kind": bytes_by_kind},
    }
