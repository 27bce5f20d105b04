"""The endpoints that generate nothing: models, tokens, and the server's own state."""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve import __version__
from qserve.api.chat import render_messages
from qserve.api.protocol import DetokenizeRequest, TokenizeRequest, parse
from qserve.api.reply import name_unknown_fields
from qserve.api.service import Service
from qserve.api.tools import as_sent
from qserve.errors import EngineDead
from qserve.llm import LLM
from qserve.metrics import CONTENT_TYPE


async def health(request: Request) -> Response:
    """Whether the process is worth keeping: yes while it loads, no when its engine has died."""
    if not _service(request).is_alive:
        raise EngineDead("The engine has stopped; the server's log tells why. It must be restarted.")
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether a request would be taken now."""
    return JSONResponse({"status": "ready", "model": _service(request).llm.info.name})


async def metrics(request: Request) -> Response:
    """Also while the server drains, and when its engine has died: then they are of most interest."""
    service = _service(request)
    counted = service.metrics or service.llm.metrics
    return Response(counted.render(), media_type=CONTENT_TYPE)


async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def list_models(request: Request) -> Response:
    llm = _service(request).llm
    return JSONResponse({"object": "list", "data": [_describe(llm, name) for name in _names(llm)]})


async def show_model(request: Request) -> Response:
    name = request.path_params["name"]
    llm = _service(request).find(name)
    return JSONResponse({**_describe(llm, name), **llm.info.details})


async def tokenize(request: Request) -> Response:
    wanted, unknown = parse(TokenizeRequest, await request.body())
    llm = _service(request).find(wanted.model)
    # In a thread, for a long text takes long; and one at a time, for it takes a hundred times its size in memory.
    async with request.app.state.one_text:
        ids = await asyncio.to_thread(_encode, llm, wanted)
    written = [llm.tokenizer.id_to_token(token_id) for token_id in ids] if wanted.return_token_strs else None
    body = {"count": len(ids), "max_model_len": llm.info.max_model_len, "tokens": list(ids), "token_strs": written}
    return JSONResponse(body, headers=name_unknown_fields(unknown))


async def detokenize(request: Request) -> Response:
    wanted, unknown = parse(DetokenizeRequest, await request.body())
    llm = _service(request).find(wanted.model)
    llm.check_vocabulary(wanted.tokens, param="tokens")
    decode = llm.tokenizer.decode
    text = await asyncio.to_thread(decode, wanted.tokens, skip_special_tokens=wanted.skip_special_tokens)
    return JSONResponse({"prompt": text}, headers=name_unknown_fields(unknown))


async def tokenizer_info(request: Request) -> Response:
    """What lm-evaluation-harness asks of a remote tokenizer."""
    llm = _service(request).llm
    special = llm.tokenizer.special
    return JSONResponse(
        {
            "bos_token": special.bos,
            "eos_token": special.eos,
            "pad_token": special.pad,
            "vocab_size": llm.info.vocabulary_size,
            "model_max_length": llm.info.max_model_len,
            "chat_template": None if llm.template is None else llm.template.source,
        }
    )


def _encode(llm: LLM, wanted: TokenizeRequest) -> Sequence[int]:
    if wanted.prompt is not None:
        return llm.tokenizer.encode(wanted.prompt, add_special_tokens=wanted.add_special_tokens is not False)
    prompt = render_messages(
        llm,
        wanted.messages,
        add_generation_prompt=wanted.add_generation_prompt,
        continue_final_message=wanted.continue_final_message,
        variables=wanted.chat_template_kwargs,
        tools=as_sent(wanted.tools),
    )
    return prompt.ids


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _names(llm: LLM) -> tuple[str, ...]:
    return (llm.info.name, *llm.info.other_names)


def _describe(llm: LLM, name: str) -> dict[str, Any]:
    info = llm.info
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "qserve",
        "max_model_len": info.max_model_len,
    }
