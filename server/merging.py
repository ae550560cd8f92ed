"""Merges of a pool at test time: a labelled support set becomes the pool's gate, remembered under a name of its own.

Every member sees every example once, all in one batch of the engine. Nothing is materialised: a merge is as many
numbers as the pool has members, and the class means that classify by it.

Must not know: HTTP, kernels. For the event loop that the scorer belongs to.

Shapes: P members, S examples, C labels, D width of the features.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from motet.adapters.errors import AdapterNotFoundError, GateError
from motet.adapters.gates import merge
from motet.adapters.gates.pool import PoolGate
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.adapters.version import AdapterVersion
from motet.server.api.scoring import Question, Scorer
from motet.server.engine.types import Applied

MARK = "@merge-"
"""Between a pool's name and the digest in the name of a merge."""
MOST_EXAMPLES, MOST_LABELS, MOST_MERGES = 512, 128, 1024
DROPPED = 0.1
"""Share of its tokens that the augmented view of an example loses."""

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a merge is made of; equal asks of one pool version give one merge.

    Attributes:
        support: (text, label).
        weights: α given by the caller, or "uniform"; None scores the members on the support.
        seed: of the augmented view; None scores on the examples as they are.
    """

    support: tuple[tuple[str, str], ...]
    top_k: int = merge.DEFAULT_TOP_K
    beta: float = merge.DEFAULT_BETA
    gamma: float = merge.DEFAULT_GAMMA
    seed: int | None = None
    weights: tuple[float, ...] | str | None = None

    def check(self) -> None:
        """Require what does not depend on the pool.

        Raises:
            GateError: the support is empty, too large, or has too few or too many labels.
        """
        if not 1 <= len(self.support) <= MOST_EXAMPLES:
            raise GateError("support", f"support has {len(self.support)} examples; 1 to {MOST_EXAMPLES} are possible")
        if not 2 <= len(self.labels) <= MOST_LABELS:
            raise GateError("support", f"support has {len(self.labels)} labels; 2 to {MOST_LABELS} are possible")

    @property
    def labels(self) -> list[str]:
        """Distinct, in the order of their first example."""
        return list(dict.fromkeys(label for _, label in self.support))


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """A merge that can be asked.

    Attributes:
        name: what requests call it.
        alpha: a factor for each member.
        scores: what α was found by; None where it was given.
        prototypes_CD: class means of the support under the merge.
    """

    name: str
    pool: AdapterVersion
    alpha: tuple[float, ...]
    scores: merge.Merge | None
    labels: tuple[str, ...]
    prototypes_CD: torch.Tensor
    scale: float
    bias: float
    created_s: float
    expires_s: float


@dataclass(slots=True, eq=False)
class Merging:
    """The merges that are remembered.

    Note: used by one event loop. A merge holds no lease: once its pool is replaced or unloaded it is gone.
    """

    registry: Registry
    scorer: Scorer
    encode: Encode
    clock: Callable[[], float] = time.time
    _merges: OrderedDict[str, Merged] = field(default_factory=OrderedDict)
    _running: dict[str, asyncio.Task[Merged]] = field(default_factory=dict)

    async def make(self, pool: str, ask: Ask, lifetime_s: float) -> Merged:
        """The merge of an ask; made once however often it is asked for, and kept for `lifetime_s` from now on.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            GateError: it is no pool, or the ask is impossible.
            ScoringError: an example does not fit the base model, or its step failed.
        """
        ask.check()
        lease = self.registry.acquire(pool)
        try:
            if not isinstance(gate := lease.resident.gate, PoolGate):
                raise GateError("model", f"adapter {pool!r} is no pool; there is nothing to merge")
            name = f"{pool}{MARK}{_digest(lease.version, ask)}"
            if (known := self._found(name)) is None:
                if name not in self._running:
                    self._running[name] = asyncio.create_task(self._made(name, lease, gate, ask))
                try:
                    known = await asyncio.shield(self._running[name])
                finally:
                    if self._running.get(name) is not None and self._running[name].done():
                        del self._running[name]
            kept = replace(known, expires_s=max(known.expires_s, self.clock() + lifetime_s))
            self._merges[name] = kept
            self._merges.move_to_end(name)
            while len(self._merges) > MOST_MERGES:
                self._merges.popitem(last=False)
            return kept
        finally:
            self.registry.release(lease)

    def get(self, name: str) -> Merged:
        """A merge that has not expired.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        found = self._found(name)
        if found is None:
            raise AdapterNotFoundError(f"merge {name!r} is not known; it has expired, or its pool changed: merge again")
        return found

    def of(self, pool: str) -> list[Merged]:
        """Those of a pool, oldest first."""
        found = (self._found(name) for name in list(self._merges) if self._merges[name].pool.name == pool)
        return [one for one in found if one is not None]

    def delete(self, name: str) -> None:
        """Forget a merge.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        self.get(name)
        del self._merges[name]

    async def classify(self, merged: Merged, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """[N, C] float32 probabilities of the support's labels.

        Raises:
            AdapterNotFoundError: the pool is not served any more.
            ScoringError: a prompt does not fit the base model, or its step failed.
        """
        lease = self.registry.acquire(merged.pool.name)
        try:
            questions = [self._question(lease, prompt, merged.alpha) for prompt in prompts]
            features_ND = await self.scorer.features(questions)
        finally:
            self.registry.release(lease)
        return merge.classify(features_ND, merged.prototypes_CD, merged.scale, merged.bias)

    def _found(self, name: str) -> Merged | None:
        found = self._merges.get(name)
        if found is None:
            return None
        versions = {info.version.name: info.version for info in self.registry.published()}
        if found.expires_s < self.clock() or versions.get(found.pool.name) != found.pool:
            del self._merges[name]
            return None
        return found

    async def _made(self, name: str, lease: Lease, gate: PoolGate, ask: Ask) -> Merged:
        held = self.registry.renew(lease)  # the caller may go away before the work is done
        try:
            prompts = [list(self.encode(text)) for text, _ in ask.support]
            for place, prompt in enumerate(prompts):
                if not prompt:
                    raise GateError(f"support.{place}.text", f"example {place} has no token; leave it out")
            numbers = {label: number for number, label in enumerate(ask.labels)}
            labels_S = torch.tensor([numbers[label] for _, label in ask.support])
            scores, alpha = None, None
            if ask.weights is None:
                scores = await self._scored(held, gate, ask, prompts, labels_S)
                alpha = tuple(scores.alpha_P.tolist())
            elif ask.weights == "uniform":
                alpha = tuple(merge.uniform(gate.members).tolist())
            else:
                assert not isinstance(ask.weights, str), ask.weights
                alpha = gate.factors(ask.weights)
            features_SD = await self.scorer.features([self._question(held, prompt, alpha) for prompt in prompts])
        finally:
            self.registry.release(held)
        prototypes_CD = merge.prototypes(features_SD, labels_S, len(numbers))
        now_s = self.clock()
        return Merged(
            name, held.version, alpha, scores, tuple(numbers), prototypes_CD, gate.scale, gate.bias, now_s, now_s
        )

    async def _scored(
        self, lease: Lease, gate: PoolGate, ask: Ask, prompts: Sequence[list[int]], labels_S: torch.Tensor
    ) -> merge.Merge:
        """Every member on the whole support, and on its augmented view where there is one."""
        views = [prompts] if ask.seed is None else [prompts, _augmented(prompts, ask.seed)]
        questions = [
            self._question(lease, prompt, gate.member(member))
            for member in range(gate.members)
            for view in views
            for prompt in view
        ]
        features = (await self.scorer.features(questions)).view(gate.members, len(views), len(prompts), -1)
        cosines = []
        for member_VSD in features:
            prototypes_CD = merge.prototypes(member_VSD[0], labels_S, len(ask.labels))
            cosines.append(merge.similarities(member_VSD[-1], prototypes_CD))
        return merge.merged(cosines, labels_S, gamma=ask.gamma, beta=ask.beta, top_k=ask.top_k)

    def _question(self, lease: Lease, prompt: Sequence[int], gate: tuple[float, ...]) -> Question:
        return Question(prompt, lambda: (Applied(self.registry.renew(lease), gate),))


def _augmented(prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
    """Each prompt without a tenth of its tokens, at least one kept; a function of the seed and the prompt alone."""
    views = []
    for prompt in prompts:
        chance = random.Random(f"{seed} {prompt}")
        views.append([token for token in prompt if chance.random() >= DROPPED] or prompt[:1])
    return views


def _digest(version: AdapterVersion, ask: Ask) -> str:
    content = json.dumps([version.digest, asdict(ask)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:24]
