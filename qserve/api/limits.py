"""What one request may ask for on this server, which may be less than the protocol allows, and for how long."""

import asyncio
from collections.abc import Iterator, Sequence

from qserve.api.protocol import ChatRequest, CompletionRequest
from qserve.config import LimitsConfig
from qserve.errors import InvalidRequest
from qserve.generation import Deadline


def check_limits(wanted: CompletionRequest | ChatRequest, limits: LimitsConfig) -> None:
    for field, number, most in _asked(wanted, limits):
        if number is not None and number > most:
            raise InvalidRequest(f"{field} asks for {number}, but this server gives at most {most}.", param=field)


def check_num_prompts(prompts: Sequence[object], limits: LimitsConfig, *, param: str) -> None:
    if len(prompts) > limits.max_prompts:
        message = f"{param} has {len(prompts)} prompts, but this server takes at most {limits.max_prompts}."
        raise InvalidRequest(message, param=param)


def find_deadline(timeout: float | None, limits: LimitsConfig) -> Deadline | None:
    """When an answer that begins now must end.

    Who sets a timeout himself gets what there is by then, as with max_tokens. Who runs into the server's own limit
    gets an error, for he could not know that anything would be missing.
    """
    now = asyncio.get_running_loop().time()
    own = None if timeout is None else Deadline(at=now + timeout, is_error=False)
    if not limits.request_seconds or (timeout is not None and timeout <= limits.request_seconds):
        return own
    return Deadline(at=now + limits.request_seconds, is_error=True)


def _asked(wanted: CompletionRequest | ChatRequest, limits: LimitsConfig) -> Iterator[tuple[str, int | None, int]]:
    yield "n", wanted.n, limits.max_n
    yield "stop", len(wanted.stop), limits.max_stops
    yield "prompt_logprobs", wanted.prompt_logprobs, limits.max_logprobs
    if isinstance(wanted, ChatRequest):
        yield "top_logprobs", wanted.top_logprobs, limits.max_logprobs
    else:
        yield "prompt", len(wanted.prompt), limits.max_prompts
        yield "best_of", wanted.best_of, limits.max_n
        yield "logprobs", wanted.logprobs, limits.max_logprobs
