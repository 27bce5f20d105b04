"""The stream, byte for byte: what clients split on, and what they must never see."""

import json
import re
import socket
from typing import Any

import httpx
import pytest

from tests.api.conftest import Server


def read_stream(server: Server, path: str = "/v1/completions", **fields: Any) -> tuple[bytes, list[bytes]]:
    """The head and the chunks of a response, as they stand on the wire."""
    body = json.dumps({"ignore_eos": True, "stream": True, **fields}).encode()
    with socket.create_connection(server.address, timeout=30) as wire:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = b"".join(iter(lambda: wire.recv(65536), b""))
    head_bytes, _, rest = received.partition(b"\r\n\r\n")
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return head_bytes, chunks[:-1]


def test_every_byte_of_a_short_stream(server: Server) -> None:
    head, chunks = read_stream(server, prompt="Hello", max_tokens=1, logit_bias={"300": 100})
    assert head.startswith(b"HTTP/1.1 200")
    headers = httpx.Headers([tuple(line.split(b": ", 1)) for line in head.split(b"\r\n")[1:]])  # type: ignore[misc]
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    text = json.dumps(server.llm.tokenizer.decode([300]))
    expected = (
        r'data: \{"id":"cmpl-[0-9a-f]{32}","object":"text_completion","created":\d+,"model":"tiny","choices":'
        r'\[\{"index":0,"text":'
        + re.escape(text)
        + r',"logprobs":null,"finish_reason":"length","stop_reason":null\}\]\}'
    )
    assert re.fullmatch(expected + "\n\ndata: \\[DONE\\]\n\n", b"".join(chunks).decode())
    assert len(chunks) == 2


def test_what_came_in_one_step_goes_in_one_frame(server: Server) -> None:
    """A text of one token again and again is guessed, up to 15 tokens ahead."""
    _, chunks = read_stream(server, prompt="Hello", max_tokens=60, logit_bias={"300": 100}, logprobs=0)
    choices = [json.loads(chunk[6:])["choices"][0] for chunk in chunks[:-1]]
    assert "".join(choice["text"] for choice in choices) == server.llm.tokenizer.decode([300] * 60)
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 60
    assert len(choices) < 20


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_frames_are_ascii_and_end_in_two_line_feeds(server: Server, path: str) -> None:
    prompt = {"prompt": "東京"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "東京"}]}
    _, chunks = read_stream(server, path, **prompt, max_tokens=200, stream_options={"include_usage": True})
    wire = b"".join(chunks)
    assert wire.isascii()
    assert b"\r" not in wire
    frames = wire.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames[:-1])
    assert len(chunks) == len(frames) - 1  # a frame is one write


def test_what_is_equal_in_every_frame(server: Server) -> None:
    _, chunks = read_stream(server, prompt="Hello", max_tokens=50)
    frames = [json.loads(chunk[6:]) for chunk in chunks[:-1]]
    assert len({(frame["id"], frame["created"], frame["model"], frame["object"]) for frame in frames}) == 1
    reasons = [frame["choices"][0]["finish_reason"] for frame in frames]
    assert reasons == [None] * (len(frames) - 1) + ["length"]
    assert all(frame["choices"][0]["text"] for frame in frames[:-1])
    assert not any("usage" in frame for frame in frames)


@pytest.mark.parametrize("continuous", [None, False, True])
def test_usage_comes_last_and_only_when_asked(server: Server, continuous: bool | None) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    _, chunks = read_stream(server, prompt=["Hello", "you"], n=2, max_tokens=20, seed=1, stream_options=options)
    *frames, last = [json.loads(chunk[6:]) for chunk in chunks[:-1]]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 80
    assert last["usage"]["total_tokens"] == 80 + last["usage"]["prompt_tokens"]
    counts = [frame["usage"] and frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts) if continuous else set(counts) == {None}
    if continuous:
        assert counts[-1] == 80


def test_the_last_text_carries_the_finish_reason_of_every_choice(server: Server) -> None:
    _, chunks = read_stream(server, prompt=["a", "b", "c"], n=2, max_tokens=9, seed=5)
    choices = [json.loads(chunk[6:])["choices"][0] for chunk in chunks[:-1]]
    for index in range(6):
        reasons = [choice["finish_reason"] for choice in choices if choice["index"] == index]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_an_error_after_the_first_byte_is_a_frame_and_the_stream_still_ends(tokenizer_directory: Any) -> None:
    from tests.api.conftest import serving

    with serving(tokenizer_directory) as server:
        server.runner.fault = RuntimeError("the device is on fire")
        _, chunks = read_stream(server, prompt="Hello")
        error = json.loads(chunks[0][6:])["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_dead")
        assert chunks[1:] == [b"data: [DONE]\n\n"]
        for path in ("/health", "/ready", "/v1/models"):
            assert httpx.get(server.url + path).status_code == 503
        response = httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
        assert response.status_code == 503
        server.runner.fault = None
