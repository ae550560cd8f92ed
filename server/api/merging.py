"""Merges of a pool at test time: a labelled support set becomes the pool's gate, remembered under a name of its own.

Every member sees every example once. Nothing is materialised unless the weights are to be trimmed: a merge is as many
numbers as the pool has members, and the class means that classify by it.

Must not know: HTTP, kernels. For the event loop that the scorer belongs to.

Shapes: P members, S examples, C labels, D width of the features.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from motet.adapters.errors import AdapterNotFoundError, GateError
from motet.adapters.gates import merge
from motet.adapters.gates.pool import PoolGate
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.server.api import uses
from motet.server.api.inputs import Inputs, Prompt
from motet.server.api.keys import ANYONE, Caller
from motet.server.api.merged import Ask, Merged
from motet.server.api.scoring import Question, Scorer
from motet.server.api.trims import Trims
from motet.server.api.turns import Turns
from motet.server.engine.types import Applied

MARK = "@merge-"
"""Between a pool's name and the digest in the name of a merge."""
MOST_MERGES = 256
"""Remembered ones; the class means of 128 labels at a width of 4096 are 2 MiB."""
IN_FLIGHT = 128
"""Prompts that one merge has in the engine at a time: twice what runs at once, so that steps are full and the queue is
not filled for others."""


@dataclass(slots=True, eq=False)
class Merging:
    """The merges that are remembered.

    Note: used by one event loop. A merge holds no lease: once its pool is replaced or unloaded it is gone.
    """

    registry: Registry
    scorer: Scorer
    inputs: Inputs
    clock: Callable[[], float] = time.time
    in_flight: int = IN_FLIGHT
    turns: Turns = field(default_factory=Turns)
    _merges: OrderedDict[str, Merged] = field(default_factory=OrderedDict)
    _running: dict[str, asyncio.Task[Merged]] = field(default_factory=dict)
    _trims: Trims = field(init=False)

    def __post_init__(self) -> None:
        self._trims = Trims(self.registry)

    async def make(self, pool: str, ask: Ask, lifetime_s: float, caller: Caller = ANYONE) -> Merged:
        """The merge of an ask; made once however often it is asked for, and kept for `lifetime_s` from now on.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            GateError: it is no pool, or the ask is impossible.
            InputError: an example cannot be read.
            ArenaFullError: there is no room for trimmed weights.
            ScoringError: an example does not fit the base model, or its step failed.
            TurnError: too many merges of the caller are made or wait.
        """
        ask.check()
        lease = uses.leased(self.registry, pool, caller)
        try:
            if not isinstance(gate := lease.resident.gate, PoolGate):
                raise GateError("model", f"adapter {pool!r} is no pool; there is nothing to merge")
            if ask.weights is None and not ask.top_k <= gate.members:
                raise GateError("top_k", f"top_k is {ask.top_k}; it must be between 1 and the {gate.members} members")
            if ask.trim is not None:
                self._trims.require_possible(gate, ask.trim)
            name = f"{lease.version.name}{MARK}{ask.digest(lease.version)}"
            if (known := self.find(name)) is None:
                known = await asyncio.shield(self._task(name, lease, gate, ask, caller))
        finally:
            self.registry.release(lease)
        latest_s = self._merges.get(name, known).expires_s  # others may have asked for longer meanwhile
        kept = replace(known, expires_s=max(latest_s, self.clock() + lifetime_s))
        self._merges[name] = kept
        self._merges.move_to_end(name)
        while len(self._merges) > MOST_MERGES:
            self._merges.popitem(last=False)
        return kept

    def find(self, name: str) -> Merged | None:
        """A merge that has not expired and whose pool is still served; None where there is none of that name."""
        found = self._merges.get(name)
        if found is None:
            return None
        try:
            served = self.registry.get(found.pool.name).version == found.pool
        except AdapterNotFoundError:
            served = False
        if not served or found.expires_s <= self.clock():
            del self._merges[name]
            return None
        return found

    def get(self, name: str) -> Merged:
        """A merge that has not expired.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        found = self.find(name)
        if found is None:
            raise _gone(name)
        return found

    def of(self, pool: str) -> list[Merged]:
        """Those of a pool, oldest first.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        self.registry.get(pool)
        found = [self.find(name) for name, one in list(self._merges.items()) if one.pool.name == pool]
        return sorted((one for one in found if one is not None), key=lambda one: one.created_s)

    async def delete(self, name: str) -> None:
        """Forget a merge, and the weights that were trimmed for it.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        merged = self.get(name)
        del self._merges[name]
        if merged.trimmed is not None:
            await self._trims.drop(merged.pool, merged.alpha, merged.trimmed.share)

    async def applied(self, merged: Merged) -> Applied:
        """The merge on a lease of its own: of the pool's version that was merged, or of its trimmed weights.

        Raises:
            AdapterNotFoundError: the pool's name means another version by now, or none.
            ArenaFullError: the trimmed weights gave way to others, and there is no room for them now.
        """
        lease = self.registry.acquire(merged.pool.name)
        try:
            if lease.version != merged.pool:
                raise _gone(merged.name)
            return await self._applied(lease, merged.alpha, None if merged.trimmed is None else merged.trimmed.share)
        finally:
            self.registry.release(lease)

    async def classify(self, merged: Merged, given: Mapping[str, str]) -> tuple[torch.Tensor, int]:
        """[N, C] float32 probabilities of the support's labels, and the number of tokens read.

        Args:
            given: field of the request → text or image.

        Raises:
            AdapterNotFoundError: the pool is not served any more.
            GateError: a text has no token, or more than the base model takes.
            InputError: an input cannot be read.
            ScoringError: a step failed.
        """
        prompts = await self._prompts(given)
        features_ND = await self._under(await self.applied(merged), prompts)
        probabilities_NC = merge.classify(features_ND, merged.prototypes_CD, merged.scale, merged.bias)
        return probabilities_NC, sum(len(prompt.tokens) for prompt in prompts)

    def _task(self, name: str, lease: Lease, gate: PoolGate, ask: Ask, caller: Caller) -> asyncio.Task[Merged]:
        """The one that makes the merge; it goes on when whoever asked goes away, and so has a lease of its own."""
        if name not in self._running:
            self.turns.require_place(caller.label)
            made = self._in_turn(name, self.registry.renew(lease), gate, ask, caller)
            self._running[name] = asyncio.create_task(made)
            self._running[name].add_done_callback(functools.partial(self._ended, name))
        return self._running[name]

    def _ended(self, name: str, task: asyncio.Task[Merged]) -> None:
        del self._running[name]
        if not task.cancelled():
            task.exception()  # asyncio complains of one that nobody looked at, as when whoever asked went away

    async def _in_turn(self, name: str, lease: Lease, gate: PoolGate, ask: Ask, caller: Caller) -> Merged:
        """Ends the lease."""
        try:
            async with self.turns.turn(caller.label):
                return await self._made(name, lease, gate, ask)
        finally:
            self.registry.release(lease)

    async def _made(self, name: str, lease: Lease, gate: PoolGate, ask: Ask) -> Merged:
        word = self.inputs.modality
        prompts = await self._prompts({f"support.{at}.{word}": given for at, (given, _) in enumerate(ask.support)})
        numbers = {label: number for number, label in enumerate(ask.labels)}
        labels_S = torch.tensor([numbers[label] for _, label in ask.support])
        scores, alpha = None, None
        if ask.weights is None:
            scores = await self._scored(lease, gate, ask, prompts, labels_S)
            alpha = tuple(scores.alpha_P.tolist())
        elif ask.weights == "uniform":
            alpha = tuple(merge.uniform(gate.members).tolist())
        else:
            assert not isinstance(ask.weights, str), ask.weights
            alpha = gate.factors(ask.weights)
        applied = await self._applied(lease, alpha, ask.trim)
        trimmed = uses.held(applied).resident.trimmed
        features_SD = await self._under(applied, prompts)
        prototypes_CD = merge.prototypes(features_SD, labels_S, len(numbers))
        now_s = self.clock()
        return Merged(
            name=name,
            pool=lease.version,
            alpha=alpha,
            scores=scores,
            labels=tuple(numbers),
            prototypes_CD=prototypes_CD,
            scale=gate.scale,
            bias=gate.bias,
            created_s=now_s,
            expires_s=now_s,
            trimmed=trimmed,
        )

    async def _scored(
        self, lease: Lease, gate: PoolGate, ask: Ask, prompts: Sequence[Prompt], labels_S: torch.Tensor
    ) -> merge.Merge:
        """Every member on the whole support, and on its augmented view where there is one."""
        views = [prompts] if ask.seed is None else [prompts, await self.inputs.augmented(prompts, ask.seed)]
        questions = [
            self._question(Applied(lease, gate.member(member)), prompt)
            for member in range(gate.members)
            for view in views
            for prompt in view
        ]
        features = (await self._features(questions)).view(gate.members, len(views), len(prompts), -1)
        cosines = []
        for member_VSD in features:
            prototypes_CD = merge.prototypes(member_VSD[0], labels_S, len(ask.labels))
            cosines.append(merge.similarities(member_VSD[-1], prototypes_CD))
        return merge.merged(cosines, labels_S, gamma=ask.gamma, beta=ask.beta, top_k=ask.top_k)

    async def _applied(self, lease: Lease, alpha: tuple[float, ...], trim: float | None) -> Applied:
        """A merge of the pool that is leased, on a lease of its own."""
        if trim is None:
            return Applied(self.registry.renew(lease), alpha)
        return Applied(await self._trims.lease(lease.version, alpha, trim))

    async def _under(self, applied: Applied, prompts: Sequence[Prompt]) -> torch.Tensor:
        """[N, D] float32 features of prompts; ends the lease."""
        try:
            return await self._features([self._question(applied, prompt) for prompt in prompts])
        finally:
            self.registry.release(uses.held(applied))

    async def _features(self, questions: Sequence[Question]) -> torch.Tensor:
        """[N, D] float32; one follows as soon as one is done."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(questions)
        waiting = iter(enumerate(questions))

        async def work() -> None:
            for place, question in waiting:
                (found[place],) = await self.scorer.features([question])

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.in_flight, len(questions))):
                    group.create_task(work())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return torch.stack(found)

    async def _prompts(self, given: Mapping[str, str]) -> list[Prompt]:
        """Of inputs by their field."""
        prompts, most = await self.inputs.read(given), self.scorer.most_tokens
        for field_, prompt in zip(given, prompts, strict=True):
            if not 1 <= (count := len(prompt.tokens)) <= most:
                raise GateError(field_, f"{field_} has {count} tokens; 1 to {most} are possible: shorten it")
        return prompts

    def _question(self, applied: Applied, prompt: Prompt) -> Question:
        return Question(prompt.tokens, lambda: uses.renewed(self.registry, (applied,)), given=prompt.given)


def _gone(name: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"merge {name!r} is not known; it has expired, or its pool changed: merge again")
