"""A request through the engine has the same bits alone, in a crowd, preempted, and from the prefix cache."""

from dataclasses import replace

import pytest
import torch

from qserve.config import EngineConfig
from qserve.device.architectures import read_spec
from qserve.device.decoder import Decoder, load_decoder
from qserve.device.kv_cache import make_cache
from qserve.device.runner import ModelRunner
from qserve.device.sampler import Sampler
from qserve.engine.engine import Engine
from qserve.engine.request import Request, SamplingParams, TokenLogprob
from qserve.engine.scheduler import Scheduler
from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from tests.device.driving import CPU, config_of, prompt, weights_of
from tests.kernels.native import VARIANTS, open_variant
from tests.tiny import make_model

PARAMS = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, seed=3, logprobs=2)
PROMPTS = [prompt(40) + prompt(length, seed=length) for length in (3, 30, 9, 55, 17, 1)]  # one beginning
Answer = tuple[int | None, tuple[TokenLogprob, ...]]


def load(ops: Ops) -> Decoder:
    theirs = make_model("qwen3", head_dim=64)  # wide enough for every kernel
    spec = read_spec(config_of(theirs))
    assert spec is not None
    return load_decoder(spec, weights_of(theirs), ops=ops, device=CPU, max_positions=512)


def run(
    ops: Ops,
    prompts: list[list[int]],
    *,
    dtype: torch.dtype,
    num_blocks: int = 60,
    tokens: int = 64,
    guesses: int = 15,
    params: SamplingParams = PARAMS,
) -> tuple[dict[str, list[Answer]], Scheduler]:
    """What each prompt, named by its number, is answered."""
    decoder = load(ops)
    cache = make_cache(decoder.cache_shapes, num_blocks=num_blocks, block_size=16, dtype=dtype, device=CPU)
    scheduler = Scheduler(EngineConfig(max_step_tokens=tokens, max_running=8, speculative_tokens=guesses), num_blocks)
    engine = Engine(scheduler, ModelRunner(decoder, cache, device=CPU, sampler=Sampler(choose=ops.sample)))
    for number, ids in enumerate(prompts):
        scheduler.add(Request(str(number), list(ids), params))
    answers: dict[str, list[Answer]] = {str(number): [] for number in range(len(prompts))}
    while scheduler.has_work:
        for event in engine.step():
            answers[event.request_id].append((event.token_id, event.logprobs))
    return answers, scheduler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("variant", VARIANTS[:1])
def test_company_changes_no_bit(variant: str, dtype: torch.dtype) -> None:
    alone = {
        str(number): run(open_variant(variant, 1), [ids], dtype=dtype)[0]["0"] for number, ids in enumerate(PROMPTS)
    }
    assert all(len(answer) == PARAMS.max_tokens for answer in alone.values())
    ops = open_variant(variant)
    crowd, scheduler = run(ops, PROMPTS, dtype=dtype)
    assert crowd == alone
    assert run(ops, PROMPTS, dtype=dtype, tokens=9)[0] == alone
    preempted, scheduler = run(ops, PROMPTS, dtype=dtype, num_blocks=14)
    assert preempted == alone
    assert scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_guesses_change_no_bit(variant: str, dtype: torch.dtype) -> None:
    """The likeliest tokens of a random model go round in circles, so that many guesses are right."""
    ops, params = open_variant(variant), replace(PARAMS, temperature=0.0)
    plain, _ = run(ops, PROMPTS, dtype=dtype, guesses=0, params=params)
    guessed, scheduler = run(ops, PROMPTS, dtype=dtype, params=params)
    assert guessed == plain
    assert 0 < scheduler.stats.num_accepted_tokens < scheduler.stats.num_draft_tokens
    preempted, scheduler = run(ops, PROMPTS, dtype=dtype, params=params, num_blocks=14)
    assert preempted == plain
    assert scheduler.stats.num_preemptions > 0


def test_plain_torch_over_codes_says_much_the_same() -> None:
    """A number on the edge between two codes may fall to either side."""
    plain, _ = run(ReferenceOps(device=CPU), PROMPTS, dtype=torch.int8)
    native, _ = run(open_variant(VARIANTS[0]), PROMPTS, dtype=torch.int8)
    firsts = [(plain[name][0][1][0].logprob, native[name][0][1][0].logprob) for name in plain]
    assert all(found == pytest.approx(wanted, abs=5e-3) for found, wanted in firsts)
