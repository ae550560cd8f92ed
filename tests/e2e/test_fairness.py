"""Many requests for a few adapters, and one for another: it is answered soon, whoever floods and whatever is full."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.process import Server, eventually

RUNNING = 4
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path) -> Iterator[Server]:
    """Five adapters; the device has room for two of them."""
    log = tmp_path_factory.mktemp("crowded") / "log"
    options = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
    options += [part for name in "abcde" for part in ("--adapter", f"{name}={tiny_adapter}")]
    size = _resident_bytes(options[:-8], log.with_name("measuring"))
    server = Server([*options, "--max-generations", str(RUNNING), "--adapter-memory", f"{5 * size // 2}"], log)
    try:
        yield server.wait_until_ready()
        server.wait_until_idle()
    finally:
        assert server.stop() == 0
    assert "Traceback" not in log.read_text()


def _resident_bytes(options: list[str], log: Path) -> int:
    server = Server(options, log)
    try:
        return int(server.wait_until_ready().metrics["motet_adapter_memory_bytes"])
    finally:
        server.stop()


class Flood:
    """Clients that ask again and again, in threads, until the block is left."""

    def __init__(self, server: Server, adapters: str, clients: int) -> None:
        self._server, self._over = server, threading.Event()
        self.statuses: list[int] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(adapters[place % len(adapters)],)) for place in range(clients)
        ]

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        eventually(lambda: self._server.metrics["motet_waiting"] >= len(self._threads) - RUNNING - 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, adapter: str) -> None:
        while not self._over.is_set():
            self.statuses.append(self._server.post("/v1/completions", {"model": adapter, **LONG}).status_code)


def seconds_for(server: Server, adapter: str) -> float:
    began_s = time.monotonic()
    assert server.complete(model=adapter, **LONG)["usage"]["completion_tokens"] == LONG["max_tokens"]
    return time.monotonic() - began_s


def test_another_adapter_does_not_wait_for_the_whole_flood(crowded: Server) -> None:
    """Of 24 that ask at once four run. By arrival it would wait for the twenty before it, which take five rounds."""
    alone_s = seconds_for(crowded, "b")
    with Flood(crowded, "a", clients=24) as flood:
        rounds_s, taken_s = [], []
        for _ in range(3):
            rounds_s.append(seconds_for(crowded, "a"))
            taken_s.append(seconds_for(crowded, "b"))
    assert set(flood.statuses) == {200}
    assert sorted(taken_s)[1] < sorted(rounds_s)[1] / 2, (alone_s, taken_s, rounds_s)


def test_adapters_that_need_the_room_of_hot_ones_have_their_turns(crowded: Server) -> None:
    """Two adapters that always wait fill the device; the other three are answered all the same."""
    with Flood(crowded, "ab", clients=16) as flood:
        for adapter in "cdecde":
            assert seconds_for(crowded, adapter) < 30
    assert set(flood.statuses) == {200}
