"""What the endpoints share: the base, the adapters, the engine, the keys. Put together by the command line.

Must not know: how requests look, how steps are computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from motet.adapters.errors import AdapterFailedError, AdapterNotFoundError, GateError, VersionNotServedError
from motet.adapters.gates.instance import InstanceGate
from motet.adapters.lease import Lease
from motet.adapters.pointers import unknown
from motet.adapters.registry import Registry
from motet.adapters.standing import AdapterInfo
from motet.server.api import merge_asks, uses
from motet.server.api.admission import Admission, Ticket
from motet.server.api.autoload import Autoload
from motet.server.api.base_info import BaseInfo
from motet.server.api.classifying import Classifying
from motet.server.api.errors import ApiError, from_adapter_error
from motet.server.api.heads import Heads
from motet.server.api.keys import Caller, Keys
from motet.server.api.merged import Merged
from motet.server.api.merging import MARK, Merging
from motet.server.api.placeholders import Placeholders
from motet.server.api.quotas import Quota, Quotas
from motet.server.api.schemas import GenerationBody
from motet.server.api.text import Tokenizer
from motet.server.api.voice import Voice
from motet.server.engine.engine import Engine
from motet.server.engine.stream import Streams
from motet.server.engine.types import Applied
from motet.server.metrics import Metrics

FAILURES_UNHEALTHY = 3
"""Failed steps in a row after which the process asks to be restarted."""


@dataclass(slots=True, eq=False)
class Service:
    """The running server.

    Attributes:
        tokenizer: None where the base takes no texts.
        max_waiting: generations that may wait; more are answered 429.
        adapter_quotas, key_quotas: by adapter's or base's name, and by key's label.
        admission: what goes by them.
        autoload: loads adapters that requests name; None where only administration loads.
        ready: the base is loaded and warm.
        draining: no new requests.
    """

    base: BaseInfo
    tokenizer: Tokenizer | None
    registry: Registry
    engine: Engine
    streams: Streams
    merging: Merging
    classifying: Classifying
    metrics: Metrics
    keys: Keys
    max_waiting: int
    adapter_quotas: Quotas = field(default_factory=lambda: Quotas("adapter"))
    key_quotas: Quotas = field(default_factory=lambda: Quotas("API key"))
    admission: Admission = field(init=False)
    heads: Heads = field(default_factory=Heads)
    autoload: Autoload | None = None
    ready: bool = False
    draining: bool = False
    _placeholders: weakref.WeakKeyDictionary[InstanceGate, Placeholders] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def __post_init__(self) -> None:
        self.admission = Admission(self.engine, self.max_waiting, self.adapter_quotas, self.key_quotas)

    @property
    def healthy(self) -> bool:
        """Whether the step thread lives and its steps succeed."""
        return self.engine.alive and self.engine.state.failures < FAILURES_UNHEALTHY

    def knows(self, model: str) -> bool:
        """Whether the name means something, served or not."""
        if model == self.base.name or MARK in model or self.merging.find(model) is not None:
            return True
        try:
            self.registry.get(model)
        except AdapterFailedError:
            return True
        except AdapterNotFoundError:
            return False
        return True

    async def prepare(self, caller: Caller, *models: str) -> None:
        """Have adapters loaded that nobody has loaded, where that is on and the caller may see them.

        Raises:
            ApiError: one is refused, or takes too long.
        """
        if self.autoload is not None:
            for model in filter(caller.may_see, models):
                await self.autoload.ensure(model)

    def resolve(self, model: str, caller: Caller) -> Lease | None:
        """A lease on the adapter of that name, or None for the base.

        Raises:
            ApiError: 404, there is neither that the caller may see; never the base instead.
        """
        if model == self.base.name:
            return None
        try:
            return uses.leased(self.registry, model, caller)
        except AdapterNotFoundError as error:
            raise _unknown(model, error) from error

    @contextlib.asynccontextmanager
    async def voice(self, body: GenerationBody, caller: Caller) -> AsyncIterator[Voice]:
        """What a new request speaks with, until its generations have leases of their own.

        Raises:
            ApiError: there is no such model, or no new work is taken.
            GateError: the request's gate or mixture is not possible.
        """
        self.require_open()
        self.require_texts()
        uses.require_one_way(body, self.base.name)
        await self.prepare(caller, *([body.model] if body.adapters is None else [one.name for one in body.adapters]))
        merged = await self._merged(body, caller)
        if merged is None:
            applied, names = await self._applied(body, caller)
        else:
            applied, names = [await self._of_merge(merged)], (merged.pool.name,)
        try:
            voice = await self._voice(applied, body)
            yield replace(voice, merge=None if merged is None else merged.name, names=names)
        finally:
            uses.release(self.registry, applied)

    async def _merged(self, body: GenerationBody, caller: Caller) -> Merged | None:
        """The merge that the request brings along."""
        if body.merge is None:
            return None
        try:
            return await merge_asks.inline(self.merging, body.model, body.merge, caller)
        except AdapterNotFoundError as error:
            raise _unknown(body.model, error) from error

    async def _applied(self, body: GenerationBody, caller: Caller) -> tuple[list[Applied], tuple[str, ...]]:
        """And the names of the published adapters that it is made of, or the base's."""
        if body.adapters is not None:
            parts = uses.mixed(self.registry, body, caller)
            names = tuple(dict.fromkeys(one.lease.version.name for one in parts))
            if body.merge_method == "linear":
                return parts, names
            try:
                turn = self.merging.turns.turn(caller.label)
                return [await uses.merged(self.registry, body, parts, turn)], names
            finally:
                uses.release(self.registry, parts)
        if (known := self.known_merge(body.model, caller)) is not None:
            if body.gate is not None:
                raise GateError("gate", f"merge {body.model!r} has its factors already; remove the field")
            return [await self._of_merge(known)], (known.pool.name,)
        lease = self.resolve(body.model, caller)
        if lease is None:
            if body.gate is not None:
                raise GateError("gate", "the base model has no gate; remove the field")
            return [], (self.base.name,)
        try:
            return [await uses.gated(lease, body.gate)], (lease.version.name,)
        except BaseException:
            self.registry.release(lease)
            raise

    def require_visible(self, adapter: str, caller: Caller) -> None:
        """Refuse as unknown what the caller may not see.

        Raises:
            AdapterNotFoundError: it does not exist for them.
        """
        if not caller.may_see(adapter):
            raise unknown(adapter)

    def known_merge(self, model: str, caller: Caller) -> Merged | None:
        """A merge that is remembered, of a pool that the caller may see."""
        found = self.merging.find(model)
        return found if found is not None and caller.may_see(found.pool.name) else None

    async def _of_merge(self, merged: Merged) -> Applied:
        try:
            return await self.merging.applied(merged)
        except AdapterNotFoundError as error:
            raise _unknown(merged.name, error) from error

    async def _voice(self, applied: list[Applied], body: GenerationBody) -> Voice:
        assert self.tokenizer is not None
        if not applied:
            return Voice((), "the base model", self.tokenizer, self.base.vocabulary, self.base.end_tokens)
        first = uses.held(applied[0])
        name = f"adapter {' + '.join(one.lease.version.name for one in applied)!r}"
        own, gate = first.resident.own, first.resident.gate
        as_it_is = body.merge is None and first.version.answers_to(body.model)
        head = first.resident.head if as_it_is else None
        vocabulary = first.resident.vocabulary or self.base.vocabulary
        tokenizer, end_tokens = (
            (self.tokenizer, self.base.end_tokens) if own is None else (own.tokenizer, own.end_tokens)
        )
        if not isinstance(gate, InstanceGate) or body.gate is None:
            return Voice(applied, name, tokenizer, vocabulary, end_tokens, head=head)
        if gate not in self._placeholders:
            # It copies the tokenizer: 0.1 s, once for each adapter.
            self._placeholders[gate] = await asyncio.to_thread(Placeholders, tokenizer, gate)
        places = self._placeholders[gate]
        items = {"history": body.gate.history, "candidates": body.gate.candidates}
        return Voice(applied, name, places.tokenizer, vocabulary, end_tokens, places, items, head)

    def fingerprint(self, applied: Sequence[Applied]) -> str:
        """`system_fingerprint`: base weights, and the adapters' content; gates are no part of it."""
        base = [f"fp_{self.base.fingerprint[:12]}", *([] if self.base.weights == "exact" else [self.base.weights])]
        return "_".join([*base, *(one.lease.version.digest[:12] for one in applied)])

    def require_open(self) -> None:
        """Refuse new work while starting, draining or overloaded."""
        if self.draining or not self.ready:
            state = "draining" if self.draining else "starting"
            raise ApiError(503, f"the server is {state}; try again", code=f"server_{state}", retry_after_s=5)
        self.admission.require_room(1)

    def apply_quotas(self, infos: Iterable[AdapterInfo]) -> None:
        """From now on adapters have the quotas that they were published with, where they were with one."""
        for info in infos:
            self.adapter_quotas.set(info.version.name, Quota(**info.quota) if info.quota else None)

    @contextlib.contextmanager
    def counted(self, caller: Caller, name: str, version: str, generations: int = 1) -> Iterator[Ticket]:
        """Let in a request that is no generation, and count it to an adapter, until the block is left.

        Raises:
            ApiError: the queue or a quota has no room.
        """
        series, outcome = self.metrics.by_adapter.of(name), "refused"
        try:
            with self.admission.admitted(caller, [name], 0, min(generations, self.admission.most)) as ticket:
                outcome = "failed"
                yield ticket
                outcome = "finished"
        finally:
            series.finished(version, outcome, prompt=ticket.tokens if outcome == "finished" else 0)

    def require_texts(self) -> None:
        """Refuse what only a base of texts can do."""
        if self.base.modality != "text":
            raise ApiError(
                400,
                f"the base model {self.base.name!r} takes images and generates no text; POST /v1/classify, or merge a "
                "pool with POST /v1/adapters/{pool}/merges",
                code="modality_refused",
                param="model",
            )

    def require_inference_key(self, authorization: str | None) -> Caller:
        """Who asks; refuse a request without a valid key, where keys are configured."""
        caller = self.keys.who(authorization)
        if caller is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return caller

    def require_oversight_key(self, authorization: str | None) -> Caller:
        """Refuse to show or end what others made without the admin key; where there is none, as for any request."""
        if self.keys.administered:
            return self.require_admin_key(authorization)
        return self.require_inference_key(authorization)

    def require_admin_key(self, authorization: str | None) -> Caller:
        """Refuse an administrative request without the admin key; without a configured key, refuse all."""
        if not self.keys.administered:
            raise ApiError(
                403, "administration is closed: the server was started without an admin key", code="admin_closed"
            )
        caller = self.keys.who(authorization)
        if caller is None or not caller.admin:
            raise ApiError(401, "the admin key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return caller


def _unknown(model: str, error: AdapterNotFoundError) -> ApiError:
    if isinstance(error, VersionNotServedError):
        return from_adapter_error(error, "model")
    known = "it has expired, or its pool changed: merge again" if MARK in model else "GET /v1/models lists what does"
    return ApiError(404, f"model {model!r} does not exist; {known}", code="model_not_found", param="model")
