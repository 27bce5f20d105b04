"""A run: a directory that says what it is, and loses no work.

    RUN/manifest.json                what it is: source and hashes, recipe; once it trains, every option and the data
    RUN/data.safetensors             the tokens: packed text to train on, and what is held out of it to measure with
    RUN/checkpoints/step-000100/     trained tensors, the optimizer's, and state.json; the last two are kept
    RUN/log.jsonl                    a line for every step that was logged
    RUN/lock                         held by the process that works on the run

Every file appears whole, by a rename after it has reached the disk. JSON and safetensors only. Knows no models.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from qserve.checkpoint import read_safetensors
from qserve.checkpoint.atomic import new_directory
from qserve.checkpoint.write_safetensors import write_safetensors
from qserve.errors import BrokenCheckpoint, UsageError

MANIFEST, DATA, LOG = "manifest.json", "data.safetensors", "log.jsonl"
TENSORS, STATE = "tensors.safetensors", "state.json"
_KEPT = 2
_FORMAT = 1
_LIBRARIES = ("qserve", "torch", "torchao", "transformers")
Json = dict[str, Any]


class Run:
    """The files of one run. `manifest` is what they say of themselves."""

    def __init__(self, path: Path, manifest: Json) -> None:
        self.path = path
        self.manifest = manifest

    @property
    def is_float(self) -> bool:
        return bool(self.manifest["recipe"] == "float")

    @property
    def checkpoints(self) -> list[Path]:
        """The oldest first."""
        return sorted(self.path.glob("checkpoints/step-*"))

    def write_manifest(self, manifest: Json) -> None:
        write_file(self.path / MANIFEST, _json(manifest))
        self.manifest = manifest

    def commit(self, step: int, tensors: Mapping[str, Tensor], state: Json) -> None:
        """Write the checkpoint of `step`, and let go of all but the last two."""
        destination = self.path / "checkpoints" / f"step-{step:06d}"
        if destination.exists():
            return
        with new_directory(destination) as partial:
            write_safetensors(partial / TENSORS, tensors, metadata={})
            (partial / STATE).write_text(_json({"step": step, **state}))
        for old in self.checkpoints[:-_KEPT]:
            remove(old)

    def latest(self) -> tuple[Json, dict[str, Tensor]] | None:
        """State and tensors of the newest checkpoint; None before the first."""
        return self.read(self.checkpoints[-1]) if self.checkpoints else None

    def read(self, checkpoint: Path) -> tuple[Json, dict[str, Tensor]]:
        try:
            state = read_json(checkpoint / STATE)
            return state, read_tensors(checkpoint / TENSORS)
        except (BrokenCheckpoint, FileNotFoundError) as error:
            others = [other.name for other in self.checkpoints if other != checkpoint]
            way_out = f"remove {checkpoint} to go on from {others[-1]}" if others else "begin a new run"
            raise BrokenCheckpoint(f"{checkpoint} cannot be read ({error}); {way_out}") from error

    def find(self, step: int | None) -> Path:
        """The checkpoint of a step, or the newest."""
        if not self.checkpoints:
            raise UsageError(f"{self.path} holds no checkpoint yet; run qserve-train train --run {self.path} first")
        if step is None:
            return self.checkpoints[-1]
        found = [path for path in self.checkpoints if _step_of(path) == step]
        if not found:
            there = ", ".join(str(_step_of(path)) for path in self.checkpoints)
            raise UsageError(f"{self.path} has no checkpoint of step {step}; it has those of {there}")
        return found[0]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; what a killed one left half-made is swept away."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process works on {self.path}; wait for it, or stop it first") from None
            for left in [*self.path.glob(".*.partial-*"), *self.path.glob("checkpoints/.*.partial-*")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield

    def keep_log_until(self, step: int) -> None:
        """Drop the lines of steps that were never committed: they will be done again."""
        if not (self.path / LOG).exists():
            return
        lines = [line for line in (self.path / LOG).read_text().splitlines() if _is_whole(line)]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_file(self.path / LOG, "".join(f"{line}\n" for line in kept))

    def log(self, entry: Json) -> None:
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def create_run(path: Path, manifest: Json) -> Run:
    """A new run; with the same manifest over an existing one that has not begun to train, the same again."""
    manifest = {"format": _FORMAT, **manifest, "versions": versions()}
    if is_run(path):
        run = open_run(path)
        require_same({key: run.manifest.get(key) for key in manifest}, manifest, what=str(path))
        return run
    with new_directory(path) as partial:
        (partial / MANIFEST).write_text(_json(manifest))
        (partial / "checkpoints").mkdir()
    return Run(path, manifest)


def open_run(path: Path) -> Run:
    if not is_run(path):
        raise UsageError(
            f"{path} is no run: it has no {MANIFEST}. Begin one with qserve-train prepare BASE --recipe R --run {path}"
        )
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != _FORMAT:
        raise UsageError(f"{path} has the format {manifest.get('format')}, this version reads {_FORMAT}")
    return Run(path, manifest)


def is_run(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def require_same(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str) -> None:
    """Raises UsageError that names every field in which the two differ, nested ones by their dotted names."""
    before, now = _flat(recorded), _flat(wanted)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise UsageError(f"{what} is another run: {told}. Give what it was begun with, or begin a new run")


def versions() -> dict[str, str]:
    return {library: version(library) for library in _LIBRARIES}


def read_json(path: Path) -> Json:
    try:
        read: Json = json.loads(path.read_text())
    except ValueError as error:
        raise BrokenCheckpoint(f"{path} is no JSON ({error}); it was changed or cut short") from error
    return read


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Views of the mapped file; writing to them reaches no file."""
    infos = read_safetensors.list_tensors([path], weight_map={})
    read = read_safetensors.reader(infos)
    tensors = {name: read(info) for name, info in infos.items()}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def write_file(path: Path, text: str) -> None:
    """The file as a whole or as it was before."""
    partial = path.with_name(f".{path.name}.partial-")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    _sync_directory(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    partial = path.with_name(f".{path.name}.partial-")
    write_safetensors(partial, tensors, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)
    _sync_directory(path.parent)


def remove(directory: Path) -> None:
    """First out of sight, so that half a directory is never taken for a whole one."""
    hidden = directory.with_name(f".{directory.name}.partial-old")
    directory.rename(hidden)
    shutil.rmtree(hidden)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _is_whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Json:
    flat: Json = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
