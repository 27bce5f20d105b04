"""What is written loads back in transformers with identical logits, and is there whole or not at all."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qserve.checkpoint.atomic import new_directory
from qserve.checkpoint.contents import Tier
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import load_model, open_weights
from qserve.checkpoint.save import PROVENANCE_FILE, artifact_config, save
from qserve.errors import UsageError
from qserve.quant.apply import quantize
from qserve.quant.read import read_tensor
from qserve.quant.recipes import RECIPES
from qserve.quant.weight import QuantizedWeight, Weight
from tests import tiny
from tests.checkpoint.making import logits

# Whose tensors torchao itself can multiply with on a CPU.
RUN_BY_TORCHAO = ("int8-weight-only", "int8-dynamic-act-int8-weight", "intx-int3-weight-only", "mixed")
RECIPE = "int8-dynamic-act-int4-weight"
HEADS = ("int8", "same", "float")


def made(recipe: str, *, head: str, is_tied: bool = False, model_type: str = "llama") -> tuple[Any, Any]:
    model = tiny.make_model(model_type, tie_word_embeddings=is_tied)
    for parameter in model.parameters():  # and not the buffers, which stay float32 in every model
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model, quantize(model, RECIPES[recipe], head=head).recipe


def values(tensor: Weight) -> Tensor:
    read = read_tensor("", tensor) if isinstance(tensor, Tensor) else tensor
    return read.dequantize() if isinstance(read, QuantizedWeight) else read


@pytest.mark.parametrize(
    ("recipe", "head", "is_tied"),
    [
        *((RECIPE, head, is_tied) for head in HEADS for is_tied in (True, False)),
        *((recipe, "int8", True) for recipe in RUN_BY_TORCHAO),
    ],
)
def test_transformers_loads_it_with_identical_logits(tmp_path: Path, recipe: str, head: str, is_tied: bool) -> None:
    model, resolved = made(recipe, head=head, is_tied=is_tied)
    save(tmp_path / "out", model.state_dict(), config=model.config.to_dict(), recipe=resolved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.lm_head.weight) is type(model.lm_head.weight)
    assert torch.equal(logits(again), logits(model))
    checkpoint = detect(tmp_path / "out")
    assert (checkpoint.tier, checkpoint.warnings) == (Tier.CONFIG, ())
    assert checkpoint.recipe is not None
    assert checkpoint.recipe.name == recipe
    assert checkpoint.config["tie_word_embeddings"] == (is_tied and head == "float")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_every_recipe_comes_back(tmp_path: Path, recipe: str, format: str) -> None:
    model, resolved = made(recipe, head="int8")
    out = tmp_path / "out"
    save(out, model.state_dict(), config=model.config.to_dict(), recipe=resolved, format=format, max_shard_bytes=60_000)
    checkpoint = detect(out)
    assert checkpoint.format == format
    assert len(checkpoint.files) > 1
    assert checkpoint.warnings == ()
    expected = model.state_dict()
    assert set(checkpoint.tensors) == set(expected)
    for name, weight in open_weights(checkpoint).items():
        assert isinstance(weight, QuantizedWeight) == hasattr(expected[name], "tensor_data_names")
        torch.testing.assert_close(values(weight), values(expected[name]), rtol=0, atol=0)


def test_a_float_model(tmp_path: Path) -> None:
    model = tiny.make_model(tie_word_embeddings=True)
    save(tmp_path / "out", model.state_dict(), config=model.config.to_dict())
    checkpoint = detect(tmp_path / "out")
    assert checkpoint.tier is Tier.NONE
    assert "lm_head.weight" not in checkpoint.tensors
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    assert torch.equal(logits(load_model(checkpoint)), logits(model))


def test_aliases_and_strides_are_written_out(tmp_path: Path) -> None:
    model = tiny.make_model(tie_word_embeddings=False)
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    up = "model.layers.0.mlp.up_proj.weight"
    state[up] = state[up].t().contiguous().t()
    save(tmp_path / "out", state, config=model.config.to_dict())
    weights = open_weights(detect(tmp_path / "out"))
    assert all(torch.equal(values(weights[name]), state[name]) for name in state)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_shards_and_their_index(tmp_path: Path, format: str) -> None:
    model, resolved = made("int8-dynamic-act-int4-weight", head="int8")
    out, limit = tmp_path / "out", 60_000
    save(out, model.state_dict(), config=model.config.to_dict(), recipe=resolved, format=format, max_shard_bytes=limit)
    (index_file,) = out.glob("*.index.json")
    index = json.loads(index_file.read_text())
    checkpoint = detect(out)
    assert index["metadata"]["total_size"] == checkpoint.num_bytes
    assert {out / name for name in index["weight_map"].values()} == set(checkpoint.files)
    for file in checkpoint.files:
        tensors = [info for info in checkpoint.tensors.values() if file in info.files]
        assert sum(info.num_bytes for info in tensors) <= limit or len(tensors) == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


def test_the_config_speaks_to_new_and_old_readers() -> None:
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "tie_word_embeddings": True}
    assert artifact_config(config, names=["model.norm.weight"]) == {**config, "rope_theta": 5e4}
    assert artifact_config(config, names=["lm_head.weight"])["tie_word_embeddings"] is False
    assert artifact_config({}, names=[]) == {}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_both_places_of_the_rotary_base_agree(tmp_path: Path, model_type: str) -> None:
    model = tiny.make_model(model_type)
    save(tmp_path / "out", model.state_dict(), config=model.config.to_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = model.config.rope_parameters
    assert config["rope_parameters"] == rope
    assert config["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == rope
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_what_travels_with_the_model(tmp_path: Path) -> None:
    source = tiny.make_checkpoint(tmp_path / "source")
    (source / "chat_template.jinja").write_text("from the source")
    (source / "optimizer.pt").write_text("stays behind")
    model, resolved = made("int8-weight-only", head="int8")
    save(
        tmp_path / "out",
        model.state_dict(),
        config=model.config.to_dict(),
        recipe=resolved,
        source=source,
        files={"generation_config.json": '{"eos_token_id": [2, 5]}'},
        provenance={"source": "a/model", "method": "rtn"},
    )
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        PROVENANCE_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}
    provenance = json.loads((out / PROVENANCE_FILE).read_text())
    assert (provenance["source"], provenance["method"], provenance["recipe"]) == ("a/model", "rtn", "int8-weight-only")
    assert set(provenance["versions"]) >= {"qserve", "torch", "torchao", "transformers"}


def test_the_same_command_makes_the_same_bytes(tmp_path: Path) -> None:
    model, resolved = made("int4-weight-only", head="int8")
    for name in ("one", "two"):
        save(tmp_path / name, model.state_dict(), config=model.config.to_dict(), recipe=resolved)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize("kind", ["directory", "file", "broken link"])
def test_a_destination_that_exists_is_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "absent")
    model = tiny.make_model()
    with pytest.raises(UsageError, match="exists already"):
        save(out, model.state_dict(), config=model.config.to_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def write_half_of(destination: Path) -> None:
    with new_directory(destination) as partial:
        (partial / "file").write_text("half")
        raise ZeroDivisionError


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_half_of(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = tiny.make_model()
    with pytest.raises(UsageError, match="could not be written"):
        save(tmp_path / "file" / "out", model.state_dict(), config=model.config.to_dict())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from qserve.checkpoint.save import save
from qserve.errors import UsageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(Path(sys.argv[1], "out"), {"weight": torch.zeros(50_000)}, config={"model_type": "llama"})
except UsageError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """The operating system refuses to write beyond a limit, as it does when the disk is full."""
    child = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not be written" in child.stdout
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_destination(tmp_path: Path) -> None:
    """The second does not sweep away what the first is writing; the first to end wins."""
    slow_writer = new_directory(tmp_path / "out")
    slow = slow_writer.__enter__()
    (slow / "file").write_text("slow")
    with new_directory(tmp_path / "out") as fast:
        (fast / "file").write_text("fast")
    assert (slow / "file").read_text() == "slow"
    with pytest.raises(UsageError, match="exists already"):
        slow_writer.__exit__(None, None, None)
    assert (tmp_path / "out" / "file").read_text() == "fast"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_permissions_are_those_of_any_new_directory(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


KILLED = """
import sys
from pathlib import Path
import torch
from qserve.checkpoint.save import save
state = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((64, 64), float(i)) for i in range(200)}
print("ready", flush=True)
for attempt in range(1_000_000):
    save(Path(sys.argv[1], str(attempt)), state, config={"model_type": "llama"}, max_shard_bytes=20_000)
    print(attempt, flush=True)
"""


def test_killed_at_any_point_no_half_made_artifact_is_left(tmp_path: Path) -> None:
    """The child writes one artifact after the other and is killed at random moments."""
    draw = random.Random(0)
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0.05, 0.4))
            child.send_signal(signal.SIGKILL)
        made = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for path in made:
            assert len(open_weights(detect(path))) == 200
        attempt = str(len(made))
        with new_directory(folder / attempt):
            left = [path.name for path in folder.iterdir() if path.name.startswith(f".{attempt}.")]
            assert len(left) == 1, "what the dead writer left is swept away"


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    before = set(os.listdir(tmp_path))
    model = tiny.make_model()
    save(tmp_path / "deep" / "out", model.state_dict(), config=model.config.to_dict())
    assert set(os.listdir(tmp_path)) - before == {"deep"}
    assert os.listdir(tmp_path / "deep") == ["out"]
