"""`qserve bench` through the front door: against the server of `fake_server.py`, and against our own on tiny models."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from qserve.bench.work import Work, WorkConfig
from qserve.checkpoint.save import save
from qserve.cli import main
from qserve.quant.apply import quantize
from qserve.quant.recipes import RECIPES
from tests import tiny
from tests.bench.fake_server import NUM_TOKENS

PLAIN = ["--kernels", "reference"]  # nothing here depends on which kernels compute


def bench(*arguments: str, folder: Path, status: int = 0) -> dict[str, Any]:
    """The JSON document of `qserve bench ARGUMENTS`."""
    path = folder / "result.json"
    assert main(["bench", *arguments, "--json", str(path)]) == status
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["machine"]["cores"] >= 1
    assert document["qserve"]["version"]
    return document


def rows_of(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["target"], row["load"]): row for row in document["rows"]}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny float model, and the same with int8 weights and a recorded loss."""
    folder = tmp_path_factory.mktemp("models")
    source = tiny.make_checkpoint(folder / "float")
    model = tiny.make_model().to(torch.bfloat16)
    recipe = quantize(model, RECIPES["int8-weight-only"]).recipe
    config, quantized = model.config.to_dict(), folder / "int8"
    provenance = {"loss": {"tokens": 100, "float": 3.0, "trained": 3.25, "artifact": 3.25}}
    save(quantized, model.state_dict(), config=config, recipe=recipe, source=source, provenance=provenance)
    return source, quantized


def test_serve_takes_turns_and_says_who_answers_badly(fake: str, tmp_path: Path) -> None:
    names = ["good", "crlf", "busy", "no-usage", "cut"]
    document = bench(
        *("serve", *(f"{name}={fake}#{name}" for name in names), "elsewhere=http://127.0.0.1:1"),
        *("--concurrency", "1,3", "--repeats", "2", "--num-prompts", "4", "--goodput", "ttft:60000"),
        *("--csv", str(tmp_path / "figures.csv"), "--html", str(tmp_path / "page.html"), "--save-detailed"),
        folder=tmp_path,
        status=1,  # some rows have no figures
    )
    rows = rows_of(document)
    assert len(rows) == 2 * 6
    good = rows["good", "3 clients"]
    assert good["notes"] == []
    for run in good["repeats"]:
        assert (run["completed"], run["failed"], run["max_concurrency"]) == (4, 0, 3)
        assert (run["total_input_tokens"], run["total_output_tokens"]) == (4 * 5, 4 * NUM_TOKENS)
        assert run["total_cached_tokens"] == 4 * 2
        assert run["output_throughput"] == pytest.approx(4 * NUM_TOKENS / run["duration"])
        assert run["request_goodput"] == pytest.approx(4 / run["duration"])
        assert [len(gaps) for gaps in run["itls"]] == [2] * 4
    assert good["summary"]["output_throughput"]["estimate"]["number"] == 2
    assert rows["crlf", "1 client"]["summary"]["output_throughput"]["ratio_to_first"]["mean"] > 0
    assert rows["busy", "1 client"]["notes"] == ["8 of 8 failed: HTTP 503: 'loading'"]
    assert rows["busy", "1 client"]["repeats"][0]["failed"] == 4
    assert rows["no-usage", "1 client"]["notes"] == ["8 of 8: no usage, so tokens are not known"]
    assert rows["no-usage", "1 client"]["repeats"][0]["output_throughput"] is None
    assert rows["no-usage", "1 client"]["repeats"][0]["median_ttft_ms"] > 0
    assert "closed before" in rows["cut", "1 client"]["notes"][0]
    assert rows["elsewhere", "1 client"]["repeats"] == []
    assert "no connection" in rows["elsewhere", "1 client"]["notes"][0]
    assert document["targets"][0]["model_id"] == "good"

    lines = list(csv.DictReader((tmp_path / "figures.csv").read_text().splitlines()))
    assert len(lines) == 2 * 5 * 2  # loads, targets that could be asked, repeats
    assert float(lines[0]["median_ttft_ms"]) > 0
    check_page((tmp_path / "page.html").read_text(), document)


class Page(HTMLParser):
    """What a page holds: its tags, and what they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.documents: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.documents.append(data)


def check_page(text: str, document: dict[str, Any]) -> None:
    page = Page(text)
    assert page.loaded == []
    assert "@import" not in text
    assert "url(" not in text
    assert page.tags.count("tr") == 1 + len(document["rows"])
    assert page.tags.count("svg") > 8
    assert json.loads(page.documents[0]) == document


def test_a_rate_and_a_file_of_prompts(fake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Hello"}, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = ["--dataset", str(tmp_path / "prompts.jsonl"), "--request-rate", "200", "--num-prompts", "6"]
    document = bench("serve", f"{fake}#good", *given, "--repeats", "1", folder=tmp_path)
    (row,) = document["rows"]
    assert row["load"] == "200/s"
    assert row["repeats"][0]["completed"] == 6
    assert row["repeats"][0]["request_rate"] == 200.0
    assert row["summary"]["output_throughput"]["estimate"]["half_width"] is None
    assert "200/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["serve", "localhost:8000"], "names no server"),
        (["serve", "http://a", "http://a"], "labelled 'a'"),
        (["serve", "http://a", "--html", "no/such/folder/a.html"], "folder it names does not exist"),
        (["serve", "http://127.0.0.1:1", "--repeats", "0"], "--repeats is 0"),
        (["serve", "http://127.0.0.1:1", "--dataset", "none.jsonl"], "none.jsonl cannot be read"),
        (["serve", "http://127.0.0.1:1", "--extra-body", "[1]"], "expected a JSON object"),
        (["serve", "http://127.0.0.1:1", "--prefix-len", "128"], "at least one token must come after"),
        (["compare", "/no/model", *PLAIN], "does not exist"),
    ],
)
def test_what_the_user_can_put_right(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_prompts_have_the_length_asked_for_and_are_new_in_every_run() -> None:
    work = Work(WorkConfig(input_len=24, prefix_len=16), vocab_size=500)
    first, second = work.make_prompts(5, run=0), work.make_prompts(5, run=1)
    assert {len(prompt) for prompt in first + second} == {24}
    assert {tuple(prompt[:16]) for prompt in first + second} == {tuple(first[0][:16])}
    assert len({tuple(prompt[16:]) for prompt in first + second}) == 10
    assert all(100 <= token < 500 for prompt in first for token in prompt)
    assert first == Work(WorkConfig(input_len=24, prefix_len=16), vocab_size=500).make_prompts(5, run=0)


def test_compare_starts_a_server_for_each_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    work = ["--input-len", "20", "--output-len", "6", "--num-prompts", "4", "--concurrency", "2", "--repeats", "2"]
    document = bench("compare", *map(str, models), *PLAIN, *work, folder=tmp_path)
    rows = rows_of(document)
    for label in ("float", "int8"):
        for run in rows[label, "2 clients"]["repeats"]:
            assert (run["completed"], run["failed"], run["total_cached_tokens"]) == (4, 0, 0)
            assert (run["total_input_tokens"], run["total_output_tokens"]) == (4 * 20, 4 * 6)
            assert run["rss_mib"] > 0
        assert rows[label, "2 clients"]["notes"] == []
    wide, narrow = (rows[label, "2 clients"]["repeats"][0] for label in ("float", "int8"))
    assert narrow["weights_mib"] < wide["weights_mib"]
    assert (wide["loss"], narrow["loss"]) == (None, 3.25)
    assert document["targets"][1]["details"]["recipe"] == "int8-weight-only"


def test_throughput_and_latency_in_this_process(models: tuple[Path, Path], tmp_path: Path) -> None:
    given = [*map(str, models), *PLAIN, "--threads", "1", "--input-len", "16", "--output-len", "5"]
    document = bench("throughput", *given, "--num-prompts", "6", "--repeats", "2", folder=tmp_path)
    for row in document["rows"]:
        for run in row["repeats"]:
            assert (run["num_requests"], run["total_num_tokens"]) == (6, 6 * (16 + 5))
            assert run["tokens_per_second"] == pytest.approx(run["total_num_tokens"] / run["elapsed_time"])
    document = bench("latency", *given, "--batch-size", "2", "--num-iters", "3", folder=tmp_path)
    for row in document["rows"]:
        assert row["avg_latency"] == pytest.approx(sum(row["latencies"]) / 3)
        assert row["percentiles"]["50"] == pytest.approx(sorted(row["latencies"])[1])
        assert all(0 < run["ttft"] < run["latency"] for run in row["repeats"])


def test_startup(models: tuple[Path, Path], tmp_path: Path) -> None:
    document = bench("startup", str(models[0]), *PLAIN, "--repeats", "1", folder=tmp_path)
    (run,) = document["rows"][0]["repeats"]
    assert 0 < run["listening_s"] <= run["ready_s"] < run["first_token_s"]
    assert run["imports_s"] > 0
    assert run["weights_s"] >= 0
    assert run["imports_s"] + run["weights_s"] < run["ready_s"]
    assert 0 < run["beside_mib"] < run["rss_mib"] <= run["peak_rss_mib"]
