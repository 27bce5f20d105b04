"""Every layout of files gives the weights that torchao's own tensors give."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qserve.checkpoint.contents import Tier
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import load_model, open_weights
from qserve.errors import BrokenCheckpoint, UnsupportedArchitecture
from qserve.quant.weight import QuantizedWeight, Weight
from tests import tiny
from tests.checkpoint.making import bin_checkpoint, edit_json, logits, quantized_checkpoint, scatter


def values(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def assert_same_weights(path: Path) -> None:
    """Against transformers' reading of the same files."""
    weights = open_weights(detect(path))
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert set(weights) <= set(expected)
    for name, weight in weights.items():
        theirs = expected[name]
        theirs = theirs.dequantize() if hasattr(theirs, "tensor_data_names") else theirs
        assert torch.equal(values(weight), theirs), name


@pytest.mark.parametrize("kind", ["intx", "int8", "int8-dynamic", "head"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_flattened_safetensors(tmp_path: Path, kind: str, shard: str) -> None:
    path = quantized_checkpoint(tmp_path / "model", kind, shard=shard, tie_word_embeddings=False)
    checkpoint = detect(path)
    assert (len(checkpoint.files) > 1) == (shard != "5GB")
    assert checkpoint.tier is Tier.CONFIG
    assert checkpoint.warnings == ()
    assert_same_weights(path)


@pytest.mark.parametrize("has_index", [True, False])
def test_the_parts_of_a_weight_in_several_shards(tmp_path: Path, has_index: bool) -> None:
    path = quantized_checkpoint(tmp_path / "model", "head", tie_word_embeddings=False)
    whole = {name: values(weight) for name, weight in open_weights(detect(path)).items()}
    scatter(path, has_index=has_index)
    checkpoint = detect(path)
    assert {len(info.files) for info in checkpoint.tensors.values() if info.is_quantized} == {3}
    weights = open_weights(checkpoint)
    assert {name: torch.equal(values(weights[name]), whole[name]) for name in whole} == dict.fromkeys(weights, True)
    assert len(checkpoint.warnings) == (not has_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_plain_safetensors(tmp_path: Path, dtype: torch.dtype, is_tied: bool) -> None:
    path = tiny.make_checkpoint(tmp_path, dtype=dtype, tie_word_embeddings=is_tied)
    checkpoint = detect(path)
    assert {info.dtype for info in checkpoint.tensors.values()} == {dtype}
    assert ("lm_head.weight" in checkpoint.tensors) != is_tied
    assert_same_weights(path)


@pytest.mark.parametrize("kind", [None, "intx", "int8", "int8-dynamic"])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_bin(tmp_path: Path, kind: str | None, num_shards: int) -> None:
    path = bin_checkpoint(tmp_path / "model", kind, num_shards=num_shards, has_recipe=True, tie_word_embeddings=False)
    checkpoint = detect(path)
    assert checkpoint.format == "bin"
    assert checkpoint.is_quantized == (kind is not None)
    assert_same_weights(path)


def test_a_plain_tensor_is_a_view_of_the_file(tmp_path: Path) -> None:
    weights = open_weights(detect(tiny.make_checkpoint(tmp_path)))
    first, second = (weights["model.embed_tokens.weight"] for _ in range(2))
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert first.data_ptr() == second.data_ptr()


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    weights = open_weights(detect(tiny.make_checkpoint(tmp_path, tie_word_embeddings=True)))
    assert "lm_head.weight" not in weights
    with pytest.raises(KeyError):
        weights["lm_head.weight"]


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_of_plain_tensors_is_transformers_own(tmp_path: Path, changes: dict[str, str], is_tied: bool) -> None:
    path = tiny.make_checkpoint(tmp_path, tie_word_embeddings=is_tied)
    dtype = getattr(torch, changes["dtype"]) if changes else None
    ours = load_model(detect(path), dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    assert torch.equal(logits(ours), logits(theirs))
    head, embedding = ours.get_submodule("lm_head").weight, ours.get_submodule("model.embed_tokens").weight
    assert (head is embedding) == is_tied


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3", "gpt2", "opt"])
def test_buffers_that_no_file_holds_are_filled(tmp_path: Path, model_type: str) -> None:
    path = tiny.make_checkpoint(tmp_path, model_type)
    assert torch.equal(logits(load_model(detect(path))), logits(AutoModelForCausalLM.from_pretrained(path)))


@pytest.mark.parametrize("holder", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_with_either_tensor_there(tmp_path: Path, holder: str) -> None:
    path = bin_checkpoint(tmp_path / "model", None, tie_word_embeddings=True)
    file = path / "pytorch_model.bin"
    state = torch.load(file)
    (other,) = {"lm_head.weight", "model.embed_tokens.weight"} - {holder}
    whole = logits(load_model(detect(path)))
    del state[other]
    torch.save(state, file)
    model = load_model(detect(path))
    assert model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight
    assert torch.equal(logits(model), whole)


def test_a_quantized_head_beside_a_tied_config(tmp_path: Path) -> None:
    """The config still says tied, the files hold both: each is used for what it is."""
    path = quantized_checkpoint(tmp_path / "model", "head", tie_word_embeddings=False)
    untied = logits(load_model(detect(path)))
    edit_json(path / "config.json", tie_word_embeddings=True)
    assert torch.equal(logits(load_model(detect(path))), untied)


def test_what_the_architecture_needs_and_the_files_lack(tmp_path: Path) -> None:
    path = bin_checkpoint(tmp_path / "model", None)
    state = torch.load(path / "pytorch_model.bin")
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, path / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpoint, match=r"lacks tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(detect(path))


def test_a_shape_that_is_not_the_configs(tmp_path: Path) -> None:
    path = tiny.make_checkpoint(tmp_path)
    edit_json(path / "config.json", intermediate_size=96)
    with pytest.raises(BrokenCheckpoint, match=r"up_proj\.weight is \[128, 64\], not \[96, 64\]"):
        load_model(detect(path))


@pytest.mark.parametrize(("model_type", "words"), [("nonsense", "knows no model"), ("vit", "no causal language model")])
def test_an_unknown_architecture(tmp_path: Path, model_type: str, words: str) -> None:
    path = tiny.make_checkpoint(tmp_path)
    edit_json(path / "config.json", model_type=model_type)
    with pytest.raises(UnsupportedArchitecture, match=words):
        load_model(detect(path))


def test_reading_safetensors_needs_neither_torchao_nor_transformers(tmp_path: Path) -> None:
    quantized = quantized_checkpoint(tmp_path / "quantized")
    plain_bin = bin_checkpoint(tmp_path / "bin", None)
    program = f"""
import sys
from pathlib import Path
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import open_weights
for path in {[str(quantized), str(quantized) + "-float", str(plain_bin)]!r}:
    for name, weight in open_weights(detect(Path(path))).items():
        assert weight.shape
loaded = {{"torchao", "transformers"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def peak_of(program: str) -> Any:
    measured = f"""
import resource, sys
from pathlib import Path
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import open_weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{program}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    return int(subprocess.run([sys.executable, "-c", measured], check=True, capture_output=True, text=True).stdout)


def test_asking_for_one_tensor_reads_one_tensor(tmp_path: Path) -> None:
    """A file of 64 MiB, of which 1 MiB is asked for."""
    path = tiny.make_checkpoint(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(path / "model.safetensors")
    state |= {f"model.extra.{i}": torch.zeros(2**18) for i in range(64)}
    save_file(state, path / "model.safetensors")
    kilobytes = peak_of(f"float(open_weights(detect(Path({str(path)!r})))['model.extra.7'].sum())")
    assert kilobytes < 32 * 1024
