"""kill -9 at any moment: a name means what it meant before the change that was under way, or what it means after."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ADMIN_KEY, Server, environment
from tests.e2e.publisher import KEPT
from tests.support.names import Names

SEED = 20261123
REGISTRY_KILLS = 40
SERVER_KILLS = 10
PROMPT = [1, 2, 3, 4]
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}


class Watch:
    """What was changed as its author saw it, and the two states that a death may leave."""

    def __init__(self) -> None:
        self.sure = Names(KEPT)
        self.perhaps = self.sure
        self.changes = 0

    def begin(self, kind: str, name: str, digest: str) -> None:
        self.perhaps = self.sure.copy()
        if kind == "publish":
            self.perhaps.publish(name, digest)
        else:
            self.perhaps.remove(name)

    def done(self) -> None:
        self.sure = self.perhaps
        self.changes += 1

    def found(self, versions: dict[str, list[str]]) -> None:
        """After a death."""
        assert versions in (self.sure.versions, self.perhaps.versions)
        self.sure = self.perhaps = Names(KEPT, versions)


@contextlib.contextmanager
def publisher(model: Path, file: Path, sources: Sequence[Path], log: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.e2e.publisher", str(model), str(file), *map(str, sources)]
    variables = environment(OMP_NUM_THREADS="1", PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
        ) as process,
    ):
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_a_registry_that_is_killed_has_lost_nothing(tiny_model: Path, tiny_sources: list[Path], tmp_path: Path) -> None:
    chance, watch, restored = random.Random(SEED), Watch(), 0
    log = tmp_path / "log"
    with publisher(tiny_model, tmp_path / "names.db", tiny_sources, log) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert len(process.stdout.readline().split()) == len(tiny_sources)
        for _ in range(REGISTRY_KILLS):
            process.stdin.write(f"{chance.getrandbits(32)} {chance.uniform(0.01, 0.3)}\n")
            process.stdin.flush()
            for line in iter(process.stdout.readline, "killed\n"):
                word, _, rest = line.rstrip().partition(" ")
                assert word in ("restored", "begin", "done"), f"{line}{log.read_text()}"
                if word == "restored":
                    watch.found(json.loads(rest))
                    restored += 1
                elif word == "begin":
                    watch.begin(*rest.split())
                else:
                    watch.done()
    assert restored > REGISTRY_KILLS / 2
    assert watch.changes > 2 * REGISTRY_KILLS, "so few changes say nothing"


class Client:
    """Changes names of a server until it is gone."""

    def __init__(self, server: Server, watch: Watch, digests: dict[str, str], seed: int) -> None:
        self._server, self._watch, self._digests, self._chance = server, watch, digests, random.Random(seed)

    def work(self) -> None:
        with httpx.Client(base_url=self._server.url, headers=HEADERS, timeout=60) as http:
            while True:
                name = self._chance.choice(("a", "b", "c/d"))
                digest = self._chance.choice(list(self._digests))
                there = self._watch.sure.versions.get(name, [])
                kind = self._chance.choice(("publish", "rollback", "remove")) if there else "publish"
                try:
                    if kind == "remove":
                        self._watch.begin("remove", name, "")
                        response = http.delete(f"/v1/adapters/{name}", headers={"If-Match": there[0]})
                    elif kind == "rollback" and len(there) > 1:
                        self._watch.begin("publish", name, there[1])
                        response = http.post(f"/v1/adapters/{name}/rollback", headers={"If-Match": there[0]})
                    else:
                        self._watch.begin("publish", name, digest)
                        response = http.put(f"/v1/adapters/{name}", json={"source": self._digests[digest]})
                except httpx.TransportError:
                    return
                assert response.status_code == 200, response.text
                self._watch.done()


@pytest.mark.slow
def test_a_server_that_is_killed_has_lost_nothing(tiny_model: Path, tiny_sources: list[Path], tmp_path: Path) -> None:
    chance, watch = random.Random(SEED), Watch()
    digests: dict[str, str] = {}
    arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "16MiB"]
    arguments += ["--adapter-root", str(tiny_sources[0].parent), "--catalogue", str(tmp_path / "names.db")]
    arguments += ["--versions-kept", str(KEPT), "--adapter-memory", "16MiB"]
    for kill in range(SERVER_KILLS + 1):
        server = Server(arguments, tmp_path / f"log-{kill}", MOTET_ADMIN_KEY=ADMIN_KEY).wait_until_ready()
        cards = {card["name"]: card for card in server.http.get("/v1/adapters", headers=HEADERS).json()["data"]}
        watch.found({name: [one["version"] for one in card["versions"]] for name, card in cards.items()})
        for name, card in cards.items():
            assert card["state"] == "ready", card
            answer = server.complete(model=name, prompt=PROMPT, max_tokens=1)
            assert answer["adapter"] == {"name": name, "version": card["version"]}
        if kill == SERVER_KILLS:
            assert server.stop() == 0
            break
        if not digests:
            for source in tiny_sources:
                card = server.http.put("/v1/adapters/x", headers=HEADERS, json={"source": source.name}).json()
                digests[card["version"]] = source.name
            server.http.delete("/v1/adapters/x", headers=HEADERS)
        client = threading.Thread(target=Client(server, watch, digests, chance.getrandbits(32)).work)
        client.start()
        time.sleep(chance.uniform(0.05, 1))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        client.join()
        server.http.close()
    assert watch.changes > SERVER_KILLS
