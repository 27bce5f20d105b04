"""A `qserve serve` of our own in a process of its own: when it was ready, what it weighs, and its last words."""

import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.error import URLError
from urllib.request import urlopen

from qserve.errors import UsageError

_LOG_LINES = 8  # told when it does not start
# Seconds between questions. An open port answers them with time that loading could use: a hundred a second made a start
# of 1.9 s one of 2.05.
_ASK_CLOSED, _ASK_LISTENING = 0.01, 0.05
_REST_SECONDS, _REST_MIB = 1.0, 1.0
_LOADED = re.compile(r"is loaded in [\d.]+ s \(([^)]*)\)")


class ServerProcess:
    """Use it in a `with` block: at its end the server is gone."""

    def __init__(self, arguments: Sequence[str], *, seconds: float = 600) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.listening_seconds = 0.0
        self.ready_seconds = 0.0
        self._seconds = seconds
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by stop)
        self._started_at = time.perf_counter()
        command = [sys.executable, "-m", "qserve.cli", "serve", *arguments, "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Raises UsageError with the end of the server's log if it does not come to that."""
        while time.perf_counter() - self._started_at < self._seconds and self._process.poll() is None:
            status = _ask(f"{self.url}/ready")
            self.listening_seconds = self.listening_seconds or (self._age if status else 0.0)
            if status == 200:
                self.ready_seconds = self._age
                return
            time.sleep(_ASK_LISTENING if status else _ASK_CLOSED)
        has_ended = self._process.poll() is not None
        what = "has ended before it was ready" if has_ended else f"is not ready after {self._seconds:.0f} s"
        raise UsageError(f"the server {what}; the end of its log is:\n{self._log_end()}")

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def read_memory(self) -> dict[str, float | None]:
        return read_memory(self._process.pid)

    def wait_until_at_rest(self) -> None:
        """Until its memory grows no more: the cache's pages are found in the background."""
        was, since = 0.0, time.perf_counter()
        while time.perf_counter() - since < _REST_SECONDS and self._process.poll() is None:
            now = self.read_memory()["rss_mib"] or 0.0
            if abs(now - was) > _REST_MIB:
                was, since = now, time.perf_counter()
            time.sleep(0.05)

    def read_breakdown(self) -> dict[str, float]:
        """Seconds of each part of the start, as the server's log tells them."""
        found = _LOADED.search(self._read_log())
        parts = (part.rpartition(" ") for part in found[1].split(", ")) if found else ()
        return {name: float(seconds) for name, _, seconds in parts}

    @property
    def _age(self) -> float:
        return time.perf_counter() - self._started_at

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _log_end(self) -> str:
        return "\n".join(self._read_log().rstrip().splitlines()[-_LOG_LINES:])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def read_memory(pid: int) -> dict[str, float | None]:
    """MiB of a process: now, without the files that it has mapped, and at its largest; None if that is not told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        status = ""
    own = _find_mib(status, "RssAnon")
    return {"rss_mib": _find_mib(status, "VmRSS"), "rss_anon_mib": own, "peak_rss_mib": _find_mib(status, "VmHWM")}


def _ask(url: str) -> int:
    """The HTTP status; 0 while nobody listens."""
    try:
        with urlopen(url, timeout=5) as answer:
            status: int = answer.status
            return status
    except URLError as error:
        return int(getattr(error, "code", 0))
    except OSError:
        return 0


def _find_mib(status: str, name: str) -> float | None:
    found = re.search(rf"^{name}:\s*(\d+) kB$", status, flags=re.MULTILINE)
    return int(found[1]) / 1024 if found else None
