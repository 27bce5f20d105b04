"""Every architecture against transformers' own class: logits whole, chunked and batched, and greedy text."""

from typing import Any

import pytest
import torch

from qserve.device.architectures import FAMILIES
from qserve.engine.request import Request
from tests.device.driving import (
    GREEDY,
    assert_close,
    chunked_logits,
    config_of,
    generate,
    load,
    prompt,
    runner_for,
    their_logits,
    weights_of,
    whole_logits,
)
from tests.tiny import make_model

ARCHITECTURES = sorted(set(FAMILIES) - {"gemma3"})  # which is gemma3_text inside another config; see test_loading


@pytest.fixture(scope="module", params=ARCHITECTURES)
def theirs(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def test_logits_whole_chunked_and_batched(theirs: Any) -> None:
    ours = load(config_of(theirs), weights_of(theirs))
    prompts = [prompt(70), prompt(33, seed=1), prompt(9, seed=2)]
    expected = [their_logits(theirs, ids) for ids in prompts]
    assert_close(whole_logits(ours, prompts[0]), expected[0])
    for sizes in ([70, 33, 9], [16, 1, 2], [7, 33, 1], [1, 5, 3]):
        for found, wanted in zip(chunked_logits(ours, prompts, sizes=sizes), expected, strict=True):
            assert_close(found, wanted)


def test_greedy_text(theirs: Any) -> None:
    requests = [Request(str(seed), prompt(12 + 5 * seed, seed=seed), GREEDY) for seed in range(2)]
    generate(runner_for(load(config_of(theirs), weights_of(theirs))), requests, num_tokens=64)
    for request in requests:
        ids = torch.tensor([request.token_ids[: request.num_prompt_tokens]])
        with torch.inference_mode():
            wanted = theirs.generate(ids, do_sample=False, min_new_tokens=64, max_new_tokens=64, eos_token_id=None)
        assert request.token_ids == wanted[0].tolist()
