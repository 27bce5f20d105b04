"""The command qserve-train: its words, its help, and what it costs to start."""

import subprocess
import sys
from pathlib import Path

import pytest

from qserve.quant.recipes import RECIPES
from tests.tiny import make_checkpoint
from training.cli import WORDS, main


def test_help_names_every_word_and_shows_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for name, word in WORDS.items():
        assert f"{name} " in shown
        assert word.purpose in shown
    assert "qserve-train finalize model-float --out model-int4 --quantize" in shown


@pytest.mark.parametrize("word", WORDS)
def test_every_word_has_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([word, "--help"])
    assert f"usage: qserve-train {word}" in capsys.readouterr().out


def test_an_unknown_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bake"])
    assert "invalid choice: 'bake'" in capsys.readouterr().err


def test_recipes_are_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name in RECIPES:
        assert name in shown


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "source")
    capsys.readouterr()
    too_long = tmp_path / ("out" * 100)
    assert main(["finalize", str(source), "--out", str(too_long), "--quantize", "mixed"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qserve-train: [Errno ")
    assert said.count("\n") == 1


def test_finding_the_demo_and_help_load_no_torch() -> None:
    """`qserve serve` asks for the demo on every start without a model."""
    code = (
        "import sys, training.cli, training.demo; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
