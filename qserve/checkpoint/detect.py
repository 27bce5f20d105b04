"""What is at this path? Format, shards, tensors and recipe, from headers and config alone; no weight is read.

No flag and no marker file: the evidence is looked at in tiers, (1) quantization_config of config.json, also a folder up
for a checkpoint of a training run, (2) the metadata of safetensors, which names every quantized tensor, (3) the tensor
objects of .bin shards. Where they disagree the tensors win and a warning says so.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qserve.checkpoint import read_bin, read_safetensors
from qserve.checkpoint.agree import require_agreement
from qserve.checkpoint.contents import Checkpoint
from qserve.checkpoint.evidence import weigh
from qserve.checkpoint.shards import find_shards, listing, what_is_there
from qserve.errors import BrokenCheckpoint, NotACheckpoint

LISTERS = {"safetensors": read_safetensors.list_tensors, "bin": read_bin.list_tensors}
_OF_A_RUN = re.compile(r"checkpoint-\d+")


def detect(path: Path) -> Checkpoint:
    """The checkpoint at `path`. Raises an ArtifactError that says what was found, what was expected, what to do."""
    _require_directory(path)
    homes = [folder for folder in _homes(path) if (folder / "config.json").is_file()]
    if not homes:
        raise _without_config(path)
    shards = find_shards(path)
    config = _read_config(homes[0])
    tensors = LISTERS[shards.format](shards.files, weight_map=shards.weight_map)
    told_in, quantization = _quantization_config(homes)
    verdict = weigh(quantization, tensors, told_in=told_in, format=shards.format)
    require_agreement(config, tensors)
    return Checkpoint(
        path=path,
        home=homes[0],
        config=config,
        format=shards.format,
        files=shards.files,
        tensors=tensors,
        recipe=verdict.recipe,
        tier=verdict.tier,
        evidence=verdict.evidence,
        warnings=shards.warnings + verdict.warnings,
    )


def _require_directory(path: Path) -> None:
    if not path.exists():
        raise NotACheckpoint(f"{path} does not exist; expected the directory of a checkpoint")
    if path.is_dir():
        return
    if path.suffix == ".gguf":
        raise _gguf(path)
    raise NotACheckpoint(f"{path} is a file; expected the directory of a checkpoint. Did you mean {path.parent}?")


def _gguf(file: Path) -> NotACheckpoint:
    return NotACheckpoint(
        f"{file} is a GGUF file, which is not served as it is. Make a checkpoint of it: "
        f"qserve-train import {file} --out DIR"
    )


def _homes(path: Path) -> list[Path]:
    """Where config.json may lie: in the folder itself; for a checkpoint of a run also with the run."""
    folder = path.resolve()
    if not _OF_A_RUN.fullmatch(folder.name):
        return [path]
    above = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    return [path, above]


def _without_config(path: Path) -> NotACheckpoint:
    if (path / "adapter_config.json").is_file():
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path", "its base model")
        return NotACheckpoint(
            f"{path} holds an adapter for {base} and no model. Merge it into the model first (peft: merge_and_unload), "
            f"and name the merged checkpoint"
        )
    files = sorted(path.glob("*.gguf"))
    if files:
        return _gguf(files[0])
    return NotACheckpoint(f"{path} has no config.json. {what_is_there(path)} Expected a checkpoint's directory.")


def _read_config(home: Path) -> Mapping[str, Any]:
    config = _read_json(home / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise BrokenCheckpoint(f"{home / 'config.json'} names no model_type; expected the config of a language model")
    return config


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise BrokenCheckpoint(f"{file} is no JSON ({error}); copy or download it again") from error


def _quantization_config(homes: list[Path]) -> tuple[Path, Mapping[str, Any] | None]:
    """The first that any of the folders has; without one, the config that was looked at."""
    for home in homes:
        quantization = _read_json(home / "config.json").get("quantization_config")
        if quantization is None:
            continue
        if not isinstance(quantization, dict):
            raise BrokenCheckpoint(
                f"{home / 'config.json'}: quantization_config is {listing([repr(quantization)])}; expected an object"
            )
        return home / "config.json", quantization
    return homes[0] / "config.json", None
