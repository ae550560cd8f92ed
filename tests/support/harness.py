"""The real engine, runner and registry in one process, stepped by hand: what parity tests drive.

Records the logits of every drawn token, which the server itself never keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from motet.adapters.cache import LoweredCache
from motet.adapters.host import HOST_BYTES, HostTier
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.adapters.spec import NOTHING_DECLARED, Declared
from motet.adapters.tiers import Tiers
from motet.kernels.cpu.compiled import Processor
from motet.kernels.dispatch import Backend
from motet.server.engine.blocks import BlockPool
from motet.server.engine.engine import Engine
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.types import Applied, GenerationId, GivenInput, Sampling, Span, SpanResult, TokenEvent
from motet.server.model.batch import EffectsBuilder
from motet.server.model.loader import LoadedModel, prepare
from motet.server.model.runner import ModelRunner
from motet.server.serve import new_residency
from tests.support.native import native_engine

GREEDY = Sampling(max_tokens=6, temperature=0)
Part = tuple[str, tuple[float, ...] | None]
"""An adapter and its gate."""
Using = str | None | Sequence[Part]
"""An adapter, the base, or several adapters."""


@dataclass
class Generated:
    """What became of one prompt; logits are [V] float32 per drawn token."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)


class RecordingRunner(ModelRunner):
    def __init__(self, loaded: LoadedModel, effects: EffectsBuilder) -> None:
        super().__init__(loaded, effects)
        self.recorded: dict[GenerationId, list[torch.Tensor]] = {}

    def _results(self, spans: Sequence[Span], logits_nV: torch.Tensor, drawing: list[int]) -> list[SpanResult]:
        drawn = [span for span in spans if span.draw]
        for span, row in zip(drawn, drawing, strict=True):
            self.recorded.setdefault(span.generation, []).append(logits_nV[row].clone())
        return super()._results(spans, logits_nV, drawing)


class Harness:
    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        backend: Backend = "cpu",
        blocks: int = 512,
        block_size: int = 4,
        rows: int = 64,
        generations: int = 32,
        arena_bytes: int = 64 << 20,
        native: bool = True,
        processor: Processor | None = None,
        threads: int = 2,
        host_bytes: int = HOST_BYTES,
        cache: LoweredCache | None = None,
        int8: bool = False,
    ) -> None:
        engine = native_engine(processor, threads) if native and backend == "cpu" else None
        self.loaded = prepare(model, tokenizer or _NoTokenizer(), "base", engine, int8=int8)
        self.loaded.allocate_cache(blocks, block_size)
        residency, base = new_residency(self.loaded, arena_bytes), self.loaded.base
        tiers = Tiers(residency, HostTier(host_bytes), cache, base.fingerprint)
        self.registry = Registry(base, residency, cache, tiers=tiers)
        targets = list(self.loaded.base.targets.values())
        self.effects = EffectsBuilder(
            self.registry.residency,
            targets,
            backend,
            embedding=self.loaded.embedding_path,
            head=self.loaded.head_path,
            engine=engine,
        )
        self.runner = RecordingRunner(self.loaded, self.effects)
        self.pool = BlockPool(blocks, block_size)
        self.scheduler = Scheduler(self.pool, StepLimits(rows, generations), self.registry.tiers)
        self.engine = Engine(self.scheduler, self.runner, self._publish, self._end_lease)
        self._results: dict[GenerationId, Generated] = {}
        self._next = 0

    def load(self, name: str, folder: Path, declared: Declared = NOTHING_DECLARED, replace: bool = False) -> None:
        self.registry.load(name, folder, declared=declared, replace=replace)

    def run(
        self,
        requests: Sequence[tuple[Sequence[int], Using]],
        sampling: Sampling = GREEDY,
        samplings: Sequence[Sampling] | None = None,
        given: Sequence[Mapping[int, GivenInput]] | None = None,
    ) -> list[Generated]:
        """Generate for prompts and what they use, all submitted at once; results in their order."""
        generations = self.submit(requests, sampling, samplings, given)
        while not all(self.finished(generation) for generation in generations):
            self.engine.step()
        for generation in generations:
            self._results[generation].logits = self.runner.recorded.get(generation, [])
        return [self._results[generation] for generation in generations]

    def submit(
        self,
        requests: Sequence[tuple[Sequence[int], Using]],
        sampling: Sampling = GREEDY,
        samplings: Sequence[Sampling] | None = None,
        given: Sequence[Mapping[int, GivenInput]] | None = None,
    ) -> list[GenerationId]:
        """The same without a step."""
        generations = []
        for i, (prompt, adapter) in enumerate(requests):
            generation = GenerationId(self._next)
            self._next += 1
            self._results[generation] = Generated()
            applied = [Applied(self.registry.acquire(name), gate) for name, gate in _parts(adapter)]
            chosen = samplings[i] if samplings else sampling
            self.engine.submit(generation, prompt, chosen, applied, given[i] if given else None)
            generations.append(generation)
        return generations

    def logits(self, requests: Sequence[tuple[Sequence[int], Using]]) -> torch.Tensor:
        """Logits after each prompt, computed together, [requests, V]."""
        return torch.stack([made.logits[0] for made in self.run(requests, replace(GREEDY, max_tokens=1))])

    def finished(self, generation: GenerationId) -> bool:
        events = self._results[generation].events
        return bool(events) and events[-1].finish is not None

    def _publish(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            result = self._results[event.generation]
            result.events.append(event)
            if event.token is not None:
                result.tokens.append(event.token)

    def _end_lease(self, lease: Any) -> None:
        assert isinstance(lease, Lease)
        self.registry.release(lease)


def _parts(using: Using) -> Sequence[Part]:
    if using is None:
        return ()
    return ((using, None),) if isinstance(using, str) else using


class _NoTokenizer:
    eos_token_id = None
