"""`qserve inspect` through the front door: the command on real checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qserve.checkpoint.save import save
from qserve.cli import main
from qserve.quant.apply import quantize
from qserve.quant.recipes import RECIPES
from tests import tiny


def artifact(
    directory: Path, recipe: str, *, head: str = "int8", group_size: int | None = None, **changes: Any
) -> Path:
    model = tiny.make_model(**changes).to(torch.bfloat16)
    resolved = quantize(model, RECIPES[recipe], head=head, group_size=group_size).recipe
    save(directory, model.state_dict(), config=model.config.to_dict(), recipe=resolved, provenance={"method": "rtn"})
    return directory


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_quantized_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = inspected(artifact(tmp_path / "out", "int4-weight-only", group_size=32), capsys)
    assert (told["recipe"], told["tier"], told["warnings"]) == ("int4-weight-only", "config", [])
    kinds = {(kind["role"], kind["group_size"]): kind for kind in told["kinds"]}
    assert set(kinds) == {("linear", 32), ("head", None), ("embedding", None), ("vector", None)}
    linear, head = kinds["linear", 32], kinds["head", None]
    assert (linear["stored_as"], linear["bits"], linear["num_tensors"]) == ("Int4Tensor", 4, 21)
    assert linear["bits_per_weight"] == 4 + 32 / 32  # a scale and a minimum for each group
    assert (head["stored_as"], head["bits"]) == ("Int8Tensor", 8)
    assert all(kind["kernel"] for kind in (linear, head))
    assert kinds["embedding", None]["reason"] == "rows are looked up, not multiplied"
    assert linear["reason"] == ""
    assert told["num_bytes"] == sum(kind["num_bytes"] for kind in told["kinds"])
    assert told["provenance"]["method"] == "rtn"


def test_why_a_head_is_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = inspected(artifact(tmp_path / "out", "int8-dynamic-act-int4-weight", head="float"), capsys)
    kinds = {kind["role"]: kind for kind in told["kinds"]}
    assert kinds["head"]["reason"] == "the recipe leaves the head float"
    assert kinds["linear"]["activation"] == "int8-asymmetric"


def test_a_float_model_has_nothing_to_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = inspected(tiny.make_checkpoint(tmp_path), capsys)
    assert (told["recipe"], told["tier"], told["bits_per_weight"]) == (None, "none", 32)
    assert {kind["reason"] for kind in told["kinds"]} == {""}


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = artifact(tmp_path / "out", "int8-weight-only")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["quant_type"]
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    for words in ("tensors by kind", "left float", "Int8", "metadata", "bits per weight", "rtn"):
        assert words in printed


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "empty" in capsys.readouterr().err


def test_without_a_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    told = inspected(tiny.make_checkpoint(tmp_path / "model"), capsys)
    assert {kind["kernel"] for kind in told["kinds"] if kind["role"] == "linear"} == {"torch"}
