"""/v1/completions: prompts as text or as ids, continued."""

from starlette.requests import Request
from starlette.responses import Response

from qserve.api.answer import ChoiceWriter, Plan, answer
from qserve.api.limits import check_limits
from qserve.api.logprobs import LogprobWriter
from qserve.api.protocol import CompletionRequest
from qserve.api.structured import Rules
from qserve.config import LimitsConfig
from qserve.generation import GenerationOptions, Prompt
from qserve.llm import LLM


async def completions(request: Request) -> Response:
    return await answer(request, CompletionRequest, plan=_plan, write=lambda _, plan: ChoiceWriter(plan))


def _plan(llm: LLM, wanted: CompletionRequest, limits: LimitsConfig) -> Plan:
    check_limits(wanted, limits)
    prompts = [_make_prompt(llm, wanted, prompt) for prompt in wanted.prompt]
    rules = wanted.compile_rules(llm)
    return Plan(
        llm=llm,
        wanted=wanted,
        is_chat=False,
        prompts=prompts,
        options=[_make_options(llm, wanted, prompt, rules) for prompt in prompts],
        num_samples=wanted.best_of or wanted.n,
        logprobs=_make_writer(llm, wanted),
    )


def _make_prompt(llm: LLM, wanted: CompletionRequest, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        prompt = llm.encode(given, add_special_tokens=wanted.add_special_tokens)
    else:
        prompt = llm.check_ids(given)
    if wanted.suffix:
        return llm.infill(prompt, wanted.suffix)
    limit = wanted.truncate_prompt_tokens
    return prompt if limit is None or len(prompt.ids) <= limit else Prompt(ids=prompt.ids[-limit:])


def _make_options(llm: LLM, wanted: CompletionRequest, prompt: Prompt, rules: Rules) -> GenerationOptions:
    logprobs = wanted.logprobs
    if logprobs is None and wanted.best_of is not None:
        logprobs = 0  # the best are found by them
    asked = [wanted.prompt_logprobs, wanted.logprobs if wanted.echo else None]
    sampling = wanted.sampling(
        max_tokens=llm.room_for(prompt, wanted.max_tokens),
        logprobs=logprobs,
        prompt_logprobs=max((number for number in asked if number is not None), default=None),
    )
    return wanted.options(sampling, rules, echo=wanted.echo)


def _make_writer(llm: LLM, wanted: CompletionRequest) -> LogprobWriter | None:
    if wanted.logprobs is None:
        return None
    return LogprobWriter(llm.tokenizer, num_top=wanted.logprobs, as_token_ids=wanted.return_tokens_as_token_ids)
