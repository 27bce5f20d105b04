"""Requests to a server with every fault we know of: what is counted, what is not, and what is said of it."""

import asyncio
import socket
from collections.abc import Sequence

import pytest

from clients.exchange import Address, Connections, Exchange
from qserve.bench.answer import NO_DONE, NO_USAGE, Answer, read_answer, split_frames
from qserve.bench.target import Server, Target, connect
from qserve.bench.work import Job
from qserve.errors import UsageError
from tests.bench.fake_server import NUM_TOKENS, USAGE, WORDS


def ask(url: str, models: Sequence[str], *, seconds: float = 10) -> list[Answer]:
    """One request after the other, over connections that are kept."""

    async def send() -> list[Exchange]:
        connections = Connections(url, seconds=seconds)
        try:
            return [
                await connections.exchange("POST", "/v1/completions", Job("", {}).encode(model)) for model in models
            ]
        finally:
            connections.close()

    return [read_answer(exchange) for exchange in asyncio.run(send())]


@pytest.mark.parametrize("model", ["good", "slow", "crlf", "pieces", "until-close"])
def test_whole_answers(fake: str, model: str) -> None:
    (answer,) = ask(fake, [model])
    assert (answer.failure, answer.defects) == ("", ())
    assert len(answer.chunk_times) == len(WORDS)
    assert (answer.num_prompt_tokens, answer.num_output_tokens, answer.num_cached_tokens) == (5, NUM_TOKENS, 2)
    assert answer.started_at < answer.chunk_times[0] <= answer.chunk_times[-1]


def test_chunks_are_timed_as_they_come(fake: str) -> None:
    (answer,) = ask(fake, ["slow"])
    assert answer.ttft >= 0.03
    assert min(answer.itls) > 0.01
    assert answer.e2el >= 0.09
    assert answer.tpot == pytest.approx((answer.e2el - answer.ttft) / (NUM_TOKENS - 1))


@pytest.mark.parametrize(
    ("model", "failure"),
    [
        ("busy", "HTTP 503: 'loading'"),
        ("page", "no chunk with a choice; the body is '<html>hello</html>'"),
        ("cut", "the connection was closed before the answer's end"),
        ("short", "cut short: neither a finish_reason nor [DONE]"),
        ("no-choices", "no chunk with a choice"),
        ("broken", "a frame is not JSON: '{\"choices\": ['"),
        ("error", "error in the stream: 'out of blocks'"),
    ],
)
def test_failures(fake: str, model: str, failure: str) -> None:
    (answer,) = ask(fake, [model])
    assert answer.failure.startswith(failure)


@pytest.mark.parametrize(("model", "defect"), [("no-done", NO_DONE), ("no-usage", NO_USAGE)])
def test_defects_of_answers_that_count(fake: str, model: str, defect: str) -> None:
    (answer,) = ask(fake, [model])
    assert (answer.failure, answer.defects) == ("", (defect,))


def test_a_server_that_hangs(fake: str) -> None:
    (answer,) = ask(fake, ["hanging"], seconds=0.2)
    assert answer.failure == "no end after 0.2 s"


def test_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        (answer,) = ask(f"http://127.0.0.1:{bound.getsockname()[1]}", ["good"])
    assert answer.failure.startswith("no connection to 127.0.0.1:")


def test_a_connection_is_used_again_and_a_closed_one_is_not(fake: str) -> None:
    answers = ask(fake, ["good", "good", "cut", "good", "until-close", "good", "busy", "good"])
    assert [bool(answer.failure) for answer in answers] == [False, False, True, False, False, False, True, False]


def test_frames_however_they_are_cut() -> None:
    body = (
        b": a comment\n\ndata: one\r\n\r\nevent: x\ndata:two\ndata: more\n\ndata: " + "é".encode() + b"\n\ndata: left"
    )
    for size in range(1, len(body)):
        pieces = [(float(start), body[start : start + size]) for start in range(0, len(body), size)]
        frames = list(split_frames(pieces))
        assert [data for _, data in frames] == [b"one", b"two\nmore", "é".encode()]
        ends = [body.index(end) + len(end) for end in (b"one\r\n\r\n", b"more\n\n", "é\n\n".encode())]
        assert [arrival for arrival, _ in frames] == [(end - 1) // size * size for end in ends]


def test_times_by_hand() -> None:
    pieces = [(10.0 + at, b"data: " + data + b"\n\n") for at, data in zip((1, 2, 4, 8), (*WORDS, USAGE), strict=True)]
    answer = read_answer(Exchange(started_at=10.0, status=200, pieces=pieces))
    assert (answer.ttft, answer.itls, answer.e2el) == (1.0, [1.0, 2.0], 4.0)
    assert answer.tpot == 3.0 / (NUM_TOKENS - 1)


def test_what_a_server_tells_of_itself(fake: str) -> None:
    async def look(text: str) -> Server:
        server = connect(Target.parse(text), api_key="", seconds=5)
        await server.look()
        server.connections.close()
        return server

    first = asyncio.run(look(f"{fake}/v1/"))
    assert (first.model, first.vocab_size, first.problem) == ("good", 300, "")
    named = asyncio.run(look(f"mine={fake}#slow"))
    assert (named.label, named.model) == ("mine", "slow")
    wrong_path = asyncio.run(look(f"{fake}/elsewhere"))
    assert wrong_path.problem == "GET /v1/models is answered with HTTP 404"


def test_names_of_targets() -> None:
    assert Target.parse("http://host:80/v1") == Target(label="host:80", url="http://host:80", model="")
    assert Target.parse("a=https://h/p#m/x") == Target(label="a", url="https://h/p", model="m/x")
    assert Address.parse("https://[::1]").authority == "[::1]:443"
    with pytest.raises(UsageError, match="names no server"):
        Target.parse("127.0.0.1:8000")
