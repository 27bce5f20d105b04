"""Runs that train: resumed, killed, stopped, told other options, shared by two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qserve.errors import BrokenCheckpoint, UsageError
from tests.training.qat.running import OPTIONS, begin, fingerprint, go_on, make_source, trained
from training.run import Run, open_run

ROOT = Path(__file__).parents[3]


def entries(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]


def flags(**changes: Any) -> list[str]:
    return [
        word for name, value in {**OPTIONS, **changes}.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def test_a_finished_run_is_recognised(done: Run, text: Path) -> None:
    before = fingerprint(done.find(None))
    assert [path.name for path in done.checkpoints] == ["step-000006", "step-000008"]
    assert [entry["step"] for entry in entries(done)] == list(range(1, 9))
    assert go_on(done.path, None)
    assert go_on(done.path, text)
    assert fingerprint(done.find(None)) == before


def test_it_learns(done: Run) -> None:
    divergences = [entry["kl"] for entry in entries(done)]
    assert divergences[-1] < 0.9 * divergences[0]
    assert all(entry["rounds"] for entry in entries(done))


@pytest.mark.parametrize(
    "changes",
    [
        {"learn_ranges": True, "start": 0.5},
        {"train": "adapter", "objective": "mixture"},
        {"train": "ranges", "learn_ranges": True},
        {"objective": "task", "precision": "bf16"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_resumed_is_uninterrupted(source: Path, text: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = trained(source, text, tmp_path / "whole", **changes)
    cut = trained(source, text, tmp_path / "cut", **changes)
    assert whole.manifest == cut.manifest
    os.rename(cut.checkpoints[-1], tmp_path / "aside")  # as if it had been killed after step 6, its log written on
    assert go_on(cut.path, None, **changes)
    assert fingerprint(cut.find(None)) == fingerprint(whole.find(None)) == fingerprint(tmp_path / "aside")
    assert [entry["step"] for entry in entries(cut)] == list(range(1, 9))


def test_killed_at_every_write_it_ends_the_same(source: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.qat.kill_train", source, text, tmp_path]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert int(ended.stdout.splitlines()[-1]) > 12


def test_sigterm_commits_and_has_its_own_status(source: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"tokens": 64 * 200, "save_every": 1000}
    begin(source, run)
    command = [sys.executable, "-m", "training.cli", "train", "--run", str(run), "--data", str(text), *flags(**changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (run / "log.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err.decode()[-2000:]
    assert b"the same command goes on" in out
    stopped = open_run(run).latest()
    assert stopped is not None
    assert 1 <= stopped[0]["step"] < 200


@pytest.mark.parametrize("how", [[], ["--shard", "--learn-ranges"]], ids=["replicated", "sharded"])
def test_two_processes_train_as_one(source: Path, text: Path, tmp_path: Path, how: list[str]) -> None:
    changes = {"tokens": 64 * 20, "learning_rate": 1e-4, "range_learning_rate": 1e-4, "log_every": 20}
    one = trained(source, text, tmp_path / "one", **changes, learn_ranges="--learn-ranges" in how)
    begin(source, tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    command = [*launch, "-m", "training.cli", "train", "--run-dir", str(tmp_path / "two"), "--data", str(text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *how, *flags(**changes)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    alone, together = one.latest(), open_run(tmp_path / "two").latest()
    assert alone is not None
    assert together is not None
    assert alone[0]["step"] == together[0]["step"] == 20
    assert alone[0]["held_out_loss"] == pytest.approx(together[0]["held_out_loss"], abs=1e-4)
    for name in (name for name in alone[1] if name.startswith("parameter/")):
        torch.testing.assert_close(together[1][name], alone[1][name], rtol=0, atol=1e-4)


def test_other_options_are_named(done: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"options\.learning_rate was 0\.001 and is 0\.1; options\.seed was 0 and is 3"
    ):
        go_on(done.path, None, learning_rate=0.1, seed=3)
    other = tmp_path / "prose.txt"
    other.write_text("another text")
    with pytest.raises(UsageError, match=r"data\.prose\.txt was '\w+' and is"):
        go_on(done.path, other)


def test_another_source_is_named(source: Path, text: Path, tmp_path: Path) -> None:
    own = make_source(tmp_path / "own")
    run = trained(own, text, tmp_path / "run", tokens=64)
    (own / "config.json").write_text((own / "config.json").read_text() + "\n")
    with pytest.raises(UsageError, match=r"source\.sha256\.config\.json was '\w+' and is"):
        go_on(run.path, None, tokens=64)


def test_a_cut_checkpoint_is_told_and_the_one_before_kept(source: Path, text: Path, tmp_path: Path) -> None:
    run = trained(source, text, tmp_path / "run")
    whole = fingerprint(run.find(None))
    tensors = run.find(None) / "tensors.safetensors"
    os.truncate(tensors, tensors.stat().st_size - 100)
    with pytest.raises(BrokenCheckpoint, match=r"step-000008 cannot be read.*cut short.*to go on from step-000006"):
        go_on(run.path, None)
    for file in (*run.find(None).iterdir(), run.find(None)):
        file.rmdir() if file.is_dir() else file.unlink()
    assert go_on(run.path, None)
    assert fingerprint(run.find(None)) == whole


def test_two_at_once_are_refused(done: Run) -> None:
    with done.locked(), pytest.raises(UsageError, match="another process works on"):
        go_on(done.path, None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "kl"}, "a float run trains its weights on the text itself"),
        ({"batch_size": 0}, "--batch-size is 0; expected at least 1"),
        ({"warmup": 1.5}, "--warmup is 1.5; expected between 0 and 1"),
        ({"sequence_length": 100_000}, r"a window of 100000 needs one more"),
    ],
)
def test_wrong_options_are_refused(
    source: Path, text: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    begin(source, tmp_path / "run", recipe="float")
    with pytest.raises(UsageError, match=told):
        go_on(tmp_path / "run", text, **changes)


def test_a_float_run_trains_without_rounding(source: Path, text: Path, tmp_path: Path) -> None:
    run = trained(source, text, tmp_path / "run", recipe="float")
    losses = [entry["loss"] for entry in entries(run)]
    assert losses[-1] < losses[0]
    assert not any(entry["rounds"] for entry in entries(run))


def test_a_model_begins_from_its_config_alone(source: Path, text: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (fresh / name).write_text((source / name).read_text())
    first = trained(fresh, text, tmp_path / "first", recipe="float", tokens=64)
    again = trained(fresh, text, tmp_path / "again", recipe="float", tokens=64)
    other = trained(fresh, text, tmp_path / "other", recipe="float", tokens=64, seed=1)
    assert fingerprint(first.find(None)) == fingerprint(again.find(None)) != fingerprint(other.find(None))


def test_the_same_prepare_again_is_the_same_run(source: Path, tmp_path: Path) -> None:
    begin(source, tmp_path / "run")
    begin(source, tmp_path / "run")
    with pytest.raises(UsageError, match=r"recipe was 'int8-dynamic-act-int4-weight' and is 'int8-weight-only'"):
        begin(source, tmp_path / "run", recipe="int8-weight-only")


def test_what_cannot_be_trained_is_refused_by_prepare(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe float8-dynamic-act-int4-weight cannot prepare"):
        begin(source, tmp_path / "run", recipe="float8-dynamic-act-int4-weight")
    with pytest.raises(UsageError, match="leave out --head"):
        begin(source, tmp_path / "run", recipe="float", head="same")
    assert not (tmp_path / "run").exists()
