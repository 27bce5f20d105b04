"""From token events to deltas, against the plain formulas; no device, no threads."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.engine.request import FinishReason, SamplingParams, TokenEvent, TokenLogprob
from qserve.errors import ContextLengthExceeded, InvalidRequest, NotReady
from qserve.generation import GenerationOptions, Prompt, TextAssembler, TextDelta
from qserve.text.tokenizer import Tokenizer, load_tokenizer
from tests import tiny
from tests.api.conftest import make_llm

END = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def events_of(ids: list[int], *, end: FinishReason = FinishReason.LENGTH) -> Iterable[TokenEvent]:
    for number, token_id in enumerate(ids, start=1):
        yield TokenEvent(
            request_id="r",
            token_id=token_id,
            logprobs=(TokenLogprob(token_id, -float(number), 1),),
            finish_reason=end if number == len(ids) else None,
            num_cached_tokens=3 if number == 1 else 0,
        )


def assemble(
    tokenizer: Tokenizer, events: Iterable[TokenEvent], *, prompt: Prompt | None = None, **options: object
) -> list[TextDelta]:
    sampling = options.pop("sampling", SamplingParams(max_tokens=100))
    wanted = GenerationOptions(sampling=sampling, **options)  # type: ignore[arg-type]
    assembler = TextAssembler(tokenizer, prompt or Prompt(ids=[5]), wanted)
    deltas = []
    for event in events:
        delta = assembler.add(event)
        if delta is not None:
            deltas.append(delta)
            if delta.finish_reason is not None:
                break
    return deltas


IDS = st.lists(st.integers(0, tiny.VOCABULARY_SIZE - 1), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(ids=IDS, skip=st.booleans())
def test_deltas_joined_are_the_decoded_text_and_lose_no_token(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    deltas = assemble(tokenizer, events_of(ids), skip_special_tokens=skip)
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids
    assert [token.token_id for delta in deltas for token in delta.logprobs] == ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [FinishReason.LENGTH]
    assert all(delta.text for delta in deltas[:-1])
    assert deltas[-1].num_output_tokens == len(ids)
    assert deltas[-1].num_cached_tokens == 3


@settings(max_examples=300, deadline=None)
@given(ids=IDS, data=st.data())
def test_a_stop_string_ends_the_text_and_names_itself(
    tokenizer: Tokenizer, ids: list[int], data: st.DataObject
) -> None:
    text = tokenizer.decode(ids)
    stops = data.draw(st.lists(st.text(text or "a", min_size=1, max_size=3), min_size=1, max_size=3))
    deltas = assemble(tokenizer, events_of(ids), stop=tuple(stops))
    joined, last = "".join(delta.text for delta in deltas), deltas[-1]
    found = [(text.find(stop) + len(stop), number) for number, stop in enumerate(stops) if stop in text]
    if found:
        end, number = min(found)
        assert (joined, last.stop_reason) == (text[: end - len(stops[number])], stops[number])
        assert last.finish_reason is FinishReason.STOP
    else:
        assert (joined, last.finish_reason, last.stop_reason) == (text, FinishReason.LENGTH, None)


def test_the_end_token_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    (word,) = tokenizer.encode("a")
    *_, last = deltas = assemble(tokenizer, events_of([word, END], end=FinishReason.STOP), skip_special_tokens=False)
    assert "".join(delta.text for delta in deltas) == "a"
    assert (last.num_output_tokens, last.token_ids, last.stop_reason) == (2, (END,), None)


def test_a_stop_token_of_the_callers_is_named_and_shown_when_asked(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab")[:2] if len(tokenizer.encode("ab")) == 2 else (tokenizer.encode("a") * 2)
    sampling = SamplingParams(max_tokens=9, stop_token_ids=frozenset({b}))
    events = list(events_of([a, b], end=FinishReason.STOP))
    (*_, last) = hidden = assemble(tokenizer, events, sampling=sampling)
    assert last.stop_reason == b
    shown = assemble(tokenizer, events, sampling=sampling, include_stop=True)
    assert "".join(d.text for d in shown) == "".join(d.text for d in hidden) + tokenizer.decode([b])


def test_an_echo_comes_first_with_its_scores(tokenizer: Tokenizer) -> None:
    prompt = Prompt(ids=tokenizer.encode("naïve 東京"), text="naïve 東京")
    scores = tuple((TokenLogprob(token_id, -1.0, 1),) for token_id in prompt.ids[1:])
    prefill = TokenEvent(request_id="r", prompt_logprobs=scores[:2])
    rest = TokenEvent(
        request_id="r", token_id=tokenizer.encode("x")[0], prompt_logprobs=scores[2:], finish_reason=FinishReason.LENGTH
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (delta,) = assemble(tokenizer, [prefill, rest], prompt=prompt, echo=True, sampling=sampling)
    assert delta.text == "naïve 東京x"
    assert [token.token_id for token in delta.prompt_logprobs] == prompt.ids
    assert [token.logprobs for token in delta.prompt_logprobs] == [(), *scores]
    assert delta.prompt_logprobs[0].text_offset == 0


def test_what_does_not_fit_or_is_not_in_the_vocabulary_is_refused(directory: Path) -> None:
    llm, _ = make_llm(directory)
    try:
        assert llm.room_for(Prompt(ids=[1] * 500), None) == 12
        assert llm.room_for(Prompt(ids=[1] * 512), 0) == 0
        with pytest.raises(ContextLengthExceeded, match="512 tokens"):
            llm.room_for(Prompt(ids=[1] * 512), None)
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            llm.check_ids([0, 512])
        assert llm.encode("").ids == [1]
    finally:
        llm.close()


def test_closing_ends_what_runs_with_an_error(directory: Path) -> None:
    llm, runner = make_llm(directory)

    async def main() -> None:
        options = GenerationOptions(sampling=SamplingParams(max_tokens=400), ignore_eos=True)
        stream = llm.stream(llm.encode("Hello"), options)
        await anext(stream)  # type: ignore[arg-type]
        runner.gate.clear()
        closing = asyncio.create_task(asyncio.to_thread(llm.close))
        await asyncio.sleep(0)
        runner.gate.set()
        with pytest.raises(NotReady, match="cut short"):
            async for _ in stream:
                pass
        await closing

    asyncio.run(main())
