"""What fair shares give and cost: another adapter's request beside a flood, and the time that orders and series take.

Starts the real server with one policy after the other, in turns. Many requests at once ask one adapter, so that most of
them wait, and one client asks another adapter, one request after another. Beside that: a step's share of the scheduler
with many that wait, and what a token's observations take. Appends one JSON line per run. Run it from the repository
root:

    python -m tests.bench.bench_fairness --out docs/results/fairness-cpu.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from motet.server.adapter_metrics import AdapterMetrics
from motet.server.engine.blocks import BlockPool
from motet.server.engine.policy import Fair, Fcfs, Policy
from motet.server.engine.scheduler import Scheduler, StepLimits
from tests.bench.lines import append, surroundings
from tests.bench.make_adapters import make_adapters
from tests.bench.stats import distribution
from tests.e2e.process import Server
from tests.support.fake_memory import FakeMemory
from tests.unit.server.engine.steps import commit, generation

POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Fcfs, "fair": Fair}
FLOOD, TOKENS, RUNNING = 32, 16, 4
"""Requests at once of the flood, tokens of each answer, and how many the server runs at once."""
WAITING, ADAPTERS, STEPS = 1000, 100, 300
"""Of the scheduler alone."""


async def ask(http: httpx.AsyncClient, model: str, number: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens."""
    body = {"model": model, "prompt": f"Request {number}:", "max_tokens": TOKENS, "temperature": 0, "stream": True}
    began_s, first_s, tokens = time.perf_counter(), 0.0, 0
    async with http.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first_s, tokens = first_s or time.perf_counter() - began_s, tokens + 1
    return first_s, tokens


async def flooded(url: str, seconds: float) -> dict[str, Any]:
    """Both kinds of clients against a server for so long."""
    until_s = time.perf_counter() + seconds

    async def client(model: str, first: int) -> list[tuple[float, int]]:
        found, number = [], first
        while time.perf_counter() < until_s:
            found.append(await ask(http, model, number))
            number += 1
        return found

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
        began_s = time.perf_counter()
        clients = [asyncio.create_task(client("adapter-000", 1000 * place)) for place in range(FLOOD)]
        await asyncio.sleep(2)  # until its queue stands
        other = await client("adapter-001", 0)
        flood = [one for found in await asyncio.gather(*clients) for one in found]
        took_s = time.perf_counter() - began_s
    return {
        "tokens_per_s": sum(tokens for _, tokens in flood + other) / took_s,
        "flood_ttft_s": asdict(distribution([ttft_s for ttft_s, _ in flood])),
        "other_ttft_s": asdict(distribution([ttft_s for ttft_s, _ in other])),
    }


def served(policy: str, adapters: list[Path], seconds: float, scratch: Path) -> dict[str, Any]:
    options = ["--policy", policy, "--max-generations", str(RUNNING)]
    options += [part for folder in adapters for part in ("--adapter", f"{folder.name}={folder}")]
    server = Server(options, scratch / f"log-{policy}")
    try:
        server.wait_until_ready()
        return asyncio.run(flooded(server.url, seconds))
    finally:
        server.stop()


def scheduling(policy: str) -> float:
    """Microseconds of plan and commit of one step; what ends is replaced by another that waits."""
    scheduler = Scheduler(BlockPool(4096, 16), StepLimits(512, 64), FakeMemory(), POLICIES[policy]())
    for id in range(WAITING):
        scheduler.add(generation(id, [id] * 16, max_tokens=64, adapter=f"a{id % ADAPTERS}"))
    next_id, spent_s = WAITING, 0.0
    for _ in range(STEPS):
        began_s = time.perf_counter()
        plan = scheduler.plan()
        _, ended = commit(scheduler, plan)
        spent_s += time.perf_counter() - began_s
        for _ in ended:
            scheduler.add(generation(next_id, [next_id] * 16, max_tokens=64, adapter=f"a{next_id % ADAPTERS}"))
            next_id += 1
    return spent_s / STEPS * 1e6


def observing(tokens: int = 200_000) -> float:
    """Microseconds of what one token adds to an adapter's series."""
    series = AdapterMetrics(lambda: {"a"}).of("a")
    began_s = time.perf_counter()
    for number in range(tokens):
        series.between_tokens.observe(number % 100 / 1000)
    return (time.perf_counter() - began_s) / tokens * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the default model, for its shapes")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    head = surroundings()
    results: dict[str, Any] = {policy: [] for policy in POLICIES}
    with tempfile.TemporaryDirectory() as scratch:
        adapters = make_adapters(options.model, Path(scratch), 2, ranks=(8,))
        for _ in range(options.repeats):
            for policy, runs in results.items():
                runs.append(served(policy, adapters, options.seconds, Path(scratch)))
                print(policy, json.dumps(runs[-1]))
    turns = [{policy: scheduling(policy) for policy in POLICIES} for _ in range(9)]
    results["scheduling_us"] = {policy: median(turn[policy] for turn in turns) for policy in POLICIES}
    results["observing_us"] = median(observing() for _ in range(5))
    arguments = {"flood": FLOOD, "tokens": TOKENS, "running": RUNNING, "waiting": WAITING, "adapters": ADAPTERS}
    line = {
        **head,
        "arguments": {**arguments, "seconds": options.seconds},
        "results": results,
    }
    print(results["scheduling_us"], results["observing_us"])
    append(options.out, line)


if __name__ == "__main__":
    main()
