"""A float model to an artifact: every recipe, both heads, through the command line; and everything that is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import load_model, open_weights
from qserve.quant.apply import quantize
from qserve.quant.read import read_tensor
from qserve.quant.recipe import HeadPolicy
from qserve.quant.recipes import RECIPES
from qserve.quant.weight import QuantizedWeight
from tests.tiny import CHATML, make_checkpoint, prose
from training.cli import main
from training.evaluate import Evaluate
from training.evaluate import evaluate as measure

QUIET = Console(quiet=True)
PROMPT = torch.tensor([[1, 17, 300, 45, 99, 260, 8, 411]])
# What torchao itself can multiply with on a machine without an accelerator.
RUNS_IN_TORCHAO = (
    "int8-dynamic-act-int4-weight",
    "int8-weight-only",
    "int8-dynamic-act-int8-weight",
    "intx-int4-weight-only",
    "intx-int2-weight-only",
    "mixed",
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "tiny"
    return make_checkpoint(directory, dtype=torch.bfloat16, tie_word_embeddings=request.param)


def quantized_in_memory(source: Path, recipe: str, **options: Any) -> Any:
    """The oracle: the same model, quantized and never written."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    quantize(model, RECIPES[recipe], **options)
    return model


def run(*arguments: object) -> int:
    return main(["finalize", *map(str, arguments)])


def values(weight: Any) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_written_as_it_was_quantized(recipe: str, source: Path, tmp_path: Path) -> None:
    assert run(source, "--out", tmp_path / "out", "--quantize", recipe) == 0
    checkpoint = detect(tmp_path / "out")
    assert checkpoint.recipe is not None
    assert checkpoint.recipe.name == recipe
    assert checkpoint.warnings == ()
    expected = quantized_in_memory(source, recipe).state_dict()
    weights = open_weights(checkpoint)
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        assert torch.equal(values(weight), values(read_tensor(name, expected[name]))), name


@pytest.mark.parametrize("recipe", RUNS_IN_TORCHAO)
def test_transformers_loads_it_with_equal_logits(recipe: str, source: Path, tmp_path: Path) -> None:
    assert run(source, "--out", tmp_path / "out", "--quantize", recipe) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        assert torch.equal(loaded(PROMPT).logits, quantized_in_memory(source, recipe)(PROMPT).logits)


@pytest.mark.parametrize("recipe", ["int4-weight-only", "float8-dynamic-act-float8-weight"])
def test_what_torchao_cannot_run_here_loads_dequantized(recipe: str, source: Path, tmp_path: Path) -> None:
    assert run(source, "--out", tmp_path / "out", "--quantize", recipe) == 0
    expected = quantized_in_memory(source, recipe)
    for name, module in list(expected.named_modules()):
        if isinstance(module, nn.Linear):
            weight = values(read_tensor(name, module.weight.data))
            module.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        logits = load_model(detect(tmp_path / "out"))(PROMPT).logits
        assert torch.equal(logits, expected(PROMPT).logits)


@pytest.mark.parametrize("head", HeadPolicy)
def test_the_head_is_what_was_asked_for(head: HeadPolicy, source: Path, tmp_path: Path) -> None:
    assert run(source, "--out", tmp_path / "out", "--quantize", "int4-weight-only", "--head", head) == 0
    checkpoint = detect(tmp_path / "out")
    was_tied = json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    assert checkpoint.config["tie_word_embeddings"] is (was_tied and head is HeadPolicy.FLOAT)
    stored = checkpoint.tensors.get("lm_head.weight")
    kinds = {HeadPolicy.INT8: "Int8Tensor", HeadPolicy.SAME: "Int4Tensor", HeadPolicy.FLOAT: "Tensor"}
    if not (was_tied and head is HeadPolicy.FLOAT):
        assert stored is not None
        assert stored.class_name == kinds[head]
    assert checkpoint.tensors["model.embed_tokens.weight"].class_name == "Tensor"


def test_blocks_with_a_minimum_come_through_unchanged(source: Path, tmp_path: Path) -> None:
    """What the demo rests on: weights that lie on 16 levels in each group of 32 lose nothing by int4-weight-only."""
    on_levels = tmp_path / "levels"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            blocks = module.weight.data.view(-1, 32)
            codes = torch.randint(0, 16, blocks.shape, generator=generator)
            codes[:, 0], codes[:, 1] = 0, 15  # every block uses its whole range
            blocks.copy_(codes * 0.0625 - 0.375)
    model.save_pretrained(on_levels)
    options = ("--quantize", "int4-weight-only", "--group-size", 32, "--dtype", "float32", "--head", "float")
    assert run(on_levels, "--out", tmp_path / "out", *options) == 0
    loaded = load_model(detect(tmp_path / "out"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=1e-6)


def test_what_travels_with_the_model(source: Path, tmp_path: Path) -> None:
    assert run(source, "--out", tmp_path / "out", "--quantize", "int8-weight-only") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHATML
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["recipe"] == "int8-weight-only"
    assert provenance["source"]["name"] == "tiny"
    assert len(provenance["source"]["sha256"]["model.safetensors"]) == 64
    assert {"torch", "torchao", "transformers", "qserve"} <= set(provenance["versions"])


def test_the_loss_is_told_where_text_is_given(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prose.txt").write_text(prose()[:4000])
    text = ("--eval-data", tmp_path / "prose.txt", "--max-tokens", 301)
    command = (source, "--quantize", "intx-int2-weight-only", *text)
    assert run(*command, "--out", tmp_path / "dry", "--dry-run") == 0
    assert "would measure the loss on 300 tokens" in capsys.readouterr().out
    assert run(*command, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    loss = json.loads((tmp_path / "out" / "provenance.json").read_text())["loss"]
    assert (loss["tokens"], list(loss["files"])) == (300, ["prose.txt"])
    for name, model in (("float", source), ("artifact", tmp_path / "out")):
        told = measure(Evaluate(model=str(model), data=(tmp_path / "prose.txt",), max_tokens=301), console=QUIET)
        assert loss[name] == told["loss"]
        assert f"{loss[name]:.6f}" in shown
    assert loss["float"] != loss["artifact"]


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_shards_and_formats(format: str, source: Path, tmp_path: Path) -> None:
    options = ("--quantize", "int8-weight-only", "--format", format, "--max-shard-size", "60KB")
    assert run(source, "--out", tmp_path / "out", *options) == 0
    checkpoint = detect(tmp_path / "out")
    assert checkpoint.format == format
    assert len(checkpoint.files) > 1
    expected = quantized_in_memory(source, "int8-weight-only").state_dict()
    for name, weight in open_weights(checkpoint).items():
        assert torch.equal(values(weight), values(read_tensor(name, expected[name]))), name


def test_the_dtype_is_of_everything_that_stays_float(source: Path, tmp_path: Path) -> None:
    options = ("--quantize", "int4-weight-only", "--dtype", "float16")
    assert run(source, "--out", tmp_path / "out", *options) == 0
    checkpoint = detect(tmp_path / "out")
    assert checkpoint.config["dtype"] == "float16"
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float16}


def test_the_report_names_every_layer_and_what_differs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "--out", tmp_path / "out", "--quantize", "float8-dynamic-act-int4-weight") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "model.layers.*.mlp.down_proj 3 Float8DynamicActivationInt4Weight group 128" in shown
    assert "model.layers.*.mlp.up_proj" in shown
    assert "in_features 64 is not a multiple of the group size 128" in shown
    assert "model.embed_tokens 1 stays bfloat16: it is a look-up" in shown
    assert "times smaller" in shown


def test_a_dry_run_says_the_same_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (source, "--out", tmp_path / "out", "--quantize", "int4-weight-only")
    assert run(*options, "--dry-run") == 0
    rehearsed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "this was a dry run" in rehearsed
    assert run(*options) == 0
    performed = capsys.readouterr().out
    assert "times smaller" in rehearsed
    for line in rehearsed.splitlines():
        assert line in performed or line.startswith("would")


def test_killed_at_any_write_it_leaves_no_half_artifact(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    command = [sys.executable, "-m", "tests.training.kill_at_every_write", str(source), str(tmp_path / "out")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout.split()[-1]) >= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert run(source, "--out", tmp_path / "again", "--quantize", "int4-weight-only", "--group-size", 32) == 0
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "int5"), "no recipe is named 'int5'; known are int8-dynamic-act-int4-weight"),
        (("--quantize", "int8-weight-only", "--group-size", 32), "has no group size to set"),
        (("--quantize", "int8-weight-only", "--out", "/"), "exists already"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    options: tuple[object, ...], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "--out", tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_source_is_refused_with_the_way_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "--out", tmp_path / "once", "--quantize", "int8-weight-only") == 0
    assert run(tmp_path / "once", "--out", tmp_path / "twice", "--quantize", "int4-weight-only") == 2
    assert "quantized already by the recipe int8-weight-only" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none", "--out", tmp_path / "out", "--quantize", "mixed") == 2
    assert "does not exist; expected the directory of a checkpoint" in capsys.readouterr().err


def test_a_size_is_read_as_people_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--out", tmp_path / "out", "--quantize", "mixed", "--max-shard-size", "a lot")
    assert "'a lot' is no size" in capsys.readouterr().err
