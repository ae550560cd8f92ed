"""What the endpoints share: the base, the adapters, the engine, the keys. Put together by the command line.

Must not know: how requests look, how steps are computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import weakref
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from motet.adapters.errors import AdapterFailedError, AdapterNotFoundError, GateError, VersionNotServedError
from motet.adapters.gates.instance import InstanceGate
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.server.api import merge_asks, uses
from motet.server.api.autoload import Autoload
from motet.server.api.base_info import BaseInfo
from motet.server.api.classifying import Classifying
from motet.server.api.errors import ApiError, from_adapter_error
from motet.server.api.heads import Heads
from motet.server.api.merged import Merged
from motet.server.api.merging import MARK, Merging
from motet.server.api.placeholders import Placeholders
from motet.server.api.schemas import GenerationBody
from motet.server.api.text import Tokenizer
from motet.server.api.voice import Voice
from motet.server.engine.engine import Engine
from motet.server.engine.stream import Streams
from motet.server.engine.types import Applied
from motet.server.metrics import Metrics

FAILURES_UNHEALTHY = 3
"""Failed steps in a row after which the process asks to be restarted."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Who may do what. No inference key opens inference; no admin key closes administration."""

    inference: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Service:
    """The running server.

    Attributes:
        tokenizer: None where the base takes no texts.
        max_waiting: generations that may wait; more are answered 429.
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
    heads: Heads = field(default_factory=Heads)
    autoload: Autoload | None = None
    ready: bool = False
    draining: bool = False
    _placeholders: weakref.WeakKeyDictionary[InstanceGate, Placeholders] = field(
        default_factory=weakref.WeakKeyDictionary
    )

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

    async def prepare(self, *models: str) -> None:
        """Have adapters loaded that nobody has loaded, where that is on.

        Raises:
            ApiError: one is refused, or takes too long.
        """
        if self.autoload is not None:
            for model in models:
                await self.autoload.ensure(model)

    def resolve(self, model: str) -> Lease | None:
        """A lease on the adapter of that name, or None for the base.

        Raises:
            ApiError: 404, there is neither; never the base instead.
        """
        if model == self.base.name:
            return None
        try:
            return self.registry.acquire(model)
        except AdapterNotFoundError as error:
            raise _unknown(model, error) from error

    @contextlib.asynccontextmanager
    async def voice(self, body: GenerationBody) -> AsyncIterator[Voice]:
        """What a new request speaks with, until its generations have leases of their own.

        Raises:
            ApiError: there is no such model, or no new work is taken.
            GateError: the request's gate or mixture is not possible.
        """
        self.require_open()
        self.require_texts()
        uses.require_one_way(body, self.base.name)
        await self.prepare(*([body.model] if body.adapters is None else [part.name for part in body.adapters]))
        merged = await self._merged(body)
        applied = await self._applied(body) if merged is None else [await self._of_merge(merged)]
        try:
            yield replace(await self._voice(applied, body), merge=None if merged is None else merged.name)
        finally:
            uses.release(self.registry, applied)

    async def _merged(self, body: GenerationBody) -> Merged | None:
        """The merge that the request brings along."""
        if body.merge is None:
            return None
        try:
            return await merge_asks.inline(self.merging, body.model, body.merge)
        except AdapterNotFoundError as error:
            raise _unknown(body.model, error) from error

    async def _applied(self, body: GenerationBody) -> list[Applied]:
        if body.adapters is not None:
            parts = uses.mixed(self.registry, body)
            if body.merge_method == "linear":
                return parts
            try:
                return [await uses.merged(self.registry, body, parts)]
            finally:
                uses.release(self.registry, parts)
        if (known := self.merging.find(body.model)) is not None:
            if body.gate is not None:
                raise GateError("gate", f"merge {body.model!r} has its factors already; remove the field")
            return [await self._of_merge(known)]
        lease = self.resolve(body.model)
        if lease is None:
            if body.gate is not None:
                raise GateError("gate", "the base model has no gate; remove the field")
            return []
        try:
            return [await uses.gated(lease, body.gate)]
        except BaseException:
            self.registry.release(lease)
            raise

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
        return "_".join([f"fp_{self.base.fingerprint[:12]}", *(one.lease.version.digest[:12] for one in applied)])

    def require_open(self) -> None:
        """Refuse new work while starting, draining or overloaded."""
        if self.draining or not self.ready:
            state = "draining" if self.draining else "starting"
            raise ApiError(503, f"the server is {state}; try again", code=f"server_{state}", retry_after_s=5)
        if self.engine.state.waiting >= self.max_waiting:
            raise ApiError(
                429,
                f"{self.engine.state.waiting} requests wait already (limit {self.max_waiting}); try again later",
                code="queue_full",
                retry_after_s=1,
            )

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

    def require_inference_key(self, authorization: str | None) -> None:
        """Refuse a request without a valid key, where keys are configured."""
        allowed = self.keys.inference and (*self.keys.inference, *self.keys.admin)
        if allowed and not _has_key(authorization, allowed):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def require_oversight_key(self, authorization: str | None) -> None:
        """Refuse to show or end what others made without the admin key; where there is none, as for any request."""
        if self.keys.admin:
            self.require_admin_key(authorization)
        else:
            self.require_inference_key(authorization)

    def require_admin_key(self, authorization: str | None) -> None:
        """Refuse an administrative request without the admin key; without a configured key, refuse all."""
        if not self.keys.admin:
            raise ApiError(
                403, "administration is closed: the server was started without an admin key", code="admin_closed"
            )
        if not _has_key(authorization, self.keys.admin):
            raise ApiError(401, "the admin key is needed: Authorization: Bearer KEY", code="invalid_api_key")


def _unknown(model: str, error: AdapterNotFoundError) -> ApiError:
    if isinstance(error, VersionNotServedError):
        return from_adapter_error(error, "model")
    known = "it has expired, or its pool changed: merge again" if MARK in model else "GET /v1/models lists what does"
    return ApiError(404, f"model {model!r} does not exist; {known}", code="model_not_found", param="model")


def _has_key(authorization: str | None, keys: Sequence[str]) -> bool:
    """Whether the header carries one of the keys; compares with all of them in constant time."""
    scheme, _, given = (authorization or "").partition(" ")
    matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)
