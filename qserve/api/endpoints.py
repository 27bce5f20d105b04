"""Everything that is served: one table, from which the routes, /openapi.json and docs/api.md are made."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qserve.api import routes
from qserve.api.chat import chat_completions
from qserve.api.completions import completions
from qserve.api.measuring import EmbeddingRequest, ScoreRequest, embeddings, score
from qserve.api.messages.endpoint import count_tokens, create_message
from qserve.api.messages.request import MessagePrompt, MessageRequest
from qserve.api.openapi import Operation, describe_api
from qserve.api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from qserve.api.responses.endpoint import create_response
from qserve.api.responses.request import ResponseRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A path and who answers it; `also` are other paths of the same."""

    path: str
    handler: Callable[[Request], Awaitable[Response]]
    operation: Operation
    also: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        return "GET" if self.operation.body is None else "POST"


async def openapi(request: Request) -> Response:
    operations = {path: each.operation for each in ENDPOINTS for path in (each.path, *each.also)}
    return JSONResponse(await asyncio.to_thread(describe_api, operations))


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        path="/v1/completions",
        handler=completions,
        operation=Operation(
            title="Continue prompts",
            about="Token ids are taken as they are. Log-probabilities are those of the model, before temperature and "
            "penalties. `echo` with `logprobs` scores the prompt itself; `max_tokens` 0 makes no token at all.",
            body=CompletionRequest,
            answer=("id", "object", "created", "model", "choices", "usage"),
            can_stream=True,
        ),
    ),
    Endpoint(
        path="/v1/chat/completions",
        handler=chat_completions,
        operation=Operation(
            title="Answer messages",
            about="The prompt is what the model's own chat template makes of the messages. Tools stand in it as the "
            "template writes them, or in the system message where it knows none; calls are read in the form that the "
            "template shows (Hermes and Qwen, Mistral, Llama 3, or JSON). A forced call, and one of a strict tool, is "
            "written under a grammar. Reasoning that the template marks comes as `reasoning_content`, and its "
            "tokens, the marks among them, are counted in `usage`. Where both a format and free tools are given, the "
            "format is what holds.",
            body=ChatRequest,
            answer=("id", "object", "created", "model", "choices", "usage"),
            can_stream=True,
        ),
    ),
    Endpoint(
        path="/v1/responses",
        handler=create_response,
        operation=Operation(
            title="Answer items",
            about="OpenAI's newer form of a chat. Nothing is stored: send the whole conversation as `input`, with the "
            "calls, their results and the reasoning of earlier answers. Neighbours of one role become one message; "
            "`developer` speaks as `system`. Reasoning comes as a `reasoning` item that holds its text. A tool is "
            "strict where it says so. An answer that meets `max_output_tokens` is `incomplete`.",
            body=ResponseRequest,
            answer=("id", "object", "created_at", "model", "status", "output", "usage"),
            can_stream=True,
        ),
    ),
    Endpoint(
        path="/v1/messages",
        handler=create_message,
        operation=Operation(
            title="Answer messages in Anthropic's form",
            about="Errors have Anthropic's body here, and keys may come as `x-api-key`. Neighbours of one role become "
            "one message; a final message of the assistant is continued. Without `thinking` the model thinks as its "
            "template has it; thoughts come as `thinking` blocks with an empty signature, and may be sent back. Where "
            "`max_tokens` is more than the context has room for, the answer may end with "
            "`model_context_window_exceeded`. Other blocks than text, thinking and tools are refused.",
            body=MessageRequest,
            answer=("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
            can_stream=True,
        ),
    ),
    Endpoint(
        path="/v1/messages/count_tokens",
        handler=count_tokens,
        operation=Operation(title="The length of such messages", body=MessagePrompt, answer=("input_tokens",)),
    ),
    Endpoint(
        path="/v1/embeddings",
        handler=embeddings,
        operation=Operation(
            title="Vectors of texts",
            about="The model's final hidden states, after its last norm: their mean over the tokens, or the last "
            "token's, cut to `dimensions` and brought to length one.",
            body=EmbeddingRequest,
            answer=("object", "data", "model", "usage"),
        ),
    ),
    Endpoint(
        path="/v1/score",
        handler=score,
        operation=Operation(
            title="How likely labels come next",
            about="For each item, the probability of each label token after the query and the item, over the whole "
            "vocabulary or, with `apply_softmax`, over the labels alone.",
            body=ScoreRequest,
            answer=("object", "scores", "model", "usage"),
        ),
    ),
    Endpoint(
        path="/v1/models",
        handler=routes.list_models,
        operation=Operation(title="The models that are served", answer=("object", "data")),
    ),
    Endpoint(
        path="/v1/models/{name}",
        handler=routes.show_model,
        operation=Operation(
            title="One model",
            about="With its recipe, the bytes of its tensors by kind, the kernels in use, and the loss that was "
            "measured when it was made.",
            answer=("id", "object", "created", "owned_by"),
        ),
    ),
    Endpoint(
        path="/tokenize",
        also=("/v1/tokenize",),
        handler=routes.tokenize,
        operation=Operation(
            title="The tokens of a text, or of messages",
            body=TokenizeRequest,
            answer=("count", "max_model_len", "tokens", "token_strs"),
        ),
    ),
    Endpoint(
        path="/detokenize",
        also=("/v1/detokenize",),
        handler=routes.detokenize,
        operation=Operation(title="The text of tokens", body=DetokenizeRequest, answer=("prompt",)),
    ),
    Endpoint(
        path="/tokenizer_info",
        also=("/v1/tokenizer_info",),
        handler=routes.tokenizer_info,
        operation=Operation(
            title="What an evaluation harness asks of a tokenizer",
            answer=("bos_token", "eos_token", "pad_token", "vocab_size", "model_max_length", "chat_template"),
        ),
    ),
    Endpoint(
        path="/health",
        handler=routes.health,
        operation=Operation(title="Whether the process is worth keeping", answer=("status",)),
    ),
    Endpoint(
        path="/ready",
        handler=routes.ready,
        operation=Operation(title="Whether a request would be taken now", answer=("status", "model")),
    ),
    Endpoint(
        path="/metrics",
        handler=routes.metrics,
        operation=Operation(title="What is counted, for Prometheus", answer=None),
    ),
    Endpoint(
        path="/version", handler=routes.version, operation=Operation(title="The server's version", answer=("version",))
    ),
    Endpoint(
        path="/openapi.json",
        handler=openapi,
        operation=Operation(title="This document", answer=("openapi", "info", "paths", "components")),
    ),
)
