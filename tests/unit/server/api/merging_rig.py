"""A real service of a tiny model with pools in one event loop, its merging watched; and loops over dense features."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from motet.server import serve
from motet.server.api.merging import Merging
from motet.server.api.scoring import Question, Scorer, ScoringError
from motet.server.api.service import Service
from motet.server.config import ServeConfig
from tests.support.layouts_amt import amt
from tests.support.models import load_dense, tiny_llama
from tests.support.tokenizer import byte_tokenizer

TOKENIZER: Any = byte_tokenizer()
POOLS = ("pool", "equal", "unmoved")
DEADLINE_S = 60


class Recording(Scorer):
    """Remembers what it was asked; fails when told to."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.waves: list[list[list[int]]] = []
        self.failing = False
        self.running = self.most_running = 0

    @property
    def most_tokens(self) -> int:
        return 40

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt for wave in self.waves for prompt in wave]

    async def features(self, questions: Sequence[Question]) -> torch.Tensor:
        self.waves.append([list(question.prompt) for question in questions])
        if self.failing:
            raise ScoringError("the step failed")
        self.running += len(questions)
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._scorer.features(questions)
        finally:
            self.running -= len(questions)


class Rig:
    """A service with the pools, whose merging is watched and whose clock stands."""

    def __init__(self, service: Service) -> None:
        self.service, self.now_s = service, 1000.0
        self.scorer = Recording(service.merging.scorer)
        self.merging: Merging = service.merging
        self.merging.scorer, self.merging.clock = self.scorer, lambda: self.now_s

    async def nothing_is_held(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while any(info.leases for info in self.service.registry.published()):
                await asyncio.sleep(0.002)


def write_pools(root: Path) -> None:
    """The base, a pool of different members, one of equal members, one of members that never left their start."""
    tiny_llama(vocab_size=len(TOKENIZER), num_hidden_layers=2).save_pretrained(root / "base")
    TOKENIZER.save_pretrained(root / "base")
    for name, source in zip(POOLS, (None, "0", "initial"), strict=True):
        file = amt()(load_dense(root / "base", torch.float32), root / name, 5).folder / "adapter_model.safetensors"
        tensors = load_file(file)
        for key in tensors:
            if source is not None and ".initial." not in key:
                place = key.split(".")[-2]
                tensors[key] = tensors[key.replace(f".{place}.weight", f".{source}.weight")].clone()
        save_file(tensors, file)


async def playing(root: Path, scenario: Callable[[Rig], Awaitable[None]]) -> None:
    """A scenario of what `write_pools` wrote; at the end nothing may be leased."""
    config = ServeConfig(str(root / "base"), "base", "float32", "cpu", kv_memory="8MiB", adapter_cache="off")
    assembled = serve.assemble(config, lambda _: None)
    async with asyncio.timeout(DEADLINE_S), serve.opened(config, assembled, golden=False) as service:
        for name in POOLS:
            service.registry.load(name, root / name)
        rig = Rig(service)
        await scenario(rig)
        await rig.nothing_is_held()


@torch.no_grad()
def features(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    return [model.model(input_ids=torch.tensor([list(p)])).last_hidden_state[0, -1].tolist() for p in prompts]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))
