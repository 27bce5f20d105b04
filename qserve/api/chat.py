"""/v1/chat/completions: messages, through the model's own template, answered."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qserve.api.answer import ChoiceWriter, Plan, answer
from qserve.api.limits import check_limits
from qserve.api.logprobs import LogprobWriter
from qserve.api.protocol import ChatMessage, ChatRequest
from qserve.api.tools import find_reply_form
from qserve.config import LimitsConfig
from qserve.errors import InvalidRequest
from qserve.generation import Prompt
from qserve.llm import LLM
from qserve.text.reasoning import find_reasoning_format
from qserve.text.tools import explain_tools


async def chat_completions(request: Request) -> Response:
    return await answer(request, ChatRequest, plan=plan_chat, write=lambda _, plan: ChoiceWriter(plan))


def render_messages(
    llm: LLM,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None,
) -> Prompt:
    """The prompt of a chat. By default the template opens an answer, unless the final message is to be continued."""
    told: Sequence[Mapping[str, Any]] = [
        {**message.model_dump(exclude_unset=True), "content": message.content} for message in messages
    ]
    if llm.template is not None and not llm.template.takes_tools:
        told, tools = explain_tools(told, tools or ()), None
    return llm.apply_template(
        told,
        tools=tools,
        add_generation_prompt=not continue_final_message if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=continue_final_message,
        variables=variables,
    )


def render_chat(llm: LLM, wanted: ChatRequest) -> Prompt:
    return render_messages(
        llm,
        wanted.messages,
        add_generation_prompt=wanted.add_generation_prompt,
        continue_final_message=wanted.continue_final_message,
        variables={**wanted.chat_template_kwargs, **_effort(llm, wanted.reasoning_effort)},
        tools=wanted.offered,
    )


def plan_chat(llm: LLM, wanted: ChatRequest, limits: LimitsConfig, *, can_be_shorter: bool = False) -> Plan:
    """What is made of a chat. It can be shorter than was asked for where its end tells so."""
    check_limits(wanted, limits)
    prompt = render_chat(llm, wanted)
    form = find_reply_form(llm, wanted, prompt, is_structured=wanted.is_structured)
    if wanted.truncate_prompt_tokens is not None:
        prompt = Prompt(ids=prompt.ids[-wanted.truncate_prompt_tokens :])
    num_top = (wanted.top_logprobs or 0) if wanted.logprobs else None
    sampling = wanted.sampling(
        max_tokens=llm.room_for(prompt, wanted.token_limit, can_be_less=can_be_shorter),
        logprobs=num_top,
        prompt_logprobs=wanted.prompt_logprobs,
    )
    special_ids = llm.tokenizer.special_token_ids
    rules = wanted.compile_rules(llm, calls=form.call_source(wanted, special_ids) if form else None)
    shown_ids = form.shown_ids(special_ids) if form else frozenset()
    writer = None
    if num_top is not None:
        writer = LogprobWriter(llm.tokenizer, num_top=num_top, as_token_ids=wanted.return_tokens_as_token_ids)
    return Plan(
        llm=llm,
        wanted=wanted,
        is_chat=True,
        prompts=[prompt],
        options=[wanted.options(sampling, rules, shown_ids=shown_ids)],
        num_samples=wanted.n,
        logprobs=writer,
        reply=form,
    )


def _effort(llm: LLM, effort: str | None) -> dict[str, Any]:
    """What the template is told of how much to reason."""
    template = llm.template
    if effort is None or template is None:
        return {}
    if effort == "none" and template.takes("enable_thinking"):
        return {"enable_thinking": False}
    if template.takes("reasoning_effort"):
        return {"reasoning_effort": effort}
    if effort == "none" and find_reasoning_format(template.source) is None:
        return {}  # it never reasons
    raise InvalidRequest("The model's chat template cannot be told how much to reason.", param="reasoning_effort")
