"""Models that a bench starts by itself: their names on the command line, and the options of their servers."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qserve.config import DeviceConfig, EngineConfig
from qserve.options import add_options

_PROVENANCE = "provenance.json"
_LOSSES = ("artifact", "trained")  # as qserve-train records them; a float run has only the second


@dataclass(frozen=True, slots=True)
class Model:
    """As the command line names it: [LABEL=]MODEL."""

    label: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "Model":
        label, equals, path = text.partition("=")
        return cls(label, path) if equals and "/" not in label else cls(Path(text).name, text)

    @property
    def loss(self) -> float | None:
        """The measured loss that the artifact records, if it does."""
        try:
            record = json.loads((Path(self.path) / _PROVENANCE).read_text())
        except (OSError, ValueError):
            return None
        losses = record.get("loss") or {}
        return next((losses[name] for name in _LOSSES if name in losses), None)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="[LABEL=]MODEL: a directory or ORG/NAME")
    for config in (EngineConfig, DeviceConfig):
        add_options(parser, config)


def server_arguments(model: Model, arguments: argparse.Namespace) -> list[str]:
    """`qserve serve` with the options of engine and device that were given."""
    flags = []
    for config in (EngineConfig, DeviceConfig):
        for field in dataclasses.fields(config):
            flags += _flag(field.name, getattr(arguments, field.name))
    return [model.path, *flags]


def labels_of(models: Sequence[Model]) -> list[str]:
    return [model.label for model in models]


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
