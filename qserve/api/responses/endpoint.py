"""How a request to /v1/responses is answered: as the chat that it is, in its own words."""

import uuid

from starlette.requests import Request
from starlette.responses import Response

from qserve.api.answer import Plan, answer
from qserve.api.chat import plan_chat
from qserve.api.events import EventWriter
from qserve.api.responses.events import ResponseAnswer
from qserve.api.responses.request import ResponseRequest
from qserve.config import LimitsConfig
from qserve.errors import RequestError
from qserve.llm import LLM

# What a client calls the fields of a chat that an error may be about.
_PARAMS = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


async def create_response(request: Request) -> Response:
    return await answer(request, ResponseRequest, plan=_plan, write=_write)


def _plan(llm: LLM, wanted: ResponseRequest, limits: LimitsConfig) -> Plan:
    try:
        return plan_chat(llm, wanted.as_chat(), limits)
    except RequestError as error:
        error.param = _PARAMS.get(error.param or "", error.param)
        raise


def _write(wanted: ResponseRequest, plan: Plan) -> EventWriter:
    return EventWriter(ResponseAnswer(wanted, plan, identity=uuid.uuid4().hex))
