"""What is being served at this moment: nothing yet, a model, or a model that is being finished with.

The port is open before the model is loaded, so every route asks here first. Knows nothing of HTTP.
"""

import asyncio

from qserve.errors import EngineDead, ModelNotFound, NotReady
from qserve.llm import LLM
from qserve.metrics import Metrics


class Service:
    """The one model of this server, once it is there."""

    def __init__(self, llm: LLM | None = None) -> None:
        self._llm = llm
        self._is_draining = False

    def open(self, llm: LLM) -> None:
        """The model is loaded and warm."""
        self._llm = llm

    @property
    def is_alive(self) -> bool:
        """Whether a restart would not help: still loading counts as alive, a dead engine does not."""
        return self._llm is None or self._llm.is_alive

    @property
    def metrics(self) -> Metrics | None:
        """The model's counters, from when it is loaded until the process ends."""
        return None if self._llm is None else self._llm.metrics

    @property
    def llm(self) -> LLM:
        """The model, if it can take a request now."""
        if self._llm is None:
            raise NotReady("The model is being loaded: try again in a few seconds.")
        if self._is_draining:
            raise NotReady("The server is about to end and takes no new requests: try again later.")
        if not self._llm.is_alive:
            raise EngineDead("The engine has stopped; the server's log tells why. It must be restarted.")
        return self._llm

    def find(self, model: str | None) -> LLM:
        """The model that a request names; a request that names none means the one that there is."""
        llm = self.llm
        names = (llm.info.name, *llm.info.other_names)
        if model is not None and model not in names:
            served = ", ".join(map(repr, names))
            raise ModelNotFound(
                f"The model {model[:100]!r} is not served here. This server has {served}.", param="model"
            )
        return llm

    async def close(self, *, drain_seconds: float) -> None:
        """Takes nothing new, lets what runs finish, and cuts short what takes longer."""
        self._is_draining = True
        if self._llm is not None:
            await self._llm.drain(drain_seconds)
            await asyncio.to_thread(self._llm.close)
