"""The losses that an artifact's provenance holds: on which text, and of what. Knows no recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from training.data import load_tokenizer, read_text, windows

_WINDOW = 512
_OF = {"float": "of the float model", "trained": "as it was trained", "artifact": "of the artifact"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Text to measure with."""

    windows: Tensor  # (windows, length + 1)
    files: Mapping[str, str] | None = None  # name -> sha256; None: a run's own text, held out of training

    @property
    def about(self) -> dict[str, Any]:
        told: dict[str, Any] = {"tokens": self.windows.shape[0] * (self.windows.shape[1] - 1)}
        return told if self.files is None else {**told, "files": dict(self.files)}


def read_passage(paths: Sequence[Path], home: Path, *, max_tokens: int | None) -> Passage:
    """The text of files, in tokens of the model in `home`."""
    text = read_text(paths, load_tokenizer(home), max_tokens=max_tokens)
    return Passage(windows=windows(text.tokens, min(_WINDOW, len(text.tokens) - 1)), files=text.files)


def tell(losses: Mapping[str, Any], console: Console) -> None:
    for name, meaning in _OF.items():
        if name in losses:
            console.print(f"loss {losses[name]:.6f} {meaning}, on {losses['tokens']:,} tokens", highlight=False)
