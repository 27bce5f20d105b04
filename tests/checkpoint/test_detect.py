"""What is at a path: the tiers of evidence, and a clear word for everything that is not a whole checkpoint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qserve.checkpoint.contents import Tier
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import open_weights
from qserve.checkpoint.read_safetensors import DTYPES
from qserve.errors import ArtifactError, BrokenCheckpoint, NotACheckpoint, UnsafePickle, UnsupportedWeight
from tests import tiny
from tests.checkpoint.making import bin_checkpoint, edit_json, quantized_checkpoint, write_bins

GONE = [
    {"quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 128}},
    {"quant_type": "int8_weight_only"},
    {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {"group_size": None}}}},
    {"quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 1, "_data": {}}}},
]


@pytest.fixture(scope="module")
def float_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def quantized_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_checkpoint(tmp_path_factory.mktemp("quantized") / "model", tie_word_embeddings=False)


@pytest.fixture
def float_model(float_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float_source, tmp_path / "float"))


@pytest.fixture
def quantized_model(quantized_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_source, tmp_path / "quantized"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Change the tensors or the metadata of a single-file checkpoint."""
    file = path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, state = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    change(state, metadata)
    save_file(state, file, metadata=metadata)


def drop(entries: dict[str, Any], name: str) -> None:
    del entries[name]


def refused(path: Path, error: type[ArtifactError], *words: str) -> None:
    with pytest.raises(error) as caught:
        detect(path)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


# The tiers


def test_an_ordinary_checkpoint(float_model: Path) -> None:
    checkpoint = detect(float_model)
    assert (checkpoint.tier, checkpoint.recipe, checkpoint.warnings) == (Tier.NONE, None, ())
    assert checkpoint.num_bytes == sum(weight.nbytes for weight in open_weights(checkpoint).values())


def test_the_config_says_it(quantized_model: Path) -> None:
    checkpoint = detect(quantized_model)
    assert checkpoint.tier is Tier.CONFIG
    assert checkpoint.recipe is not None
    assert checkpoint.recipe.name == "int8-dynamic-act-int4-weight"
    info = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    assert (info.class_name, info.shape, info.bits, info.group_size) == ("IntxUnpackedToInt8Tensor", (128, 64), 4, 32)
    assert info.dtype is torch.bfloat16


@pytest.mark.parametrize("folder", ["checkpoints/checkpoint-10", "checkpoint-10"])
def test_the_config_of_the_run_says_it(quantized_model: Path, tmp_path: Path, folder: str) -> None:
    path = tmp_path / "run" / folder
    path.mkdir(parents=True)
    shutil.move(quantized_model / "model.safetensors", path)
    shutil.copytree(quantized_model, tmp_path / "run", dirs_exist_ok=True)
    checkpoint = detect(path)
    assert checkpoint.home.samefile(tmp_path / "run")
    assert checkpoint.tier is Tier.CONFIG


def test_a_config_of_its_own_without_the_runs_quantization(quantized_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "checkpoint-10"
    shutil.copytree(quantized_model, path)
    edit_json(path / "config.json", quantization_config=None)
    shutil.copyfile(quantized_model / "config.json", tmp_path / "run" / "config.json")
    checkpoint = detect(path)
    assert checkpoint.home == path
    assert checkpoint.tier is Tier.CONFIG


def test_the_metadata_says_it(quantized_model: Path) -> None:
    edit_json(quantized_model / "config.json", quantization_config=None)
    checkpoint = detect(quantized_model)
    assert (checkpoint.tier, checkpoint.recipe, checkpoint.warnings) == (Tier.METADATA, None, ())
    assert checkpoint.is_quantized


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_tensors_say_it(tmp_path: Path, num_shards: int) -> None:
    """The first shard holds embeddings alone: all must be looked at."""
    checkpoint = detect(bin_checkpoint(tmp_path / "model", num_shards=num_shards))
    assert (checkpoint.tier, checkpoint.recipe, checkpoint.warnings) == (Tier.TENSORS, None, ())
    info = checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    assert (info.class_name, info.shape, info.bits, info.group_size) == ("IntxUnpackedToInt8Tensor", (128, 64), 4, 32)


def test_another_class_than_the_config_says(quantized_model: Path) -> None:
    other = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}
    edit_json(
        quantized_model / "config.json",
        quantization_config={"quant_method": "torchao", "quant_type": {"default": other}},
    )
    checkpoint = detect(quantized_model)
    (warning,) = checkpoint.warnings
    assert "Int8Tensor, yet the tensors are IntxUnpackedToInt8Tensor: the tensors won" in warning
    assert checkpoint.tier is Tier.METADATA


def test_another_group_size_than_the_config_says(quantized_model: Path) -> None:
    file = quantized_model / "config.json"
    file.write_text(file.read_text().replace('"group_size": 32', '"group_size": 64'))
    (warning,) = detect(quantized_model).warnings
    assert "group size 64, yet the tensors have 32: the tensors won" in warning


def test_a_config_that_quantizes_what_is_float(float_model: Path, quantized_model: Path) -> None:
    config = json.loads((quantized_model / "config.json").read_text())
    edit_json(float_model / "config.json", quantization_config=config["quantization_config"])
    checkpoint = detect(float_model)
    assert checkpoint.tier is Tier.NONE
    assert "yet no tensor is quantized" in checkpoint.warnings[0]


@pytest.mark.parametrize("block", GONE, ids=lambda block: str(block["quant_type"])[:48])
def test_configs_of_old_torchao(float_model: Path, quantized_model: Path, block: dict[str, Any]) -> None:
    edit_json(float_model / "config.json", quantization_config={"quant_method": "torchao", **block})
    refused(float_model, UnsupportedWeight, "config.json", "qserve-train finalize")
    edit_json(quantized_model / "config.json", quantization_config={"quant_method": "torchao", **block})
    (warning,) = detect(quantized_model).warnings
    assert "can be read without it, and won" in warning


def test_another_method(float_model: Path) -> None:
    edit_json(float_model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(float_model, UnsupportedWeight, "gptq", "torchao", "qserve-train finalize")


# No checkpoint


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", NotACheckpoint, "does not exist")


def test_an_empty_directory(tmp_path: Path) -> None:
    refused(tmp_path, NotACheckpoint, "empty", "Expected")


def test_another_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "pictures").mkdir()
    refused(tmp_path, NotACheckpoint, "notes.txt", "pictures/", "config.json")


def test_a_training_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    refused(tmp_path, NotACheckpoint, "training run", "checkpoint-10")


def test_a_file(float_model: Path) -> None:
    refused(float_model / "model.safetensors", NotACheckpoint, "is a file", str(float_model))


@pytest.mark.parametrize("is_inside", [True, False])
def test_a_gguf(tmp_path: Path, is_inside: bool) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path if is_inside else tmp_path / "model.gguf", NotACheckpoint, "qserve-train import", "model.gguf")


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, NotACheckpoint, "adapter", "some/model", "merge_and_unload")


def test_a_config_without_weights(float_model: Path) -> None:
    (float_model / "model.safetensors").unlink()
    refused(float_model, NotACheckpoint, "no model weights", "model.safetensors")


def test_weights_without_a_config(float_model: Path) -> None:
    (float_model / "config.json").unlink()
    refused(float_model, NotACheckpoint, "no config.json", "model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_config_that_is_none(float_model: Path, text: str) -> None:
    (float_model / "config.json").write_text(text)
    refused(float_model, BrokenCheckpoint, "config.json")


# Broken safetensors


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_cut_short(float_model: Path, kept: int) -> None:
    file = float_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(float_model, BrokenCheckpoint, "cut short", "model.safetensors", "again")


def test_bytes_too_many(float_model: Path) -> None:
    with (float_model / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    refused(float_model, BrokenCheckpoint, "nothing accounts for")


def test_no_safetensors_at_all(float_model: Path) -> None:
    (float_model / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"{" * 20)
    refused(float_model, BrokenCheckpoint, "no safetensors file")


def test_a_git_lfs_pointer(float_model: Path) -> None:
    (float_model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(float_model, BrokenCheckpoint, "git lfs pull")


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard(tmp_path: Path, has_index: bool) -> None:
    path = quantized_checkpoint(tmp_path / "model", shard="20KB", tie_word_embeddings=False)
    shards = sorted(path.glob("*.safetensors"))
    shards[1].unlink()
    if not has_index:
        (path / "model.safetensors.index.json").unlink()
    refused(path, BrokenCheckpoint, f"lacks 1 of {len(shards)} shards", shards[1].name)


def test_a_shard_of_another_model(tmp_path: Path) -> None:
    path = quantized_checkpoint(tmp_path / "model", shard="20KB", tie_word_embeddings=False)
    shards = sorted(path.glob("*.safetensors"))
    shutil.copyfile(shards[0], shards[1])
    refused(path, BrokenCheckpoint, "index", "fetch them together again")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}'])
def test_a_broken_index(float_model: Path, text: str) -> None:
    (float_model / "model.safetensors").unlink()
    (float_model / "model.safetensors.index.json").write_text(text)
    refused(float_model, BrokenCheckpoint, "index.json", "copy the file again")


def test_a_single_file_beside_an_index(float_model: Path) -> None:
    (float_model / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors was read" in detect(float_model).warnings[0]


def test_a_weight_without_one_of_its_parts(quantized_model: Path) -> None:
    rewrite(quantized_model, lambda state, _: drop(state, "model.layers.1.mlp.up_proj._weight_scale"))
    refused(quantized_model, BrokenCheckpoint, "model.layers.1.mlp.up_proj.weight", "_weight_scale", "1 of its 3 parts")


def test_parts_without_a_weight(quantized_model: Path) -> None:
    rewrite(quantized_model, lambda _, metadata: drop(metadata, "model.layers.1.mlp.up_proj.weight"))
    refused(quantized_model, BrokenCheckpoint, "3 tensors are parts", "model.layers.1.mlp.up_proj._weight_qdata")


def test_metadata_that_was_lost(quantized_model: Path) -> None:
    rewrite(quantized_model, lambda _, metadata: metadata.clear())
    refused(quantized_model, BrokenCheckpoint, "parts of quantized weights", "original files")


def test_a_class_that_nobody_reads(quantized_model: Path) -> None:
    def rename(_: object, metadata: dict[str, str]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        metadata[name] = metadata[name].replace("IntxUnpackedToInt8Tensor", "IntxOpaqueTensor")

    rewrite(quantized_model, rename)
    with pytest.raises(UnsupportedWeight, match=r"up_proj\.weight.*IntxOpaqueTensor"):
        open_weights(detect(quantized_model))["model.layers.1.mlp.up_proj.weight"]


# A config of another model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 96}, ("hidden_size 96", "has 64")),
        ({"vocab_size": 500}, ("vocab_size 500", "has 512")),
        ({"num_hidden_layers": 5}, ("5 layers", "missing are [3, 4]")),
        ({"num_hidden_layers": 2}, ("2 layers", "layer 2")),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_config_of_another_model(float_model: Path, changes: dict[str, int], words: tuple[str, ...]) -> None:
    edit_json(float_model / "config.json", **changes)
    refused(float_model, BrokenCheckpoint, *words, "another model")


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "gemma3_text"])
def test_other_families_agree_with_their_configs(tmp_path: Path, model_type: str) -> None:
    path = tiny.make_checkpoint(tmp_path, model_type)
    assert detect(path).warnings == ()
    layers = {"gpt2": "n_layer"}.get(model_type, "num_hidden_layers")
    edit_json(path / "config.json", **{layers: 9}, layer_types=None)
    refused(path, BrokenCheckpoint, "9 layers")


# Pickles


class RunsCode:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_code(tmp_path: Path, is_zip: bool) -> None:
    path = bin_checkpoint(tmp_path / "model", None)
    state = {"weight": torch.zeros(1), "trap": RunsCode(tmp_path / "trapped")}
    torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    refused(path, UnsafePickle, "posix.mkdir", "nothing of it was executed")
    assert not (tmp_path / "trapped").exists()


def test_a_pickle_of_a_newer_protocol(tmp_path: Path) -> None:
    path = bin_checkpoint(tmp_path / "model", None)
    torch.save({"trap": RunsCode(tmp_path / "trapped")}, path / "pytorch_model.bin", pickle_protocol=4)
    refused(path, UnsafePickle, "pytorch_model.bin")
    assert not (tmp_path / "trapped").exists()


def test_a_tensor_class_that_torchao_has_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bin_checkpoint(tmp_path / "model", None)
    removed = type("AffineQuantizedTensor", (), {"__module__": "torchao.dtypes.affine_quantized_tensor"})
    module = type(os)(removed.__module__)
    module.AffineQuantizedTensor = removed  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, removed.__module__, module)
    torch.save({"weight": removed()}, path / "pytorch_model.bin")
    monkeypatch.undo()
    refused(path, UnsupportedWeight, "AffineQuantizedTensor", "old torchao", "qserve-train finalize")


@pytest.mark.parametrize("kept", [0, 10, 2000, -100])
def test_a_bin_cut_short(tmp_path: Path, kept: int) -> None:
    path = bin_checkpoint(tmp_path / "model")
    file = path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    refused(path, BrokenCheckpoint, "pytorch_model.bin", "cut short", "again")


def test_more_than_tensors(tmp_path: Path) -> None:
    path = bin_checkpoint(tmp_path / "model", None)
    torch.save({"model": {"weight": torch.zeros(1)}, "step": 3}, path / "pytorch_model.bin")
    refused(path, BrokenCheckpoint, "more than tensors", "model, step")
    torch.save([torch.zeros(1)], path / "pytorch_model.bin")
    refused(path, BrokenCheckpoint, "holds a list")


def test_a_missing_bin_shard(tmp_path: Path) -> None:
    path = bin_checkpoint(tmp_path / "model", num_shards=3)
    (path / "pytorch_model-00002.bin").unlink()
    refused(path, BrokenCheckpoint, "lacks 1 of 3 shards", "pytorch_model-00002.bin")


def test_a_bin_index_of_another_model(tmp_path: Path) -> None:
    path = bin_checkpoint(tmp_path / "model", num_shards=3)
    edit_json(path / "pytorch_model.bin.index.json", weight_map={"absent": "pytorch_model-00001.bin"})
    refused(path, BrokenCheckpoint, "absent", "fetch them together again")


def test_an_old_pickle_without_a_zip_around_it(tmp_path: Path) -> None:
    path = bin_checkpoint(tmp_path / "model", None)
    state = torch.load(path / "pytorch_model.bin")
    torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights = open_weights(detect(path))
    assert all(torch.equal(values, state[name]) for name, values in weights.items() if isinstance(values, torch.Tensor))


def test_safetensors_win_over_bin(float_model: Path) -> None:
    write_bins(float_model, {"unread": torch.zeros(1)}, num_shards=1)
    assert detect(float_model).format == "safetensors"


# Every number type that a file may hold


@pytest.mark.parametrize("word", DTYPES)
def test_every_dtype(float_model: Path, word: str) -> None:
    dtype = DTYPES[word]
    raw = torch.arange(1, 17, dtype=torch.uint8) % 2
    values = raw.view(dtype) if dtype.itemsize <= 8 else raw
    rewrite(float_model, lambda state, _: state.update(extra=values))
    info = detect(float_model).tensors["extra"]
    read = open_weights(detect(float_model))["extra"]
    assert isinstance(read, torch.Tensor)
    assert (read.dtype, tuple(read.shape)) == (dtype, info.shape)
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


def test_an_unknown_dtype(float_model: Path) -> None:
    header = json.dumps({"x": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (float_model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    refused(float_model, UnsupportedWeight, "Q7")


def test_a_tensor_that_does_not_fill_its_bytes(float_model: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (float_model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(float_model, BrokenCheckpoint, "does not fill")


def test_empty_and_unaligned_tensors(float_model: Path) -> None:
    entries = {
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    header = json.dumps(entries).encode()
    header += b" " * (1 - len(header) % 2)  # odd in length: nothing that follows is aligned
    values = torch.tensor([1.5, -2.0])
    content = len(header).to_bytes(8, "little") + header + values.numpy().tobytes()
    (float_model / "model.safetensors").write_bytes(content)
    weights = open_weights(detect(float_model))
    assert weights["empty"].shape == (0, 4)
    assert isinstance(weights["odd"], torch.Tensor)
    assert torch.equal(weights["odd"], values)
