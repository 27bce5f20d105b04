"""What a result was made from, as its provenance names it: file names and hashes, no paths of this machine."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def describe_source(files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    return {file.name: sha256(file) for file in files}


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
