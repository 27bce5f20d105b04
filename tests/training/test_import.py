"""GGUF to a transformers checkpoint: the same values, the same ids, everything a reader looks for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import load_model
from qserve.errors import ArtifactError, BrokenCheckpoint, NotACheckpoint, UsageError
from tests.tiny import CHATML, make_model
from tests.training.tiny_gguf import write_gguf
from training.cli import main
from training.import_gguf import import_gguf

QUIET = Console(quiet=True)
PROMPT = torch.tensor([[1, 17, 300, 45, 99, 260, 8, 411]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def model(*, tied: bool) -> Any:
    return make_model(tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})


@pytest.fixture(scope="module")
def imported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import")
    write_gguf(folder / "tiny.gguf", model)
    import_gguf(folder / "tiny.gguf", folder / "out", console=QUIET)
    return folder / "out"


def test_logits_equal_the_model_it_came_from(model: Any, imported: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32)
    rounded = make_model(
        tie_word_embeddings=model.config.tie_word_embeddings, rope_parameters=model.config.rope_parameters
    )
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(ours(PROMPT).logits, rounded(PROMPT).logits, rtol=0, atol=1e-5)


def test_the_files_say_what_readers_look_for(imported: Path, *, tied: bool) -> None:
    config = json.loads((imported / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 50_000.0
    assert config["tie_word_embeddings"] is tied
    assert config["dtype"] == "bfloat16"
    assert json.loads((imported / "generation_config.json").read_text())["eos_token_id"] == 2
    source = json.loads((imported / "provenance.json").read_text())["source"]
    assert list(source) == ["tiny.gguf"]
    assert len(source["tiny.gguf"]) == 64


def test_transformers_reads_the_tokenizer_as_it_stands(imported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.chat_template == CHATML
    digits = tokenizer("2024")["input_ids"]
    assert digits == [tokenizer.convert_tokens_to_ids(digit) for digit in "2024"]
    text = "12 monkeys,\n\n  and <|im_start|>naïve ones"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16])
def test_quantized_blocks_come_over_as_the_values_they_stand_for(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", make_model(), kind=kind)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", console=QUIET)
    loaded = load_model(detect(tmp_path / "out")).state_dict()
    assert set(values) == set(loaded)
    for name, value in values.items():
        assert torch.equal(loaded[name], value.bfloat16()), name


def test_it_shows_what_it_did(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", model)
    assert main(["import", str(tmp_path / "tiny.gguf"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "512 tokens, cut as smollm" in shown
    assert "3 layers of 64" in shown


def test_a_directory_in_the_way_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", console=QUIET)


def test_what_is_no_gguf_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="is no file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out", console=QUIET)
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    with pytest.raises(NotACheckpoint, match="does not begin as GGUF files do"):
        import_gguf(tmp_path / "page.gguf", tmp_path / "out", console=QUIET)


def test_an_unknown_pre_tokenizer_is_refused_and_can_be_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_model(), pre="brand-new")
    with pytest.raises(ArtifactError, match="'brand-new'"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", console=QUIET, pre_tokenizer="gpt-2")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_model(vocab_size=500))
    with pytest.raises(BrokenCheckpoint, match="512 tokens and embeddings for 500"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", console=QUIET)
