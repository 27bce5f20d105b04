"""Scores against plain formulas, the server against transformers, and a whole comparison."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from qserve.errors import UsageError
from tests.tiny import make_checkpoint, make_model, prose
from training.choices import Item, accuracy, read_items
from training.cli import main
from training.compare import METHODS
from training.data import load_tokenizer
from training.evaluate import Evaluate, evaluate
from training.plot import draw
from training.report import aggregate, markdown
from training.scores import score
from training.served import serving

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, an artifact of it without quantized activations, a text and a few questions."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_checkpoint(folder / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    command = ["finalize", str(folder / "model"), "--out", str(folder / "int4"), "--quantize", "int4-weight-only"]
    assert main([*command, "--group-size", "32"]) == 0
    (folder / "prose.txt").write_text(prose()[:6000])
    items = [{"query": "The sky is", "choices": ["blue", "a kind of fish", "two"], "gold": 0}] * 3
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def test_scores_are_those_of_the_formulas() -> None:
    model, reference = make_model(), make_model(seed=1)
    windows = torch.randint(500, (3, 300), generator=torch.Generator().manual_seed(0))
    found = score(model, windows, reference=reference)
    with torch.no_grad():
        log_p = model(windows[:, :-1]).logits.log_softmax(-1).flatten(0, 1)
        log_q = reference(windows[:, :-1]).logits.log_softmax(-1).flatten(0, 1)
    assert found.tokens == 3 * 299
    assert found.loss == pytest.approx(float(F.nll_loss(log_p, windows[:, 1:].flatten())), rel=1e-5)
    assert found.kl == pytest.approx(float(F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")), rel=1e-5)
    assert found.agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte(4.0) == pytest.approx(found.loss / math.log(2) / 4)
    assert score(model, windows, reference=model).kl == 0


def measure(folder: Path, **wanted: Any) -> dict[str, Any]:
    basis = {"data": (folder / "prose.txt",), "window": 100, "max_tokens": 1001}
    return evaluate(Evaluate(model=str(folder / "int4"), **basis, **wanted), console=QUIET)


def test_transformers_and_the_server_agree(folder: Path) -> None:
    against = {"reference": str(folder / "model"), "choices": folder / "questions.jsonl"}
    ours = measure(folder, **against)
    with serving(folder / "int4", "--kernels", "native", "--kv-cache-dtype", "float32") as server:
        theirs = measure(folder, **against, through="qserve", server=server.url)
    assert ours["tokens"] == theirs["tokens"] == 1000
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    assert theirs["agreement"] == pytest.approx(ours["agreement"], abs=0.002)
    assert theirs["choices"] == ours["choices"]
    assert ours["kl"] > 0


def test_a_server_is_started_where_none_is_named(folder: Path) -> None:
    assert measure(folder, through="qserve")["loss"] == pytest.approx(measure(folder)["loss"], abs=1e-5)


def test_the_word_prints_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(folder / "int4"), "--data", str(folder / "prose.txt"), "--window", "64"]
    assert main([*command, "--max-tokens", "500", "--json", str(tmp_path / "result.json")]) == 0
    told = json.loads((tmp_path / "result.json").read_text())
    assert f"{told['loss']:.5f}" in capsys.readouterr().out
    assert set(told) == {"model", "through", "tokens", "loss", "perplexity", "bits_per_byte", "data"}


def test_nothing_to_measure_with_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="give --data, --choices or both"):
        evaluate(Evaluate(model=str(folder / "int4")), console=QUIET)
    with pytest.raises(UsageError, match=r"questions\.jsonl, record 1, holds query, choices, gold"):
        evaluate(Evaluate(model=str(folder / "int4"), data=(folder / "questions.jsonl",)), console=QUIET)


def test_a_server_that_is_not_there_is_told(folder: Path) -> None:
    wanted = Evaluate(
        model=str(folder / "int4"), data=(folder / "prose.txt",), through="qserve", server="http://127.0.0.1:9"
    )
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:9 does not answer"):
        evaluate(wanted, console=QUIET)


def test_choices_are_scored_by_their_own_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    likely = set(tokenizer(" blue", add_special_tokens=False)["input_ids"])

    def likelihoods(ids: Sequence[int]) -> list[float]:
        """Every token of "blue" is likely, all others are not."""
        return [-0.1 if token in likely else -1.0 for token in ids[1:]]

    items = [
        Item(query="The sky is", choices=("blue", "a kind of fish"), gold=0),
        Item(query="?", choices=("zzz", "blue"), gold=0),
    ]
    found = accuracy(items, likelihoods, tokenizer, between=" ")
    assert (found.items, found.summed, found.per_byte) == (2, 0.5, 0.5)


def test_a_broken_item_is_named(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "a"}\n')
    with pytest.raises(UsageError, match=r"items\.jsonl, line 2, is no item.*'choices'"):
        read_items(tmp_path / "items.jsonl")


def entry(method: str, kl: float, perplexity: float, **more: Any) -> dict[str, Any]:
    basis = {"loss": math.log(perplexity), "agreement": 0.9, "bytes": 1_000_000, "bits_per_weight": 4.5}
    return {"method": method, "kl": kl, "perplexity": perplexity, **basis, **more}


def test_what_is_recovered_is_of_roundings_loss() -> None:
    found = [entry("float", 0, 10.0), entry("rtn", 0.2, 14.0), entry("qat", 0.04, 11.0), entry("qat", 0.06, 12.0)]
    rows = {row.method: row for row in aggregate(found)}
    assert rows["float"].recovered_kl is None
    qat = rows["qat"]
    assert qat.recovered_kl is not None
    assert (qat.recovered_kl.mean, qat.recovered_kl.low, qat.recovered_kl.high) == pytest.approx((0.75, 0.7, 0.8))
    assert qat.recovered_perplexity is not None
    assert qat.recovered_perplexity.mean == pytest.approx(0.625)
    assert "| qat (2 seeds) |" in markdown(list(rows.values()))
    assert "75.0 ± 5.0 %" in markdown(list(rows.values()))
    picture = ElementTree.fromstring(draw(list(rows.values())))
    assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == 2  # the float model has no divergence


def test_a_whole_comparison_goes_on_where_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(folder / "model"), "--data", str(folder / "prose.txt"), "--out", str(out)]
    command += ["--eval-data", str(folder / "prose.txt"), "--window", "64", "--max-tokens", "300", "--no-speed"]
    command += ["--tokens", "256", "--sequence-length", "32", "--batch-size", "2", "--held-out", "200"]
    assert main([*command, "--seeds", "0", "1"]) == 0
    table = (out / "table.md").read_text()
    assert all(f"| {name}" in table for name in METHODS)
    written = json.loads((out / "table.json").read_text())
    assert len(written["all"]) == 2 + 2 * 3
    capsys.readouterr()
    assert main([*command, "--seeds", "0", "1"]) == 0
    assert "step" not in capsys.readouterr().out
    assert json.loads((out / "table.json").read_text()) == written
    capsys.readouterr()
    assert main([*command, "--seeds", "0", "--learn-ranges"]) == 2
    assert "training.learn_ranges was None and is True" in capsys.readouterr().err
