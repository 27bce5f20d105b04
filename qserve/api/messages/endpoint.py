"""How requests to /v1/messages are answered: as the chats that they are, in Anthropic's words."""

import asyncio
import uuid

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.api.answer import Plan, answer
from qserve.api.chat import plan_chat, render_chat
from qserve.api.events import EventWriter
from qserve.api.messages.events import MessageAnswer
from qserve.api.messages.request import MessagePrompt, MessageRequest
from qserve.api.protocol import parse
from qserve.api.reply import name_unknown_fields
from qserve.api.service import Service
from qserve.config import LimitsConfig
from qserve.llm import LLM


async def create_message(request: Request) -> Response:
    return await answer(request, MessageRequest, plan=_plan, write=_write)


async def count_tokens(request: Request) -> Response:
    """How long a prompt is, without an answer."""
    service: Service = request.app.state.service
    wanted, unknown = parse(MessagePrompt, await request.body())
    llm = service.find(wanted.model)
    async with request.app.state.one_text:
        number = await asyncio.to_thread(_count, llm, wanted)
    return JSONResponse({"input_tokens": number}, headers=name_unknown_fields(unknown))


def _plan(llm: LLM, wanted: MessageRequest, limits: LimitsConfig) -> Plan:
    return plan_chat(llm, wanted.as_chat(), limits, can_be_shorter=True)


def _write(wanted: MessageRequest, plan: Plan) -> EventWriter:
    return EventWriter(MessageAnswer(plan, identity=uuid.uuid4().hex, max_tokens=wanted.max_tokens))


def _count(llm: LLM, wanted: MessagePrompt) -> int:
    return len(render_chat(llm, wanted.as_chat()).ids)
