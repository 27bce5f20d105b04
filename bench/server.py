"""A qserve server in a process of its own, for as long as a measurement or a test needs it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx


@contextmanager
def serving(*arguments: str, seconds: float = 300) -> Iterator[str]:
    """The base URL of `qserve serve ARGUMENTS`, once it is ready; `seconds` is how long that may take."""
    port = free_port()
    command = [sys.executable, "-m", "qserve.cli", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, seconds=seconds)
        yield url
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_ready(url: str, process: subprocess.Popen[bytes], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if _is_ready(url):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server is not ready after {seconds:.0f} s, or has ended with {process.poll()}")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False
