"""A server to be measured, and what it tells of itself. Any server of OpenAI's API; one of ours tells more."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clients.exchange import Connections, Exchange
from qserve.bench.work import Job
from qserve.errors import UsageError

_FORM = re.compile(r"(?:(?P<label>[^=/]+)=)?(?P<url>https?://[^#]+)(?:#(?P<model>.+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """As the command line names it: [LABEL=]URL[#MODEL]."""

    label: str
    url: str  # less a /v1 at its end
    model: str  # empty: the first that the server lists

    @classmethod
    def parse(cls, text: str) -> "Target":
        found = _FORM.fullmatch(text)
        if found is None:
            raise UsageError(f"{text!r} names no server: expected [LABEL=]URL[#MODEL], such as http://127.0.0.1:8000.")
        url = found["url"].rstrip("/").removesuffix("/v1")
        model = found["model"] or ""
        label = found["label"] or url.partition("://")[2] + (f"#{model}" if model else "")
        return cls(label=label, url=url, model=model)


@dataclass(slots=True, kw_only=True)
class Server:
    """A target, connected.

    `extra` are fields that this server alone is sent, `problem` says why it cannot be measured, and `facts` go into the
    result.
    """

    target: Target
    connections: Connections
    extra: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    vocab_size: int | None = None
    problem: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.target.label

    async def send(self, job: tuple[str, bytes]) -> Exchange:
        """A path, and a body that is encoded already."""
        path, body = job
        return await self.connections.exchange("POST", self._path(path), body)

    def encode(self, job: Job) -> tuple[str, bytes]:
        return job.path, job.encode(self.model, self.extra)

    async def look(self) -> None:
        """Finds the model's name, and what else the server likes to tell."""
        listed, problem = await self._get("/v1/models")
        models = [model for model in listed.get("data") or [] if isinstance(model, dict)]
        self.model = self.target.model or (models[0].get("id", "") if models else "")
        if not self.model:
            self.problem = problem or "it lists no model: name one, as URL#MODEL"
            return
        info = next((model for model in models if model.get("id") == self.model), {})
        detailed, _ = await self._get(f"/v1/models/{self.model}")
        tokenizer, _ = await self._get("/tokenizer_info")
        version, _ = await self._get("/version")
        self.vocab_size = tokenizer.get("vocab_size") or (info.get("meta") or {}).get("n_vocab")
        self.facts = {
            "model_id": self.model,
            "server_version": version.get("version"),
            "details": {key: value for key, value in detailed.items() if key not in ("id", "object", "created")},
        }

    async def _get(self, path: str) -> tuple[Mapping[str, Any], str]:
        """The JSON object that stands there, or nothing and why."""
        exchange = await self.connections.exchange("GET", self._path(path))
        if exchange.failure or exchange.status != 200:
            return {}, exchange.failure or f"GET {path} is answered with HTTP {exchange.status}"
        try:
            told = json.loads(exchange.body)
        except ValueError:
            return {}, f"GET {path} is not answered with JSON"
        return (told, "") if isinstance(told, dict) else ({}, f"GET {path} is not answered with a JSON object")

    def _path(self, path: str) -> str:
        """Below the path of the URL, if it has one."""
        _, _, below = self.target.url.partition("://")[2].partition("/")
        return f"/{below}{path}" if below else path


def connect(target: Target, *, api_key: str, seconds: float) -> Server:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return Server(target=target, connections=Connections(target.url, headers=headers, seconds=seconds))
