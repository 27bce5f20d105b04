"""Checkpoints for the tests, quantized with torchao and written by transformers or by torch: never by our own code."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests import tiny

INTX = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
INTX_ONLY = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
CONFIGS: dict[str, Any] = {
    "intx": INTX,
    "int8": Int8WeightOnlyConfig(),
    "int8-dynamic": Int8DynamicActivationInt8WeightConfig(),
    "head": FqnToConfig(
        {r"re:model\.layers\..*_proj": INTX_ONLY, "lm_head": Int8DynamicActivationInt8WeightConfig()},
    ),
}


def quantized_checkpoint(directory: Path, kind: str = "intx", *, shard: str = "5GB", **changes: Any) -> Path:
    """Quantized and saved by transformers, as safetensors in torchao's flattened form."""
    base = tiny.make_checkpoint(directory.with_name(f"{directory.name}-float"), **changes)
    quantization = TorchAoConfig(CONFIGS[kind], include_input_output_embeddings=kind == "head")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    model.save_pretrained(directory, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, directory / name)
    return directory


def bin_checkpoint(
    directory: Path, kind: str | None = "intx", *, num_shards: int = 1, has_recipe: bool = False, **changes: Any
) -> Path:
    """A state_dict saved by torch.save, quantized or float, in one file or with an index."""
    model = tiny.make_model(**changes).to(torch.bfloat16)
    if kind:
        quantize_(model, CONFIGS[kind], filter_fn=None if kind == "head" else is_body)
    directory.mkdir(parents=True)
    config = {**model.config.to_dict(), "dtype": "bfloat16"}
    if has_recipe and kind:
        config["quantization_config"] = TorchAoConfig(CONFIGS[kind]).to_dict()
    (directory / "config.json").write_text(json.dumps(config, default=str))
    write_bins(directory, model.state_dict(), num_shards=num_shards)
    return directory


def is_body(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and name != "lm_head"


def write_bins(directory: Path, state: dict[str, torch.Tensor], *, num_shards: int) -> None:
    if num_shards == 1:
        torch.save(state, directory / "pytorch_model.bin")
        return
    names = sorted(state, key=lambda name: "embed" not in name)  # the first shard holds embeddings alone
    weight_map = {name: f"pytorch_model-{1 + min(i, num_shards - 1):05d}.bin" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def scatter(path: Path, *, has_index: bool) -> None:
    """One safetensors file -> three, each with one part of every weight, and the metadata of its own tensors alone."""
    with safe_open(path / "model.safetensors", "pt") as opened:
        metadata, state = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    (path / "model.safetensors").unlink()
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for key, tensor in state.items():
        shards[("_qdata" in key) + 2 * ("_scale" in key)][key] = tensor
    files = [f"model-{i}-of-3.safetensors" for i in (1, 2, 3)]
    for i, file in enumerate(files):
        names = [name for number, name in enumerate(sorted(metadata)) if number % 3 == i]
        save_file(shards[i], path / file, metadata={name: metadata[name] for name in names})
    if has_index:
        weight_map = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(3, 40)[None]).logits
    return result


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys; None takes one away."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
