"""New tokens, templates, stops and sampling: written into the artifact, and what is wrong refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import load_model
from qserve.errors import UsageError
from tests.tiny import VOCABULARY_SIZE, make_checkpoint
from training.cli import main
from training.dressing import TEMPLATES, read_template, read_tokens

TOKENS = """\
- token: <|tool|>
- token: <|zero|>
  init: zero
- token: plain
  special: false
  init: copy
  like: <|im_end|>
- <|im_start|>
"""


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "tiny"
    return make_checkpoint(directory, num_hidden_layers=1, tie_word_embeddings=request.param)


def finalize(source: Path, out: Path, *options: str) -> Path:
    assert main(["finalize", str(source), "--out", str(out), *options]) == 0
    return out


def generation(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((path / "generation_config.json").read_text())
    return told


def test_new_tokens_have_rows_of_their_own(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens.yaml").write_text(TOKENS)
    out = finalize(source, tmp_path / "out", "--add-tokens", str(tmp_path / "tokens.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.convert_tokens_to_ids(["<|tool|>", "<|zero|>", "plain"])
    assert ids == [VOCABULARY_SIZE, VOCABULARY_SIZE + 1, VOCABULARY_SIZE + 2]
    assert tokenizer("a<|tool|>").input_ids[-1] == ids[0]
    before, after = load_model(detect(source)), AutoModelForCausalLM.from_pretrained(out)
    for find in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, find)().weight, getattr(after, find)().weight
        assert len(new) == VOCABULARY_SIZE + 3
        assert torch.equal(new[:VOCABULARY_SIZE], old)
        torch.testing.assert_close(new[ids[0]], old.mean(0))
        assert not new[ids[1]].any()
        assert torch.equal(new[ids[2]], old[2])
    quantized = finalize(
        source, tmp_path / "int8", "--add-tokens", str(tmp_path / "tokens.yaml"), "--quantize", "int8-weight-only"
    )
    assert detect(quantized).tensors["lm_head.weight"].shape[0] == VOCABULARY_SIZE + 3


def test_template_stops_and_sampling(source: Path, tmp_path: Path) -> None:
    options = ["--chat-template", "zephyr", "--stop", "<|endoftext|>", "--generation", "balanced"]
    out = finalize(source, tmp_path / "out", "--quantize", "int8-weight-only", *options)
    told = generation(out)
    ids = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}
    assert told == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, **ids}
    said = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<|user|>\nHi<|im_end|>\n"


def test_without_a_word_on_sampling(source: Path, tmp_path: Path) -> None:
    out = finalize(source, tmp_path / "out", "--quantize", "int8-weight-only", "--generation", "none")
    assert generation(out) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_a_dry_run_says_what_would_be_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finalize(source, tmp_path / "out", "--generation", "greedy", "--chat-template", "chatml", "--dry-run")
    assert "would write anew chat_template.jinja, generation_config.json" in capsys.readouterr().out.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1", "holds no list of tokens"),
        ("- [", "is no YAML"),
        ("- token: a\n  colour: red", "is no token; expected token"),
        ("- token: a\n  init: random", "expected mean, zero, or copy"),
        ("- token: a\n  init: copy", "expected mean, zero, or copy"),
    ],
)
def test_wrong_tokens_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "tokens.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        read_tokens(tmp_path / "tokens.yaml")


def test_what_is_not_there_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finalize", str(source), "--out", str(tmp_path / "out")]
    assert main([*command, "--stop", "<|never|>"]) == 2
    assert "the tokenizer has no such token; add it with --add-tokens" in capsys.readouterr().err
    assert main(command) == 2
    assert "name a recipe, --quantize" in capsys.readouterr().err
    assert main([*command, "--quantize", "mixed", "--step", "3"]) == 2
    assert "is no run and has no steps" in capsys.readouterr().err
    with pytest.raises(UsageError, match="bundled templates, chatml, zephyr"):
        read_template("alpaca")
    assert set(TEMPLATES) == {"chatml", "zephyr"}
