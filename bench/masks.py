"""What structured output costs: a step whose rows all follow a grammar, over the same step with free rows.

    python -m bench.masks [MODEL] [--rows 16] [--tokens 64] [--repeats 7] [--samplings greedy drawn top_p]

In this process, through the engine's own thread: every repeat generates the same number of tokens free and under each
grammar, another first each time, once for each way to sample. No grammar lets its text end before that. Figures are
medians of a token's time (of all rows together), and of the ratios made repeat by repeat.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from bench.models import get_model
from qserve.bench.machine import describe_circumstances
from qserve.build import build_llm
from qserve.config import EngineConfig
from qserve.engine.request import SamplingParams
from qserve.generation import GenerationOptions
from qserve.llm import LLM, Generation, merge
from qserve.text.grammar import Grammar, from_grammar, from_json_schema, from_regex

_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "minItems": 9}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
_PARAM = "grammar"
_FREE = SamplingParams(max_tokens=0, temperature=1, seed=1)
_SAMPLINGS = {"greedy": replace(_FREE, temperature=0), "drawn": _FREE, "top_p": replace(_FREE, top_p=0.95)}
_SOURCES = {
    "json": from_json_schema({"type": "array", "minItems": 1000, "items": {"type": "integer"}}, param=_PARAM),
    "schema": from_json_schema({"type": "array", "minItems": 1000, "items": _PERSON}, param=_PARAM),
    "regex": from_regex(r"([a-z]+ )+", param=_PARAM),
    "counted": from_regex(r"([a-z]{1,12} ){1000}", param=_PARAM),
    "lark": from_grammar('start: sum\nsum: NUMBER | sum /[-+*]/ sum | "(" sum ")"\nNUMBER: /[0-9]{1,9}/', param=_PARAM),
}


async def measure(llm: LLM, grammar: Grammar | None, sampling: SamplingParams, *, num_rows: int, number: int) -> float:
    """Seconds of a step in which all rows decode; `number` makes the prompts those of this repeat alone."""
    options = GenerationOptions(sampling=sampling, grammar=grammar, ignore_eos=True)
    with ExitStack() as held:
        prompts = [llm.encode(f"{number} {row}: a list") for row in range(num_rows)]
        running = [held.enter_context(llm.start(prompt, options)) for prompt in prompts]
        async for _ in merge(running):
            pass
    return median(map(_step_seconds, running))


def _step_seconds(generation: Generation) -> float:
    outcome = generation.outcome
    assert outcome is not None
    assert outcome.first_token_seconds is not None
    assert outcome.last_token_seconds is not None
    assert outcome.num_output_tokens == outcome.max_tokens, "the grammar let its text end"
    return (outcome.last_token_seconds - outcome.first_token_seconds) / (outcome.num_output_tokens - 1)


async def compare(
    llm: LLM, samplings: Mapping[str, SamplingParams], *, num_rows: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """The seconds of every repeat, by way to sample and grammar; the first repeat is for warming up."""
    grammars: dict[str, Grammar | None] = {"free": None, **{name: llm.compile(each) for name, each in _SOURCES.items()}}
    found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in grammars} for way in samplings}
    for number in range(repeats + 1):
        turn = number % len(grammars)
        for way, sampling in samplings.items():
            for name in [*list(grammars)[turn:], *list(grammars)[:turn]]:
                seconds = await measure(llm, grammars[name], sampling, num_rows=num_rows, number=number)
                found[way][name] += [seconds] if number else []
    return found


def _divide(own: list[float], free: list[float]) -> list[float]:
    return [one / other for one, other in zip(own, free, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what structured output costs.")
    parser.add_argument("model", nargs="?", help="what to run; by default the demo model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--speculative-tokens", type=int, default=0, help="guesses, which change what a step is")
    parser.add_argument("--samplings", nargs="+", choices=_SAMPLINGS, default=[*_SAMPLINGS], help="by default all")
    arguments = parser.parse_args()
    model = arguments.model or get_model("smollm2", "int8-dynamic-act-int4-weight")
    llm = build_llm(model, engine=EngineConfig(speculative_tokens=arguments.speculative_tokens))
    samplings = {way: replace(_SAMPLINGS[way], max_tokens=arguments.tokens) for way in arguments.samplings}
    try:
        found = asyncio.run(compare(llm, samplings, num_rows=arguments.rows, repeats=arguments.repeats))
    finally:
        llm.close()
    ratios = {way: {name: _divide(own, rows["free"]) for name, own in rows.items()} for way, rows in found.items()}
    for way, rows in found.items():
        for name, own in rows.items():
            print(f"{way:<7} {name:<8} {median(own) * 1000:6.2f} ms a step   {median(ratios[way][name]):.3f} of free")
    print(json.dumps({**describe_circumstances(), "rows": arguments.rows, "seconds": found, "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
