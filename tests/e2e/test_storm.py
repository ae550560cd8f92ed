"""A storm: more adapters than memory holds, Zipf traffic over all, names that move to new versions all the while.

Every adapter answers its own secret, so an answer that any token of another version had a part in is seen as such.
"""

from __future__ import annotations

import asyncio
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from tests.bench.assignment import zipf_weights
from tests.e2e.process import ADMIN_KEY, Server
from tests.support import secret
from tests.support.models import load_dense
from tests.support.secret import PROMPT, TOKENS, Secret

NAMES = 200
SWAPS = 500
SPARE = 60
"""Adapters that no name means at the start."""
CLIENTS, PUBLISHERS = 12, 2
ON_DEVICE, ON_HOST = 8, 32
TABLE_BYTES = 21 * (2 + 4 + 16 + 4) * 4
"""On the host, beside the pairs, for each of 21 targets: two first units, their cells, counts, groups of four rows."""
LEAVE = 0.05
"""Share of clients that go away after the first piece of their answer."""
WATCH_S = 0.2
GROWTH_BYTES = 64 << 20
"""Of resident memory, from a fifth of the storm to its end: pages of the cache first used then, and malloc's arenas."""


@pytest.fixture(scope="module")
def secrets(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path, tiny_tokenizer: Any
) -> list[Secret]:
    """All of one rank, so that memory for eight of them is memory for any eight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_dense(tiny_model, torch.float32)
    root = tmp_path_factory.mktemp("secrets")
    return secret.make(model, tiny_tokenizer, tiny_adapter, root, NAMES + SPARE)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, secrets: list[Secret], adapter_bytes: int
) -> Iterator[Server]:
    """Device memory for eight adapters, host memory for 32."""
    root = tmp_path_factory.mktemp("storm")
    arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "16MiB"]
    arguments += [
        "--adapter-memory",
        str(ON_DEVICE * adapter_bytes),
        "--host-memory",
        str(ON_HOST * (adapter_bytes + TABLE_BYTES)),
    ]
    arguments += ["--adapter-root", str(secrets[0].folder.parent), "--catalogue", str(root / "catalogue.sqlite")]
    process = Server(arguments, root / "log", MOTET_ADMIN_KEY=ADMIN_KEY)
    try:
        yield process.wait_until_ready()
    finally:
        process.stop()
    assert "Traceback" not in process.log.read_text(), process.log.read_text()


@pytest.fixture(scope="module")
def adapter_bytes(tiny_model: Path, tiny_adapter: Path) -> int:
    """What one adapter takes on the device in float32: its pairs, nothing else."""
    return sum(tensor.nbytes for tensor in load_file(tiny_adapter / "adapter_model.safetensors").values())


@dataclass(slots=True, eq=False)
class Storm:
    """The traffic, and what was seen of it.

    Attributes:
        by_digest: version → its secret.
        served: name → digest it was last published with.
        spare: adapters that no name means.
        tiers: what the server said of its tiers, again and again; see `_tiers`.
        wrong: answers that are not the secret of the version they name, and whatever else went wrong.
    """

    http: httpx.AsyncClient
    process: int
    by_digest: dict[str, Secret]
    served: dict[str, str]
    spare: list[Secret]
    rng: random.Random
    answers: Counter[str] = field(default_factory=Counter)
    versions: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    swaps: int = 0
    resident_bytes: list[int] = field(default_factory=list)
    tiers: list[Mapping[str, float]] = field(default_factory=list)

    async def ask(self) -> None:
        """Requests one after the other until the names have stopped moving."""
        weights = zipf_weights(NAMES, 1.0)
        names = sorted(self.served)
        while self.swaps < SWAPS:
            (name,) = self.rng.choices(names, weights)
            if self.rng.random() < 0.3:
                await self._streamed(name, leave=self.rng.random() < LEAVE / 0.3)
            else:
                response = await self.http.post("/v1/completions", json=_request(name))
                if response.status_code != 200:
                    self.wrong.append(f"{name}: {response.status_code} {response.text}")
                    continue
                self._judge(name, response.headers["x-motet-adapter"], response.json()["choices"][0]["text"])

    async def _streamed(self, name: str, leave: bool) -> None:
        text = ""
        async with self.http.stream("POST", "/v1/completions", json=_request(name) | {"stream": True}) as response:
            if response.status_code != 200:
                self.wrong.append(f"{name}: {response.status_code} {(await response.aread()).decode()}")
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                piece = json.loads(line.removeprefix("data: "))
                if "error" in piece:
                    self.wrong.append(f"{name}: {line}")
                    return
                text += piece["choices"][0]["text"]
                if leave:
                    self.answers["left"] += 1
                    return
        self._judge(name, response.headers["x-motet-adapter"], text)

    def _judge(self, name: str, version: str, text: str) -> None:
        said_name, _, digest = version.rpartition("@")
        expected = self.by_digest[digest].text if digest in self.by_digest else None
        if said_name != name or text != expected:
            self.wrong.append(f"{name} as {version} answered {text!r}, not {expected!r}")
        self.answers[name] += 1
        self.versions.add(version)

    async def swap(self) -> None:
        """Move names to adapters that no name means, the popular ones too."""
        names = sorted(self.served)
        while self.swaps < SWAPS:
            name = self.rng.choice(names[:20] if self.rng.random() < 0.5 else names)
            new = self.spare.pop(0)
            old = self.served[name]
            digest = await self.publish(name, new, {"If-Match": f'"{old}"'})
            if digest is None:
                self.spare.append(new)
                continue
            self.spare.append(self.by_digest[old])
            self.served[name] = digest
            self.swaps += 1
            if self.swaps % 25 == 0:
                self.resident_bytes.append(_resident_bytes(self.process))

    async def watch(self) -> None:
        """Look at the tiers while all this goes on."""
        while self.swaps < SWAPS:
            self.tiers.append(_tiers((await self.http.get("/metrics")).text))
            await asyncio.sleep(WATCH_S)

    async def publish(self, name: str, new: Secret, condition: dict[str, str]) -> str | None:
        """The digest of the new version; None where another publisher was faster."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", **condition}
        body = {"source": str(new.folder)}
        while True:
            response = await self.http.put(f"/v1/adapters/{name}", json=body, headers=headers)
            if response.status_code in (423, 429):
                await asyncio.sleep(float(response.headers.get("Retry-After", 0.1)) / 10)
                continue
            break
        if response.status_code == 409:
            return None
        if response.status_code not in (200, 201):
            self.wrong.append(f"publish of {name}: {response.status_code} {response.text}")
            return None
        digest: str = response.json()["version"]
        self.by_digest[digest] = new
        return digest


def _request(name: str) -> dict[str, Any]:
    return {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def _tiers(metrics: str) -> Mapping[str, float]:
    """Tier → bytes, "evicted from" a tier → adapters, from the exposition text."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "motet_adapter_bytes":
                found[sample.labels["tier"]] += sample.value
            elif sample.name == "motet_adapter_evictions_total":
                found[f"evicted from {sample.labels['tier']}"] += sample.value
    return found


def _resident_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


async def _stormed(server: Server, secrets: list[Secret]) -> Storm:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        storm = Storm(http, server.process.pid, {}, {}, secrets[NAMES:], random.Random(5))
        for number, one in enumerate(secrets[:NAMES]):
            name = f"team-{number:03}"
            digest = await storm.publish(name, one, {"If-None-Match": "*"})
            assert digest is not None, storm.wrong
            storm.served[name] = digest
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(storm.ask())
            for _ in range(PUBLISHERS):
                group.create_task(storm.swap())
            group.create_task(storm.watch())
    return storm


@pytest.mark.slow
def test_a_storm_of_swaps_drops_nothing_and_mixes_nothing(
    server: Server, secrets: list[Secret], adapter_bytes: int
) -> None:
    storm = asyncio.run(_stormed(server, secrets))
    asked = sum(storm.answers.values())
    assert not storm.wrong, (len(storm.wrong), asked, storm.wrong[:5])
    assert storm.swaps >= SWAPS
    assert asked > SWAPS
    assert len(storm.answers) > ON_HOST, "traffic went to more adapters than either tier holds"
    assert len(storm.versions) > len(storm.answers), "names moved while they were asked"
    device, host = ON_DEVICE * adapter_bytes, ON_HOST * (adapter_bytes + TABLE_BYTES)
    assert max(seen["device"] for seen in storm.tiers) == device, "eight fit, and a ninth takes another's place"
    assert max(seen["host"] for seen in storm.tiers) == host
    assert min(storm.tiers[-1][f"evicted from {tier}"] for tier in ("device", "host")) > ON_HOST
    later = storm.resident_bytes[len(storm.resident_bytes) // 5 :]
    assert max(later) - later[0] < GROWTH_BYTES, storm.resident_bytes


@pytest.mark.slow
def test_after_the_storm_nothing_is_held(server: Server, adapter_bytes: int) -> None:
    """I7: no leases, all blocks free; what lies in the tiers is whole adapters."""
    server.wait_until_idle()
    adapters = server.http.get("/v1/adapters", headers={"Authorization": f"Bearer {ADMIN_KEY}"}).json()["data"]
    assert len(adapters) == NAMES
    assert {(one["state"], one["leases"]) for one in adapters} == {("ready", 0)}
    tiers = _tiers(server.http.get("/metrics").text)
    for tier, most, each in (("device", ON_DEVICE, adapter_bytes), ("host", ON_HOST, adapter_bytes + TABLE_BYTES)):
        taken = [one["bytes"][tier] for one in adapters if one["bytes"].get(tier)]
        assert set(taken) == {each}
        assert len(taken) * each == tiers[tier]
        assert len(taken) <= most
