"""Models in this process, and batches of prompts through them: text and engine as a server has them, but no HTTP."""

import argparse
import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from time import perf_counter

from qserve.bench.models import Model, labels_of
from qserve.bench.report import make_console
from qserve.bench.serve import check_labels
from qserve.bench.work import Work, WorkConfig
from qserve.config import DeviceConfig, EngineConfig
from qserve.engine.request import SamplingParams
from qserve.errors import UsageError
from qserve.generation import GenerationOptions, Prompt
from qserve.llm import LLM
from qserve.options import read_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a batch took; seconds."""

    duration: float
    ttfts: list[float]  # of each prompt
    num_input_tokens: int
    num_output_tokens: int


@contextmanager
def loaded(arguments: argparse.Namespace) -> Iterator[dict[str, LLM]]:
    """Every model that the command line names, by its label. They wait without computing while another is measured."""
    models = [Model.parse(text) for text in arguments.models]
    check_labels(labels_of(models))
    engine, device = read_options(arguments, EngineConfig), read_options(arguments, DeviceConfig)
    # The same prompts come to every model, but never twice to one: sharing beginnings would only cost time.
    engine = dataclasses.replace(engine, prefix_caching=False)
    build = import_module("qserve.build")  # imports torch, which takes a second or two
    with ExitStack() as open_models:
        llms = {}
        for model in models:
            with make_console(is_error=True).status(f"loading {model.label}"):
                llms[model.label] = build.build_llm(model.path, engine=engine, device=device)
            open_models.callback(llms[model.label].close)
        yield llms


def check_room(llms: dict[str, LLM], *, input_len: int, output_len: int) -> None:
    for label, llm in llms.items():
        if input_len + output_len > llm.info.max_model_len:
            raise UsageError(
                f"--input-len {input_len} and --output-len {output_len} are more than the context of {label}, "
                f"{llm.info.max_model_len} tokens."
            )


def make_work(llms: dict[str, LLM], *, input_len: int, output_len: int, seed: int) -> Work:
    """Prompts that every model can take; refuses lengths that one of them has no room for."""
    check_room(llms, input_len=input_len, output_len=output_len)
    vocab_size = min(llm.info.vocabulary_size for llm in llms.values())
    return Work(WorkConfig(input_len=input_len, seed=seed), vocab_size=vocab_size)


def run_batch(llm: LLM, prompts: Sequence[Sequence[int]], *, output_len: int) -> Batch:
    """All prompts at once, each to its full length."""
    start = perf_counter()
    ended = asyncio.run(_run_all(llm, prompts, output_len))
    return Batch(
        duration=perf_counter() - start,
        ttfts=[first - start for first, _ in ended],
        num_input_tokens=sum(len(prompt) for prompt in prompts),
        num_output_tokens=sum(number for _, number in ended),
    )


async def _run_all(llm: LLM, prompts: Sequence[Sequence[int]], output_len: int) -> list[tuple[float, int]]:
    return await asyncio.gather(*(_run_one(llm, prompt, output_len) for prompt in prompts))


async def _run_one(llm: LLM, prompt: Sequence[int], output_len: int) -> tuple[float, int]:
    """When the first text came, and how many tokens it was in the end."""
    # Drawn: the likeliest answers to random prompts go round in circles, which would flatter guesses.
    options = GenerationOptions(sampling=SamplingParams(max_tokens=output_len), ignore_eos=True)
    first, number = 0.0, 0
    async for delta in llm.stream(Prompt(ids=prompt), options):
        first = first or perf_counter()
        number = delta.num_output_tokens
    return first, number
