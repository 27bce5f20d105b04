"""How a request to /v1/responses is answered: as the chat that it is, in its own words."""

import asyncio
import uuid

from starlette.requests import Request
from starlette.responses import Response

from qserve.api.answer import Plan, answer
from qserve.api.chat import plan_chat
from qserve.api.events import EventWriter
from qserve.api.limits import check_limits
from qserve.api.protocol import parse
from qserve.api.responses.events import ResponseAnswer
from qserve.api.responses.request import ResponseRequest
from qserve.api.service import Service
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
    service: Service = request.app.state.service
    wanted, unknown = parse(ResponseRequest, await request.body())
    llm = service.find(wanted.model)
    llm.check_room()
    plan = await asyncio.to_thread(_plan, llm, wanted, request.app.state.limits)
    writer = EventWriter(ResponseAnswer(wanted, plan, identity=uuid.uuid4().hex))
    return await answer(request, plan, writer, unknown_fields=unknown)


def _plan(llm: LLM, wanted: ResponseRequest, limits: LimitsConfig) -> Plan:
    try:
        chat = wanted.as_chat()
        check_limits(chat, limits)
        return plan_chat(llm, chat)
    except RequestError as error:
        error.param = _PARAMS.get(error.param or "", error.param)
        raise
