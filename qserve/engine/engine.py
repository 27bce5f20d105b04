"""One turn of the engine: decide, compute, take in.

`step` may be driven directly, without threads, for offline work; `loop.py` drives it for a server.
"""

from qserve.engine.request import Request, Runner, TokenEvent
from qserve.engine.scheduler import Scheduler


class Engine:
    """A scheduler and the device that it schedules for."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self._runner = runner

    def step(self) -> list[TokenEvent]:
        chunks = self.scheduler.schedule()
        sampled = self._runner.run(chunks)
        return self.scheduler.update(chunks, sampled)

    def generate(self, requests: list[Request]) -> None:
        """Run requests to their ends, in this thread; each request then holds its tokens."""
        for request in requests:
            self.scheduler.add(request)
        while self.scheduler.has_work:
            self.step()
