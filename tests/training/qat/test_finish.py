"""What a run becomes: the artifact computes what was trained, in transformers and in our own model of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import open_weights
from qserve.errors import UsageError
from qserve.quant.weight import QuantizedWeight
from tests.training.qat.running import begin, finish, go_on, make_source, trained
from training.artifact import load_for_measuring
from training.cli import main
from training.config import TrainOptions
from training.qat.finalize import load_trained
from training.qat.loop import Training
from training.qat.model import build
from training.run import Run, open_run

IDS = torch.tensor([[1, 17, 300, 45, 99, 260, 8, 411]])
WAYS: dict[str, dict[str, Any]] = {
    "weights": {},
    "ranges": {"learn_ranges": True},
    "ranges alone": {"learn_ranges": True, "train": "ranges"},
    "adapter": {"train": "adapter"},
    "adapter and ranges, late": {"train": "adapter", "learn_ranges": True, "start": 0.5},
}


def provenance(artifact: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((artifact / "provenance.json").read_text())
    return told


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", ["int8-dynamic-act-int4-weight", "int4-weight-only", "mixed"])
def test_the_artifact_is_what_was_trained(source: Path, text: Path, tmp_path: Path, way: str, recipe: str) -> None:
    begin(source, tmp_path / "run", recipe=recipe, group_size=32)
    assert go_on(tmp_path / "run", text, **WAYS[way])
    artifact = finish(tmp_path / "run", tmp_path / "out")
    loss = provenance(artifact)["loss"]
    assert abs(loss["artifact"] - loss["trained"]) <= 1e-6
    _, trainee = load_trained(open_run(tmp_path / "run"))
    trainee.settle()
    with torch.no_grad():
        wanted = trainee.model(IDS).logits
        assert torch.equal(load_for_measuring(detect(artifact))(IDS).logits, wanted)
    assert not [name for name in detect(artifact).tensors if "adapter" in name or "quantizer" in name]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_it_with_equal_logits(text: Path, tmp_path: Path, tied: bool) -> None:
    source = make_source(tmp_path / "source", tie_word_embeddings=tied)
    begin(source, tmp_path / "run", dtype="float32")  # torchao's linear takes activations of the scales' dtype alone
    assert go_on(tmp_path / "run", text, learn_ranges=True)
    artifact = finish(tmp_path / "run", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(IDS).logits, load_for_measuring(detect(artifact))(IDS).logits, rtol=1e-4, atol=1e-4
        )


def test_learned_scales_are_in_the_artifact(source: Path, text: Path, tmp_path: Path) -> None:
    run = trained(source, text, tmp_path / "run", learn_ranges=True, range_learning_rate=0.05)
    weights = open_weights(detect(finish(run.path, tmp_path / "out")))
    _, trainee = load_trained(run)
    for name, rounder in trainee.rounders.items():
        weight = weights[f"{name}.weight"]
        assert isinstance(weight, QuantizedWeight)
        assert rounder.ranges is not None
        assert torch.equal(weight.scales, rounder.ranges.scales)
        usual, _ = rounder.grid.choose(trainee.weight(name).bfloat16().view(*weight.scales.shape, -1))
        assert not torch.equal(weight.scales, usual)  # the naive way would have chosen these


def test_a_float_run_becomes_a_checkpoint(source: Path, text: Path, tmp_path: Path) -> None:
    run = trained(source, text, tmp_path / "run", recipe="float")
    out = finish(run.path, tmp_path / "out")
    assert detect(out).recipe is None
    assert provenance(out)["method"] == "float training"
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS).logits
        assert torch.equal(load_for_measuring(detect(out))(IDS).logits, found)
    assert main(["finalize", str(out), "--out", str(tmp_path / "rounded"), "--quantize", "int8-weight-only"]) == 0


def test_provenance_tells_how_it_was_made(done: Run, tmp_path: Path) -> None:
    told = provenance(finish(done.path, tmp_path / "out"))
    assert told["method"] == "quantization-aware training"
    assert told["recipe"] == "int8-dynamic-act-int4-weight"
    assert told["training"] == done.manifest["training"]
    assert set(told["loss"]) == {"tokens", "float", "trained", "artifact"}
    assert str(tmp_path.parent) not in json.dumps(told)


def test_it_is_measured_on_other_text_where_that_is_given(done: Run, text: Path, tmp_path: Path) -> None:
    loss = provenance(finish(done.path, tmp_path / "out", eval_data=(text,), max_tokens=201))["loss"]
    assert (loss["tokens"], list(loss["files"])) == (200, [text.name])
    assert loss["artifact"] == pytest.approx(loss["trained"], abs=1e-6)


def test_an_earlier_checkpoint_can_be_chosen(done: Run, tmp_path: Path) -> None:
    told = provenance(finish(done.path, tmp_path / "six", step=6))
    assert (told["step"], told["steps"]) == (6, 8)
    with pytest.raises(UsageError, match="no checkpoint of step 5; it has those of 6, 8"):
        finish(done.path, tmp_path / "five", step=5)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["made", "rehearsed"])
def test_a_run_that_is_not_at_its_end_says_so(
    done: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    def said(*options: str) -> str:
        assert main(["finalize", str(done.path), *options, *more]) == 0
        return capsys.readouterr().out

    assert "step 6 of 8" in said("--out", str(tmp_path / "six"), "--step", "6")
    assert "of 8" not in said("--out", str(tmp_path / "eight"))


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"recipe": "int8-weight-only"}, "trained with recipe int8-dynamic-act-int4-weight, not int8-weight-only"),
        ({"group_size": 64}, "trained with group size None, not 64"),
        ({"head": "same"}, "trained with head int8, not same"),
        ({"dtype": "float32"}, "trained with dtype bfloat16, not float32"),
    ],
)
def test_another_recipe_than_the_runs_is_refused(done: Run, tmp_path: Path, wanted: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        finish(done.path, tmp_path / "out", **wanted)


def test_its_own_recipe_may_be_said(done: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finalize", str(done.path), "--out", str(tmp_path / "out"), "--quantize", "int8-dynamic-act-int4-weight"]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out.replace("\n", " ")
    assert "step-000008 of a run of int8-dynamic-act-int4-weight" in told
    assert "would measure the loss on" in told
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_is_not_trained_again(done: Run, tmp_path: Path) -> None:
    artifact = finish(done.path, tmp_path / "out")
    with pytest.raises(UsageError, match=r"quantized already; there is no training from rounded weights"):
        begin(artifact, tmp_path / "again")


def test_a_run_that_was_never_trained_is_told(source: Path, tmp_path: Path) -> None:
    begin(source, tmp_path / "run")
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        finish(tmp_path / "run", tmp_path / "out")


class PastTheHead(torch.nn.Module):
    """Computes its logits from the head's weight itself, as fused losses do."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = self.inner.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return type("Output", (), {"logits": hidden @ self.inner.lm_head.weight.t()})


def test_a_fake_quantizer_that_did_not_run_fails_the_first_step(source: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    options = TrainOptions(sequence_length=16, batch_size=1, objective="task", precision="fp32")
    trainee = build(begin(source, tmp_path / "run"), options)
    trainee.model = PastTheHead(trainee.model)
    trainee.rounders = {f"inner.{name}": rounder for name, rounder in trainee.rounders.items()}
    windows = torch.randint(500, (4, 17))
    training = Training(
        trainee, options, windows=windows, teacher=None, kl_share=0.0, accelerator=Accelerator(cpu=True)
    )
    with pytest.raises(UsageError, match=r"1 of 8 fake quantizers did not run in the first step.*lm_head"):
        training.advance()


def test_a_weight_is_rounded_once_a_step_under_accumulation(source: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator

    options = TrainOptions(sequence_length=16, batch_size=4, micro_batch=1, objective="task", precision="fp32")
    trainee = build(begin(source, tmp_path / "run"), options)
    windows = torch.randint(500, (8, 17))
    training = Training(
        trainee, options, windows=windows, teacher=None, kl_share=0.0, accelerator=Accelerator(cpu=True)
    )
    for _ in range(2):
        training.advance()
    assert {rounder.num_roundings for rounder in trainee.rounders.values()} == {2}
    assert {rounder.num_calls for rounder in trainee.rounders.values()} == {8}
