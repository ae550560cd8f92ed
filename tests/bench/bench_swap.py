"""What running streams notice of adapters that come and go: inter-token latency while others load, beside quiet.

Starts a real server, keeps some streams running, and takes turns between conditions while they run:

    quiet      nothing else
    warm       one request after another, each of one token, for adapters that are on the device
    cold       the same for adapters in turn, of which the device holds so few that every one has to be brought
    publish    one adapter after another that was never seen is published under one name

Appends one JSON line per run. Knows nothing of how adapters are brought. Run it from the repository root:

    python -m tests.bench.bench_swap --out docs/results/swap-cpu.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.bench.client import Endpoint, stream_completion
from tests.bench.cpu_usage import CpuMeter
from tests.bench.lines import append, surroundings
from tests.bench.make_adapters import make_adapters
from tests.bench.stats import distribution
from tests.bench.workload import PlannedRequest
from tests.e2e.process import ADMIN_KEY, Server

CONDITIONS = ("quiet", "warm", "cold", "publish")
SETTLE_S = 0.3
"""Left out at the beginning of each turn: what the last one began is over by then."""
TIMEOUT_S = 600


@dataclass
class Turns:
    """When each condition held, and what was done meanwhile."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def gaps_of(self, condition: str, times_s: list[float]) -> list[float]:
        """Gaps between tokens that lie within turns of a condition."""
        gaps = list(itertools.pairwise(times_s))
        spans = [(start, stop) for name, start, stop in self.spans if name == condition]
        return [late - early for early, late in gaps if any(start <= early and late <= stop for start, stop in spans)]


class Work:
    """What is done beside the streams, one thing after another."""

    def __init__(self, http: httpx.AsyncClient, warm: list[str], cold: list[str], fresh: list[Path]) -> None:
        self._http, self._warm, self._cold, self._fresh = http, warm, cold, fresh
        self._next = 0

    async def quiet(self) -> None:
        await asyncio.sleep(0.05)

    async def warm(self) -> None:
        await self._ask(self._warm)

    async def cold(self) -> None:
        await self._ask(self._cold)

    async def publish(self) -> None:
        body = {"lora_name": "fresh", "lora_path": str(self._fresh.pop()), "load_inplace": True}
        answer = await self._http.post(
            "/v1/load_lora_adapter", json=body, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
        )
        assert answer.status_code == 200, answer.text

    async def _ask(self, names: list[str]) -> None:
        self._next += 1
        name = names[self._next % len(names)]
        body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0}
        answer = await self._http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text


async def take_turns(
    work: Work, conditions: list[str], rounds: int, turn_s: float, streaming: Callable[[], bool]
) -> Turns:
    turns = Turns()
    for _ in range(rounds):
        for condition in conditions:
            do: Callable[[], Coroutine[Any, Any, None]] = getattr(work, condition)
            began_s, done = time.perf_counter(), 0
            while (at_s := time.perf_counter()) < began_s + turn_s:
                await do()
                turns.seconds.setdefault(condition, []).append(time.perf_counter() - at_s)
                done += 1
            assert streaming(), "the streams ended before the last turn; give them more tokens or take fewer turns"
            turns.spans.append((condition, began_s + SETTLE_S, at_s))
            turns.done[condition] = turns.done.get(condition, 0) + done
    return turns


def planned(model: str, number: int, tokens: int) -> PlannedRequest:
    body = {
        "model": model,
        "prompt": [11 + number, 12, 13, 14],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    return PlannedRequest(model=model, body=json.dumps(body).encode(), output_tokens=tokens)


async def measure(server: Server, options: argparse.Namespace, work: Work, hot: list[str]) -> dict[str, Any]:
    endpoint = Endpoint.from_url(server.url)
    meter = CpuMeter(server.process.pid)
    streams = [
        asyncio.create_task(
            stream_completion(endpoint, planned(name, i, options.tokens), 0.0, TIMEOUT_S, allow_merged_chunks=True)
        )
        for i, name in enumerate(hot)
    ]
    await asyncio.sleep(3)
    turns = await take_turns(
        work, options.conditions, options.rounds, options.turn_s, lambda: not any(one.done() for one in streams)
    )
    cpu = meter.stop()
    await asyncio.to_thread(server.stop)
    times = [timeline.chunk_times_s for timeline in await asyncio.gather(*streams)]
    gaps = {one: [gap for stream in times for gap in turns.gaps_of(one, stream)] for one in options.conditions}
    itl = {one: distribution(values) for one, values in gaps.items()}
    quiet = itl["quiet"]
    assert quiet is not None
    return {
        "itl_s": {one: None if found is None else asdict(found) for one, found in itl.items()},
        "tokens": {one: len(values) for one, values in gaps.items()},
        "p99_ratio": {one: None if found is None else found.p99 / quiet.p99 for one, found in itl.items()},
        "p50_ratio": {one: None if found is None else found.p50 / quiet.p50 for one, found in itl.items()},
        "done": turns.done,
        "work_s": {one: sum(values) / len(values) for one, values in turns.seconds.items()},
        "cpu": asdict(cpu),
    }


def resident_bytes(server: Server, name: str) -> int:
    return int(server.models[name]["motet"]["resident_bytes"])


async def run(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    model = options.model
    published = options.hot + options.warm + options.cold
    folders = make_adapters(model, root / "adapters", published, ranks=(options.rank,))
    fresh = make_adapters(model, root / "adapters", options.fresh, ranks=(options.rank,), seed=1, prefix="fresh-")
    names = [folder.name for folder in folders]
    one = folders[0].joinpath("adapter_model.safetensors").stat().st_size
    room = (options.hot + options.warm + options.spare + 0.5) * one * 1.01
    arguments = ["--model", model, "--adapter-root", str(root), "--kv-memory", "1GiB"]
    arguments += ["--adapter-memory", str(int(room)), "--host-memory", options.host_memory]
    arguments += [part for folder in folders for part in ("--adapter", f"{folder.name}={folder}")]
    server = Server(arguments, root / "log", MOTET_ADMIN_KEY=ADMIN_KEY).wait_until_ready()
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
            hot, rest = names[: options.hot], names[options.hot :]
            work = Work(http, rest[: options.warm], rest[options.warm :], fresh)
            for _ in range(options.warm):
                await work.warm()
            return await measure(server, options, work, hot)
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(Path("~/.cache/motet/models/smollm2-135m-instruct-0.1.2").expanduser()))
    parser.add_argument("--hot", type=int, default=4, help="streams, each of an adapter of its own")
    parser.add_argument("--warm", type=int, default=2, help="adapters that stay on the device beside them")
    parser.add_argument("--cold", type=int, default=12, help="adapters that take turns on what is left")
    parser.add_argument("--spare", type=int, default=1, help="adapters for which there is room beside hot and warm")
    parser.add_argument("--fresh", type=int, default=60, help="adapters to publish; more than there is time for")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--host-memory", default="auto")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turn-s", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--conditions", type=lambda text: text.split(","), default=list(CONDITIONS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arguments = {name: value for name, value in vars(options).items() if name not in ("out", "model")}
    head = surroundings()
    with tempfile.TemporaryDirectory() as root:
        results = asyncio.run(run(options, Path(root)))
    line = {
        **head,
        "arguments": arguments,
        "results": results,
    }
    print(json.dumps(line))
    if options.out is not None:
        append(options.out, line)


if __name__ == "__main__":
    main()
