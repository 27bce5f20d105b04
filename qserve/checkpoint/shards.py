"""Which files of a directory hold a model's weights, and whether they are all there. Opens only the index."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qserve.errors import BrokenCheckpoint, NotACheckpoint

_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.")
_SHOWN = 8
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one format names its files, as transformers writes them."""

    format: str
    single: str
    pattern: str

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The files of a model, and where the index (if there is one) says each stored tensor lies."""

    format: str
    files: tuple[Path, ...]
    weight_map: Mapping[str, str]
    warnings: tuple[str, ...] = ()


# In the order in which they are looked for: of two formats side by side, safetensors is read.
LAYOUTS = (
    Layout(format="safetensors", single="model.safetensors", pattern="model-*-of-*.safetensors"),
    Layout(format="bin", single="pytorch_model.bin", pattern="pytorch_model-*-of-*.bin"),
)


def find_shards(path: Path) -> Shards:
    """The weight files in `path`. Raises NotACheckpoint where there are none, BrokenCheckpoint where some lack."""
    for layout in LAYOUTS:
        if shards := _shards_of(path, layout):
            _refuse_pointers(shards.files)
            return shards
    raise NotACheckpoint(f"{path} holds no model weights. {what_is_there(path)} {_expected()}")


def _shards_of(path: Path, layout: Layout) -> Shards | None:
    single, index = path / layout.single, path / layout.index
    if single.is_file():
        also = (f"both {single.name} and {index.name} are there; {single.name} was read",) if index.is_file() else ()
        return Shards(format=layout.format, files=(single,), weight_map={}, warnings=also)
    if index.is_file():
        weight_map = _read_index(index)
        files = tuple(path / name for name in sorted(set(weight_map.values())))
        _require_all(path, files, told_by=index.name)
        return Shards(format=layout.format, files=files, weight_map=weight_map)
    numbered = sorted(path.glob(layout.pattern))
    if not numbered:
        return None
    _require_all(path, _series(numbered), told_by=f"the name of {numbered[0].name}")
    return Shards(
        format=layout.format,
        files=tuple(numbered),
        weight_map={},
        warnings=(f"{layout.index} is missing; every shard that the file names count was read",),
    )


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"{index} is no index of shards ({error!r}); copy the file again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenCheckpoint(f"{index} names no tensor; copy the file again")
    return weight_map


def _series(numbered: list[Path]) -> tuple[Path, ...]:
    """Every file of the series that `model-00001-of-00003.safetensors` belongs to."""
    first = numbered[0]
    match = _NUMBERED.search(first.name)
    if match is None:
        return tuple(numbered)
    number, total = match.groups()
    before, after = first.name[: match.start(1)], first.name[match.end(1) :]
    return tuple(first.with_name(f"{before}{i:0{len(number)}d}{after}") for i in range(1, int(total) + 1))


def _require_all(path: Path, files: tuple[Path, ...], *, told_by: str) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BrokenCheckpoint(
            f"{path} lacks {len(missing)} of {len(files)} shards that {told_by} counts: {listing(missing)}. "
            f"Copy or download them again."
        )


def _refuse_pointers(files: tuple[Path, ...]) -> None:
    for file in files:
        with file.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise BrokenCheckpoint(
                    f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
                )


def what_is_there(path: Path) -> str:
    """A sentence on what a directory holds, for the message that says it is no checkpoint."""
    entries = sorted(path.iterdir())
    if not entries:
        return "The directory is empty."
    runs = [entry.name for entry in entries if re.fullmatch(r"checkpoint-\d+|checkpoints", entry.name)]
    if runs:
        return f"It looks like a training run: name one of its checkpoints ({listing(runs)})."
    return f"It holds {listing([entry.name + '/' * entry.is_dir() for entry in entries])}."


def listing(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _expected() -> str:
    return f"Expected config.json with one of {', '.join(f'{layout.single} or its index' for layout in LAYOUTS)}."
