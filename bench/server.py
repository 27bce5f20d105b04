"""A qserve server in a process of its own, for as long as a measurement or a test needs it."""

from collections.abc import Iterator
from contextlib import contextmanager

from qserve.bench.process import ServerProcess


@contextmanager
def serving(*arguments: str, seconds: float = 300) -> Iterator[str]:
    """The base URL of `qserve serve ARGUMENTS`, once it is ready; `seconds` is how long that may take."""
    with ServerProcess(arguments, seconds=seconds) as server:
        server.wait_until_ready()
        yield server.url
