"""What uncertainty costs: a Gaussian head in the place of a softmax head, and what the logits say beside nothing.

The service as `motet serve` puts it together, asked in its own process without sockets, one request at a time; the ways
that are compared take turns. A request takes far longer than what is measured, and on a machine that does other things
its time varies by more than that. So the part itself is timed too, inside the requests: from the question to a head
until its answer, and the calls that report, collect and write what the logits say. Prompts never repeat, so that no
prefix is shared. Run it from the repository root:

    python -m tests.bench.uncertainty --out docs/results/uncertainty-cost-cpu.jsonl

Head files of random weights: what they say means nothing, what they cost does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from motet.adapters import heads
from motet.server.api import uncertainty
from motet.server.api.app import create_app
from motet.server.api.heads import Asking, Heads
from motet.server.config import ServeConfig
from motet.server.model import runner
from motet.server.serve import assemble, opened
from tests.bench.lines import append, surroundings
from tests.support.heads import random_head

EXAMPLE = Path("examples/adapters/wikisql")
WIDTH = 576
"""Of SmolLM2-135M."""
KINDS = ("diagonal", "lowrank", "dense")
CLASSES = (2, 4, 8)
NUMBERS = 20
"""Of a prompt; each takes four or five tokens."""
TOKENS = 32


@dataclass(frozen=True)
class Cost:
    """One comparison.

    Attributes:
        what: which requests.
        plain_ms, asked_ms: medians of a request, or of one of its tokens.
        ratio, ratio_quartiles: of asked over plain, turn by turn: their median, and where half of them lie.
        plain_part_ms, asked_part_ms: medians of the part itself, within those.
        share: what the part adds, of plain_ms.
    """

    what: str
    rounds: int
    plain_ms: float
    asked_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    plain_part_ms: float
    asked_part_ms: float
    share: float


class Clock:
    """Adds up the time of the part, over one request."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.spent_s += time.perf_counter() - start_s

        return wrapped

    def answered(self, ask: Callable[[Heads, Asking], asyncio.Future[Any]]) -> Callable[..., asyncio.Future[Any]]:
        """Until the event loop hears of the answer."""

        @functools.wraps(ask)
        def wrapped(own: Heads, asking: Asking) -> asyncio.Future[Any]:
            start_s = time.perf_counter()
            answer = ask(own, asking)

            def stop(_: asyncio.Future[Any]) -> None:
                self.spent_s += time.perf_counter() - start_s

            answer.add_done_callback(stop)
            return answer

        return wrapped

    def listen(self) -> None:
        """To every place where a request pays for its uncertainty."""
        Heads.ask = self.answered(Heads.ask)  # type: ignore[method-assign]
        for module, name in ((runner, "reports"), (uncertainty, "add"), (uncertainty, "of_generation")):
            setattr(module, name, self.timed(getattr(module, name)))


Measured = Callable[[], Awaitable[tuple[float, float]]]
"""Seconds of a request, or of one of its tokens, and of the part."""


async def compare(what: str, rounds: int, plain: Measured, asked: Measured) -> Cost:
    """Each goes first in every other round."""
    for one in (plain, asked, plain, asked):
        await one()
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            first = await plain()
            pairs.append((first, await asked()))
        else:
            first = await asked()
            pairs.append((await plain(), first))
    ratios = sorted(after / before for (before, _), (after, _) in pairs)
    plain_s, asked_s = (median(pair[way][0] for pair in pairs) for way in (0, 1))
    plain_part_s, asked_part_s = (median(pair[way][1] for pair in pairs) for way in (0, 1))
    return Cost(
        what,
        rounds,
        1000 * plain_s,
        1000 * asked_s,
        median(ratios),
        (ratios[rounds // 4], ratios[-1 - rounds // 4]),
        1000 * plain_part_s,
        1000 * asked_part_s,
        (asked_part_s - plain_part_s) / plain_s,
    )


class Requests:
    """Their prompts differ from the first number on."""

    def __init__(self, client: httpx.AsyncClient, clock: Clock) -> None:
        self._client, self._clock, self._numbers = client, clock, count()

    async def _seconds(self, path: str, body: dict[str, Any], parts: int = 1) -> tuple[float, float]:
        self._clock.spent_s = 0.0
        start_s = time.perf_counter()
        answer = await self._client.post(path, json=body)
        taken_s = time.perf_counter() - start_s
        assert answer.status_code == 200, answer.text
        assert "error" not in answer.text
        return taken_s / parts, self._clock.spent_s / parts

    def _prompt(self, numbers: int) -> str:
        turn = next(self._numbers)
        return " ".join(str((turn * 7919 + place) % 9973) for place in range(numbers))

    async def classify(self, model: str) -> tuple[float, float]:
        body = {"model": model, "input": self._prompt(NUMBERS), "uncertainty": True}
        return await self._seconds("/v1/classify", body)

    async def generate(self, model: str, asked: dict[str, Any] | None) -> tuple[float, float]:
        """Of one token; the prompt is short."""
        body = {"model": model, "prompt": self._prompt(1), "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        return await self._seconds("/v1/completions", {**body, "stream": True, "uncertainty": asked}, TOKENS)


async def comparisons(requests: Requests, rounds: int) -> AsyncIterator[Cost]:
    for kind in KINDS:
        for classes in CLASSES:
            plain, asked = (functools.partial(requests.classify, f"{one}-{classes}") for one in ("softmax", kind))
            yield await compare(
                f"classify, {classes} labels: {kind} head, plain is a softmax head", rounds, plain, asked
            )
    both = ["sequence", "token"]
    for what, body in (
        ("sequence, by the logits", {"method": "logprob"}),
        ("sequence and tokens, by the logits", {"method": "logprob", "level": both}),
        ("sequence, by a dense head of 4 labels", {"method": "vbll"}),
    ):
        plain = functools.partial(requests.generate, "dense-4", None)
        asked = functools.partial(requests.generate, "dense-4", body)
        yield await compare(f"per token, streamed: {what}, plain asks nothing", rounds // 3, plain, asked)


def written(root: Path) -> Iterator[str]:
    """The example under every head, as options of the server."""
    for kind in ("softmax", *KINDS):
        for classes in CLASSES:
            folder = root / f"{kind}-{classes}"
            shutil.copytree(EXAMPLE, folder)
            heads.write(random_head(kind, [f"label {number}" for number in range(classes)], WIDTH, classes), folder)
            yield f"{folder.name}={folder}"


async def measured(rounds: int) -> list[Cost]:
    clock, found = Clock(), []
    with tempfile.TemporaryDirectory() as root:
        config = ServeConfig(adapter=tuple(written(Path(root))), adapter_cache="off")
        assembled = assemble(config, print)
        async with opened(config, assembled) as service:
            for name, folder, declared in assembled.adapters:
                await asyncio.to_thread(service.registry.load, name, folder, declared)
            service.ready = True
            clock.listen()
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://motet") as client:
                async for cost in comparisons(Requests(client, clock), rounds):
                    print(
                        f"{cost.what}: {cost.plain_ms:.2f} ms, × {cost.ratio:.3f}; {100 * cost.share:.2f} %", flush=True
                    )
                    found.append(cost)
    return found


def go_first() -> None:
    """Let this session go before others', where we may."""
    with contextlib.suppress(OSError):
        os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("-15")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="results file to append to")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    go_first()
    head = surroundings("torch", "transformers")
    found = asyncio.run(measured(options.rounds))
    append(options.out, *({**head, **asdict(cost)} for cost in found))


if __name__ == "__main__":
    main()
