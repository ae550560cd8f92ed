"""Clients that go away in the middle of an answer give back everything the answer held."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.process import Server, eventually

NAME = "leaving"
LONG: dict[str, Any] = {"max_tokens": 8000, "temperature": 0, "ignore_eos": True}
"""Takes minutes: what ends within seconds was ended by the client's leaving."""
WITHIN_S = 20


@pytest.fixture
def adapter(server: Server, adapter_root: Path) -> Iterator[str]:
    """An adapter of the test's own; afterwards unloading it must free its memory."""
    used = server.metrics["motet_adapter_memory_bytes"]
    assert server.load(NAME, adapter_root / "random-a").status_code == 200
    assert server.metrics["motet_adapter_memory_bytes"] > used
    yield NAME
    server.wait_until_idle(WITHIN_S)
    assert server.unload(NAME).status_code == 200
    eventually(lambda: server.metrics["motet_adapter_memory_bytes"] == used, WITHIN_S)


def raw_request(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(head.encode() + content)
    return connection


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [close, reset])
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "at once"])
def test_a_closed_connection(
    server: Server, adapter: str, leave: Callable[[socket.socket], None], stream: bool
) -> None:
    connection = raw_request(server, {"model": adapter, "prompt": ["One", "Two"], "stream": stream, **LONG})
    server.wait_until_running(2)
    seen = b""
    while stream and seen.count(b"data:") < 3:
        seen += connection.recv(4096)
    assert server.metrics["motet_kv_usage"] > 0
    leave(connection)


def test_a_connection_closed_at_once(server: Server, adapter: str) -> None:
    """Before the first byte of the answer, for some perhaps before the request was read."""
    for _ in range(8):
        reset(raw_request(server, {"model": adapter, "prompt": "One", "stream": True, **LONG}))


def test_a_connection_closed_while_it_waits(server: Server, adapter: str) -> None:
    """More generations than run at once: what still waits must go as well."""
    many = {"model": adapter, "prompt": [f"Prompt {i}" for i in range(80)], "stream": True, **LONG}
    connection = raw_request(server, many)
    eventually(lambda: server.metrics["motet_waiting"] > 0)
    close(connection)


def test_an_aborted_stream_of_the_openai_client(server: Server, adapter: str) -> None:
    with server.openai() as client:
        stream = client.chat.completions.create(
            model=adapter,
            messages=[{"role": "user", "content": "Count."}],
            stream=True,
            n=3,
            max_tokens=LONG["max_tokens"],
            extra_body={"ignore_eos": True},
        )
        for _, chunk in zip(range(8), stream, strict=False):
            assert chunk.choices
        assert server.metrics["motet_running"] == 3
        stream.close()
        server.wait_until_idle(WITHIN_S)


def test_a_timeout_of_the_openai_client(server: Server, adapter: str) -> None:
    with server.openai() as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=adapter, prompt="One", max_tokens=LONG["max_tokens"], extra_body={"ignore_eos": True}, timeout=1
        )


def test_unloading_the_adapter_of_a_client_that_went_away(server: Server, adapter_root: Path) -> None:
    """The other order: first the name goes, then the client, and only then the memory."""
    used = server.metrics["motet_adapter_memory_bytes"]
    assert server.load(NAME, adapter_root / "random-a").status_code == 200
    connection = raw_request(server, {"model": NAME, "prompt": "One", "stream": True, **LONG})
    server.wait_until_running()
    assert server.unload(NAME).status_code == 200
    assert server.metrics["motet_adapter_memory_bytes"] > used
    close(connection)
    eventually(lambda: server.metrics["motet_adapter_memory_bytes"] == used, WITHIN_S)
    server.wait_until_idle(WITHIN_S)


def test_neighbours_do_not_notice(server: Server, adapter: str) -> None:
    body: dict[str, Any] = {"model": server.base, "prompt": "One two three", "max_tokens": 24, "temperature": 0}
    alone = server.complete(**body)["choices"][0]["text"]
    with server.openai() as client, client.completions.create(**body, stream=True) as stream:
        leaving = raw_request(server, {"model": adapter, "prompt": "One two three", "stream": True, **LONG})
        pieces = [next(stream).choices[0].text]
        server.wait_until_running(2)
        close(leaving)
        pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == alone
