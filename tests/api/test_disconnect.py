"""A client that goes away frees its blocks, wherever it was; raw sockets, for a client library would be polite."""

import json
import socket
import struct
from typing import Any

import pytest

from tests.api.conftest import Server, wait_until


def send_request(server: Server, **fields: Any) -> socket.socket:
    body = json.dumps({"ignore_eos": True, "max_tokens": 400, "prompt": "Hello", **fields}).encode()
    wire = socket.create_connection(server.address, timeout=30)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    wire.sendall(head.encode() + body)
    return wire


def hang_up(wire: socket.socket, *, rudely: bool) -> None:
    if rudely:  # with a reset instead of a good-bye
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.close()


@pytest.mark.parametrize("rudely", [False, True])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("fields", [{}, {"n": 3, "prompt": ["a", "b"]}], ids=["one", "many"])
class TestGone:
    def test_before_the_prompt_is_computed(
        self, server: Server, streams: bool, rudely: bool, fields: dict[str, Any]
    ) -> None:
        server.runner.gate.clear()  # the step that computes the prompt does not end
        wire = send_request(server, stream=streams, **fields)
        wait_until(lambda: server.llm.loop.stats.num_running > 0)
        self.hang_up_and_check(server, wire, rudely=rudely, fields=fields)

    def test_in_the_middle_of_the_text(
        self, server: Server, streams: bool, rudely: bool, fields: dict[str, Any]
    ) -> None:
        start = server.runner.num_steps
        wire = send_request(server, stream=streams, **fields)
        wait_until(lambda: server.runner.num_steps > start + 20)
        server.runner.gate.clear()
        self.hang_up_and_check(server, wire, rudely=rudely, fields=fields)

    def hang_up_and_check(self, server: Server, wire: socket.socket, *, rudely: bool, fields: dict[str, Any]) -> None:
        expected = server.num_given_up + fields.get("n", 1) * len(fields.get("prompt", "x"))
        steps = server.runner.num_steps
        hang_up(wire, rudely=rudely)
        wait_until(lambda: server.num_given_up == expected)
        server.runner.gate.set()
        server.wait_until_idle()
        assert server.runner.num_steps <= steps + 1  # the one under way: blocks are free before the next


def test_a_client_that_sends_half_a_request_holds_nothing(server: Server) -> None:
    wire = socket.create_connection(server.address)
    wire.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    hang_up(wire, rudely=False)
    server.wait_until_idle()


def test_a_client_that_reads_nothing_does_not_stop_the_others(server: Server) -> None:
    lazy = send_request(server, stream=True, n=20, seed=1, logprobs=20)  # megabytes that nobody takes
    with send_request(server, max_tokens=5) as wire:
        assert wire.recv(100).startswith(b"HTTP/1.1 200")
    hang_up(lazy, rudely=True)
    server.wait_until_idle()
