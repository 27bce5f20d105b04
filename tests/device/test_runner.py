"""The runner: chunks of several requests in one step, log-probabilities, the cache's dtype and size."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qserve.device import runner as runner_module
from qserve.device.batch import DecodeBatches, make_batch
from qserve.device.decoder import Decoder
from qserve.device.runner import ModelRunner
from qserve.device.sampler import Sampler
from qserve.engine.request import Chunk, Request, Sampled, SamplingParams
from tests.device.driving import (
    BLOCK_SIZE,
    CPU,
    GREEDY,
    cache_for,
    chunked_logits,
    config_of,
    generate,
    load,
    prompt,
    runner_for,
    weights_of,
    whole_logits,
)
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model() -> Decoder:
    theirs = make_model("llama")
    return load(config_of(theirs), weights_of(theirs))


def _request(ids: list[int], **params: Any) -> Request:
    return Request("r", ids, replace(GREEDY, **params))


def _blocks(start: int, count: int = 16) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def test_the_flat_batch() -> None:
    first, second = _request(prompt(20)), _request(prompt(5, seed=1))
    chunks = [
        Chunk(request=first, start=6, end=11, block_ids=(9, 4, 7)),
        Chunk(request=second, start=4, end=5, block_ids=(2, 8)),
    ]
    batch = make_batch(chunks, block_size=4, device=CPU)
    assert batch.token_ids.tolist() == [*first.token_ids[6:11], second.token_ids[4]]
    assert batch.positions.tolist() == [6, 7, 8, 9, 10, 4]
    assert batch.query_starts.tolist() == [0, 5, 6]
    assert batch.context_lens.tolist() == [11, 5]
    assert batch.slots.tolist() == [4 * 4 + 2, 4 * 4 + 3, 7 * 4, 7 * 4 + 1, 7 * 4 + 2, 8 * 4]
    assert batch.sample_rows.tolist() == [5]
    assert (batch.chunk_tokens, batch.chunk_ends) == ((5, 1), (11, 5))


def test_the_table_is_as_wide_as_the_longest_to_the_next_power_of_two() -> None:
    request = _request(prompt(20))
    chunks = [
        Chunk(request=request, start=0, end=9, block_ids=(9, 4, 7, 1, 2)),
        Chunk(request=request, start=0, end=4, block_ids=(3, 5)),
    ]
    batch = make_batch(chunks, block_size=4, device=CPU)
    assert batch.block_tables.tolist() == [[9, 4, 7, 0], [3, 0, 0, 0]]


def test_batches_written_in_place_are_those_made_anew() -> None:
    """More rows and fewer, more blocks and fewer, than in the step before."""
    batches = DecodeBatches(block_size=4)
    for step, (rows, length) in enumerate(((1, 3), (3, 17), (200, 5), (2, 40), (2, 41), (5, 1), (70, 9))):
        requests = [_request(prompt(length + row % 3, seed=step)) for row in range(rows)]
        chunks = [
            Chunk(
                request=request,
                start=request.num_tokens - 1,
                end=request.num_tokens,
                block_ids=_blocks(step + row),
                draft_ids=tuple(range(row % 4 * step)),
            )
            for row, request in enumerate(requests)
        ]
        expected, batch = make_batch(chunks, block_size=4, device=CPU), batches.make(chunks)
        for name in ("token_ids", "positions", "slots", "query_starts", "context_lens", "sample_rows"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
            assert getattr(batch, name).dtype == getattr(expected, name).dtype
        width = expected.block_tables.shape[1]
        assert torch.equal(batch.block_tables[:, :width], expected.block_tables)
        assert not batch.block_tables[:, width:].any()
        assert (batch.chunk_tokens, batch.chunk_ends) == (expected.chunk_tokens, expected.chunk_ends)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "seed": 5, "presence_penalty": 1.0, "min_tokens": 9}])
def test_guesses_are_kept_as_far_as_they_are_right(model: Decoder, params: dict[str, Any]) -> None:
    params = {"logprobs": 2, "stop_token_ids": frozenset({4}), **params}
    request, blocks = _request(prompt(20), **params), _blocks(0)
    runner, steps = runner_for(model), []
    for start in (0, 20, 21, 22, 23):
        steps += runner.run([Chunk(request=request, start=start, end=request.num_tokens, block_ids=blocks)])
        request.token_ids += steps[-1].token_ids
    said = tuple(request.token_ids[20:])
    for num_right in range(5):
        again, other = _request(prompt(20), **params), _request(prompt(9, seed=1))
        wrong = () if num_right == 4 else ((said[num_right] + 1) % 512, 3)
        chunks = [
            Chunk(request=other, start=0, end=9, block_ids=_blocks(100)),
            Chunk(request=again, start=0, end=20, block_ids=blocks, draft_ids=said[:num_right] + wrong),
        ]
        _, answer = runner_for(model).run(chunks)
        assert answer.token_ids == said[: num_right + 1]
        assert [score[0].token_id for score in answer.logprobs] == [*answer.token_ids]
        for score, step in zip(answer.logprobs, steps, strict=False):
            found, wanted = ([each.logprob for each in row] for row in (score, step.logprobs[0]))
            assert found == pytest.approx(wanted, abs=1e-4)


def test_only_a_last_chunk_is_answered_with_a_token(model: Decoder) -> None:
    request = _request(prompt(20))
    runner = runner_for(model)
    answers = [
        runner.run([Chunk(request=request, start=start, end=end, block_ids=_blocks(0))])
        for start, end in ((0, 8), (8, 16), (16, 20))
    ]
    tokens = [answer[0].token_ids for answer in answers]
    assert tokens == [(), (), (int(whole_logits(model, request.token_ids)[-1].argmax()),)]


def test_logprobs_are_of_the_raw_distribution(model: Decoder) -> None:
    request = _request(prompt(20), temperature=0.3, seed=1, logprobs=4, logit_bias={7: 5.0}, top_k=2)
    other = _request(prompt(9, seed=1))
    chunks = [
        Chunk(request=other, start=0, end=9, block_ids=_blocks(100)),
        Chunk(request=request, start=0, end=20, block_ids=_blocks(0)),
    ]
    silent, sampled = runner_for(model).run(chunks)
    expected = torch.log_softmax(whole_logits(model, request.token_ids)[-1], dim=-1)
    assert silent.logprobs == ()
    [score] = sampled.logprobs
    assert len(score) == 5
    assert sampled.token_ids == (score[0].token_id,)
    for each in score:
        assert each.logprob == pytest.approx(float(expected[each.token_id]), abs=1e-4)
        assert each.rank == int((expected > expected[each.token_id]).sum()) + 1


def test_named_tokens_are_reported_behind_the_most_likely(model: Decoder) -> None:
    request = _request(prompt(20), logprobs=1, logprob_token_ids=(9, 3, 9))
    (sampled,) = runner_for(model).run([Chunk(request=request, start=0, end=20, block_ids=_blocks(0))])
    expected = torch.log_softmax(whole_logits(model, request.token_ids)[-1], dim=-1)
    [score] = sampled.logprobs
    assert [each.token_id for each in score[2:]] == [9, 3, 9]
    for each in score[2:]:
        assert each.logprob == pytest.approx(float(expected[each.token_id]), abs=1e-4)
        assert each.rank == int((expected > expected[each.token_id]).sum()) + 1


@pytest.mark.parametrize("size", [20, 7, 1])
@pytest.mark.parametrize("first", [0, 9, 19])
def test_pooled_hidden_states_are_those_of_transformers(size: int, first: int) -> None:
    theirs = make_model("llama")
    runner = runner_for(load(config_of(theirs), weights_of(theirs)))
    request = _request(prompt(20), pooled_from=first)
    with torch.inference_mode():
        expected = theirs.model(torch.tensor([request.token_ids])).last_hidden_state[0, first:].sum(dim=0)
    found = torch.zeros(64)
    for start in range(0, 20, size):
        chunk = Chunk(request=request, start=start, end=min(start + size, 20), block_ids=_blocks(0))
        found += torch.tensor(runner.run([chunk])[0].pooled or [0.0] * 64)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [20, 7, 1])
@pytest.mark.parametrize("limit", [64, 3, 1])
def test_prompt_logprobs_in_pieces(model: Decoder, size: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_NUM_SCORED", limit)
    request = _request(prompt(20), prompt_logprobs=2)
    runner = runner_for(model)
    found = []
    for start in range(0, 20, size):
        chunk = Chunk(request=request, start=start, end=min(start + size, 20), block_ids=_blocks(0))
        found += runner.run([chunk])[0].prompt_logprobs
    expected = torch.log_softmax(whole_logits(model, request.token_ids), dim=-1)
    assert [position[0].token_id for position in found] == request.token_ids[1:]
    for row, position in enumerate(found):
        assert [each.token_id for each in position[1:]] == expected[row].topk(2).indices.tolist()
        for each in position:
            assert each.logprob == pytest.approx(float(expected[row, each.token_id]), abs=1e-4)


def test_a_seeded_request_says_the_same_alone_and_in_company(model: Decoder) -> None:
    def requests() -> list[Request]:
        params = [
            SamplingParams(max_tokens=20, temperature=0.9, seed=seed, top_p=0.95, frequency_penalty=0.2)
            for seed in range(3)
        ]
        return [Request(str(i), prompt(6 + i, seed=i), each) for i, each in enumerate(params)]

    together = requests()
    generate(runner_for(model, seed=1), together, num_tokens=20)
    for number, request in enumerate(requests()):
        generate(runner_for(model, seed=2), [request], num_tokens=20)
        assert request.token_ids == together[number].token_ids


def test_a_chunk_may_read_what_another_one_of_the_step_writes(model: Decoder) -> None:
    """Two requests that arrive together share the blocks of their common beginning at once."""
    ids = prompt(20)
    first, second = _request(ids), _request(ids[:16] + prompt(5, seed=4))
    chunks = [
        Chunk(request=first, start=0, end=20, block_ids=(3, 5, 6)),
        Chunk(request=second, start=16, end=21, block_ids=(3, 5, 9)),
    ]
    answers = runner_for(model).run(chunks)
    for request, answer in zip((first, second), answers, strict=True):
        assert answer.token_ids == (int(whole_logits(model, request.token_ids)[-1].argmax()),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_rounded_cache_is_close(model: Decoder, dtype: torch.dtype) -> None:
    request = _request(prompt(40), logprobs=1)
    chunk = Chunk(request=request, start=0, end=40, block_ids=_blocks(0))

    def run(kind: torch.dtype) -> Sampled:
        return ModelRunner(model, cache_for(model, dtype=kind), device=CPU, sampler=Sampler()).run([chunk])[0]

    exact, rounded = run(torch.float32), run(dtype)
    assert exact.logprobs[0][0].logprob == pytest.approx(rounded.logprobs[0][0].logprob, abs=0.1)
    assert exact.logprobs[0][0].logprob != rounded.logprobs[0][0].logprob


def test_memory_and_warm_up(model: Decoder) -> None:
    runner = runner_for(model)
    runner.warm_up([100, 1])
    memory = runner.memory
    assert memory.block == 3 * 2 * 2 * BLOCK_SIZE * 16 * 4  # layers, keys and values, heads, positions, width, bytes
    assert memory.cache == runner.num_blocks * memory.block
    assert memory.weights == model.num_bytes > 0
    assert len(chunked_logits(model, [prompt(3)], sizes=[3])) == 1
