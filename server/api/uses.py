"""Which adapters a request computes with, and by which factors: its model, its gate, its mixture, its merge.

Must not know: prompts, sampling, responses.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from motet.adapters import mixture
from motet.adapters.effects import Lowered
from motet.adapters.errors import AdapterNotFoundError, GateError
from motet.adapters.gates.instance import UserInput
from motet.adapters.gates.pool import PoolGate
from motet.adapters.lease import Lease
from motet.adapters.pointers import unknown
from motet.adapters.registry import Registry
from motet.adapters.version import AdapterVersion, Digest
from motet.server.api.errors import from_adapter_error
from motet.server.api.keys import Caller
from motet.server.api.schemas import GateBody, GenerationBody
from motet.server.engine.types import Applied

T = TypeVar("T")


def require_one_way(body: GenerationBody, base: str) -> None:
    """Refuse combinations that mean nothing.

    Raises:
        GateError: the fields contradict each other.
    """
    if body.merge is not None:
        if body.adapters is not None or body.gate is not None:
            other = "gate" if body.adapters is None else "adapters"
            raise GateError(other, f"a merge finds the factors by itself; give either merge or {other}")
        if body.model == base:
            raise GateError("merge", f"a merge needs model to name a pool, not {base!r}, the base")
    if body.adapters is None:
        for field in ("merge_method", "density", "merge_seed"):
            if field in body.model_fields_set:
                raise GateError(field, f"{field} says how to mix adapters, and the request has none; remove it")
        return
    if body.model != base:
        raise GateError("adapters", f"a mixture needs model {base!r}, the base, not {body.model!r}")
    if body.gate is not None:
        raise GateError("gate", "a mixture has no gate; its weights are the adapters' own")
    meaningless = {"linear": ("density", "merge_seed"), "ties": ("merge_seed",), "dare_ties": ()}[body.merge_method]
    for field in meaningless:
        if field in body.model_fields_set:
            raise GateError(field, f"{field} means nothing to merge_method {body.merge_method!r}; remove either")


async def gated(lease: Lease, gate: GateBody | None) -> Applied:
    """One adapter with the gate that the request gives for it.

    Raises:
        GateError: it has no gate and one is given, or needs one that is not given or not possible.
    """
    name, own = lease.version.name, lease.resident.gate
    if own is None:
        if gate is not None:
            raise GateError("gate", f"adapter {name!r} has no gate; remove the field")
        return Applied(lease)
    if isinstance(own, PoolGate):
        if gate is None:
            return Applied(lease, own.factors(None))
        if others := gate.model_fields_set - {"weights"}:
            raise GateError(f"gate.{min(others)}", f"adapter {name!r} is a pool: of a gate it takes weights only")
        return Applied(lease, _of_gate(lambda: own.factors(gate.weights)))
    if gate is None:
        raise GateError("gate", f"adapter {name!r} answers by its user: give gate.history, user_embedding or weights")
    user = UserInput(gate.history, gate.user_embedding, gate.weights)
    factors = await asyncio.to_thread(_of_gate, lambda: own.factors([user])[0].tolist())
    return Applied(lease, tuple(factors))


def _of_gate(factors: Callable[[], T]) -> T:
    """Factors of a gate; errors name its fields as they stand in the request."""
    try:
        return factors()
    except GateError as error:
        field = error.field if error.field == "gate" else f"gate.{error.field}"
        raise GateError(field, str(error)) from error


def leased(registry: Registry, name: str, caller: Caller) -> Lease:
    """A lease on an adapter that the caller may see.

    Raises:
        AdapterNotFoundError: there is no such adapter for them; what they may not see does not exist.
    """
    if not caller.may_ask(name):
        raise unknown(name)
    lease = registry.acquire(name)
    if not caller.may_see(lease.version.name):
        registry.release(lease)
        raise unknown(name)
    return lease


def mixed(registry: Registry, body: GenerationBody, caller: Caller) -> list[Applied]:
    """The parts of a linear mixture, each with its weight.

    Raises:
        GateError: an adapter cannot be mixed, or a weight is impossible.
        ArenaFullError: they do not fit on the device together.
        ApiError: there is no such adapter.
    """
    parts = body.adapters or []
    mixture.require_weights([part.weight for part in parts])
    applied: list[Applied] = []
    try:
        for place, part in enumerate(parts):
            try:
                lease = leased(registry, part.name, caller)
            except AdapterNotFoundError as error:
                raise from_adapter_error(error, f"adapters.{place}.name") from error
            applied.append(Applied(lease, (float(part.weight),)))
            if why := lease.resident.unmixable:
                raise GateError(f"adapters.{place}.name", f"adapter {part.name!r} cannot be mixed: {why}; leave it out")
        if body.merge_method == "linear":
            registry.tiers.require_together([held(one) for one in applied])
    except BaseException:
        release(registry, applied)
        raise
    return applied


async def merged(
    registry: Registry, body: GenerationBody, parts: Sequence[Applied], turn: AbstractAsyncContextManager[None]
) -> Applied:
    """The one adapter that TIES or DARE-TIES makes of the parts; made once for the same versions, weights and options.

    Args:
        turn: to wait for where it has to be made.

    Raises:
        GateError: the adapters cannot be merged so.
        ArenaFullError: the result does not fit.
        TurnError: too many of the caller's are made or wait.
    """
    assert body.merge_method != "linear"
    method, density, seed = body.merge_method, 0.5 if body.density is None else body.density, body.merge_seed or 0
    versions = [(one.lease.version, one.gate) for one in parts]
    digest = hashlib.sha256(repr((versions, method, density, seed)).encode()).hexdigest()
    name = " + ".join(version.name for version, _ in versions)
    weights = [one.gate[0] for one in parts if one.gate is not None]

    def make() -> tuple[Lowered, None]:
        lowered = [registry.lowered_version(version) for version, _ in versions]
        return mixture.merged(lowered, weights, method, density, seed), None

    version = AdapterVersion(f"{method}({name})", Digest(digest))
    if (known := await asyncio.to_thread(registry.derived.find, version)) is not None:
        return Applied(known)
    async with turn:
        return Applied(await asyncio.to_thread(registry.derived.acquire, version, make))


def renewed(registry: Registry, applied: Sequence[Applied]) -> list[Applied]:
    """The same with leases of their own."""
    return [Applied(registry.renew(held(one)), one.gate) for one in applied]


def held(one: Applied) -> Lease:
    """The registry's own lease: the engine knows it by fewer words."""
    assert isinstance(one.lease, Lease)
    return one.lease


def release(registry: Registry, applied: Sequence[Applied]) -> None:
    """Give the leases back."""
    for one in applied:
        registry.release(held(one))
