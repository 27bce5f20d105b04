"""From what a user names a model by to a directory: a path as it is, ORG/NAME through huggingface_hub and its cache.

Knows nothing of what the directory holds; `detect` looks at that.
"""

import re
from pathlib import Path
from typing import Any

from qserve.checkpoint.save import CARRIED_FILES
from qserve.errors import NotACheckpoint

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_BESIDE_THE_WEIGHTS = ["config.json", "*.index.json", "provenance.json", *CARRIED_FILES]
# Safetensors where a repository has them; .bin files only where it has not.
_WEIGHTS = ("*.safetensors", "*.bin")
# The same weights once more, in the form of whoever trained them.
_LEFT_OUT = ["*/*", "consolidated*", "training_args.bin"]


def resolve(model: str, *, cache: Path | None = None, is_offline: bool = False) -> Path:
    """The directory of `model`. An existing path wins over a repository of that name.

    Without a network (or with HF_HUB_OFFLINE set) what the cache holds is used. `cache` is by default huggingface_hub's
    own. Raises NotACheckpoint where there is neither.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not _REPOSITORY.fullmatch(model) or model.startswith("."):
        raise NotACheckpoint(f"{model} does not exist; expected the directory of a checkpoint, or ORG/NAME on the hub")
    for weights in _WEIGHTS:
        directory = _snapshot(model, [*_BESIDE_THE_WEIGHTS, weights], cache=cache, is_offline=is_offline)
        if any(directory.glob(weights)):
            return directory
    return directory


def _snapshot(model: str, patterns: list[str], *, cache: Path | None, is_offline: bool) -> Path:
    from huggingface_hub import errors, snapshot_download  # brings an HTTP client along

    options: dict[str, Any] = {"cache_dir": cache, "local_files_only": is_offline}
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=_LEFT_OUT, **options))
    except errors.GatedRepoError as error:
        raise NotACheckpoint(
            f"{model} is there, but its owner must grant you access: ask for it on the model's page, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotACheckpoint(
            f"{model} is no directory here and no model on the hub that your token may see; check the spelling, or "
            f"set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise NotACheckpoint(
            f"{model} is no directory here, the hub cannot be reached, and its cache does not hold the whole model. "
            f"Name a local directory, or download the model where there is a network"
        ) from error
    except (OSError, errors.HFValidationError) as error:
        raise NotACheckpoint(f"{model} could not be fetched from the hub: {error}") from error
