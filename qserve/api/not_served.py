"""Fields that OpenAI or vLLM have and this server has not: they are refused by name, for none may be without effect."""

from collections.abc import Mapping
from typing import Any

from qserve.errors import InvalidRequest

# Values that ask for nothing, of fields that are not served: they may be sent, anything else is refused.
Neutral = tuple[Any, ...]
_NOT_SERVED_ANYWHERE: dict[str, Neutral] = {
    "cache_salt": (),
    "guided_decoding_backend": ("auto", "guidance"),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "top_n_sigma": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
NOT_SERVED_IN_COMPLETIONS: dict[str, Neutral] = _NOT_SERVED_ANYWHERE
NOT_SERVED_IN_CHAT: dict[str, Neutral] = {
    **_NOT_SERVED_ANYWHERE,
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NOT_SERVED_IN_RESPONSES: dict[str, Neutral] = {
    **_NOT_SERVED_ANYWHERE,
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
NOT_SERVED_IN_TOKEN_COUNTS: dict[str, Neutral] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "prefill": (),
    "speed": ("standard",),
}
NOT_SERVED_IN_MESSAGES: dict[str, Neutral] = {**_NOT_SERVED_ANYWHERE, **NOT_SERVED_IN_TOKEN_COUNTS}
# Fields that only name the caller or his bookkeeping; no answer could depend on them.
BOOKKEEPING = frozenset(
    {
        "cache_control",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "user",
    }
)

# What to do in place of what is refused, where there is something.
_INSTEAD = {
    "chat_template": "the server's own is set with --chat-template when it is started",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "previous_response_id": "nothing is stored, so send the whole conversation as input",
    "conversation": "nothing is stored, so send the whole conversation as input",
    "thinking_token_budget": "reasoning counts among max_tokens, or send reasoning_effort",
    "stream_options": "usage comes with the last event",
}


def refuse_what_is_not_served(fields: Mapping[str, Any], not_served: Mapping[str, Neutral]) -> None:
    for name, neutral in not_served.items():
        value = fields.get(name)
        if value is not None and value not in neutral:
            instead = f" ({_INSTEAD[name]})" if name in _INSTEAD else ""
            raise InvalidRequest(f"{name} is not supported by this server; leave it out{instead}.", param=name)
