"""Lossy forms of weights that are replaced as a whole, for those who ask: cheaper effects of nearly the same change.

Must not know: methods, memory, how the error of answers is measured. With Δ = W' - W of a target linear:

    svd-R     Δ ≈ B A, the best approximation of rank R            LowRank
    1bit      Δ ≈ α sign(Δ), α = mean |Δ|, sign(0) = +1            SignDelta

Norms, biases, embeddings, heads and sparse changes stay as they are, and so does a weight that the form would not make
smaller.

Source: BitDelta, https://arxiv.org/abs/2402.10193 and its authors' code (in the paper sign(0) = -1); α is not trained.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch

from motet.adapters import signs
from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.dense import merge
from motet.adapters.effects import Lowered, LowRank, SignDelta, TargetEffects
from motet.adapters.errors import ConfigError
from motet.adapters.methods.principal import leading
from motet.adapters.spec import LossyForm
from motet.adapters.version import Digest

OFFERED = (LossyForm(), LossyForm(8), LossyForm(32))
"""Forms that a refusal for want of memory mentions; docs/adr/0009 has their error."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """What a lossy form leaves of the change.

    Attributes:
        relative: ‖Δ - Δ̂‖/‖Δ‖ over all approximated weights together (Frobenius).
        targets: the same of each.
    """

    relative: float
    targets: Mapping[str, float]


def digest(exact: Digest, form: LossyForm) -> Digest:
    """That of the lossy form of an adapter with this digest."""
    return Digest(hashlib.sha256(f"{exact} approximate {form}".encode()).hexdigest())


def approximate(exact: Lowered, base: BaseModel, form: LossyForm) -> Lowered:
    """The same adapter in a lossy form.

    Raises:
        ConfigError: the form would change nothing.
    """
    chosen = _require_any(exact, base, form)
    return _replaced(
        exact, base, form, {target.name: _cheaper(_change(target, exact, base), form) for target in chosen}
    )


def outline(exact: Lowered, base: BaseModel, form: LossyForm) -> Lowered:
    """What `approximate` would make, with operands that have shapes but no values: tells what it takes.

    Raises:
        ConfigError: the form would change nothing.
    """
    return _replaced(
        exact, base, form, {target.name: _shapes(target, form) for target in _require_any(exact, base, form)}
    )


def offer(exact: Lowered, base: BaseModel, bytes_needed: Callable[[Lowered], int]) -> str:
    """The end of a refusal: forms that are smaller than the exact one; empty where there are none."""
    possible = [form for form in OFFERED if any(_candidates(exact, base, form))]
    sizes = [(form, bytes_needed(outline(exact, base, form))) for form in possible]
    smaller = sorted((size, str(form)) for form, size in sizes if size < bytes_needed(exact))
    said = ", ".join(f"{form} takes {size:,} bytes" for size, form in smaller)
    return f"; or ask for a lossy form of it with approximate: {said}" if said else ""


def remaining(exact: Lowered, lossy: Lowered, base: BaseModel) -> Remaining:
    """Measure what the lossy form leaves, from the effects themselves."""
    targets: dict[str, float] = {}
    rests, changes = [0.0], [0.0]
    for target in base.targets.values():
        path = f"{target.name}.weight"
        if path not in exact.overlays or path in lossy.overlays:
            continue
        change_OI = _change(target, exact, base)
        effects = lossy.effects.get(target.name, TargetEffects())
        made_OI, _ = merge(replace(effects, bias=None), torch.zeros_like(change_OI), None)
        rest, size = (float(torch.linalg.vector_norm(m_OI)) for m_OI in (change_OI - made_OI, change_OI))
        targets[target.name] = _ratio(rest, size)
        rests.append(rest)
        changes.append(size)
    return Remaining(_ratio(math.hypot(*rests), math.hypot(*changes)), targets)


def _ratio(rest: float, size: float) -> float:
    return rest / size if size else 0.0


def _candidates(exact: Lowered, base: BaseModel, form: LossyForm | None) -> Iterator[Target]:
    """Linears whose whole weight is replaced; with a form, those that it makes smaller."""
    for target in base.targets.values():
        path = f"{target.name}.weight"
        if target.kind is not Kind.LINEAR or path not in exact.overlays or base.is_tied(path):
            continue
        if form is None or form.rank is None or form.rank < _break_even(target):
            yield target


def _break_even(target: Target) -> float:
    """The rank at which a pair is as large as the weight."""
    return target.in_width * target.out_width / (target.in_width + target.out_width)


def _require_any(exact: Lowered, base: BaseModel, form: LossyForm) -> list[Target]:
    if chosen := list(_candidates(exact, base, form)):
        return chosen
    replaced = list(_candidates(exact, base, None))
    if not replaced:
        raise ConfigError(
            f"approximate={form} would change nothing: no linear layer's whole weight is replaced; drop it, the exact "
            "form is as cheap"
        )
    most = math.ceil(max(_break_even(target) for target in replaced)) - 1
    raise ConfigError(
        f"approximate={form} would make nothing smaller: pairs of that rank take as much as the weights; ask for "
        f"svd-{most} or less"
    )


def _change(target: Target, exact: Lowered, base: BaseModel) -> torch.Tensor:
    """Δ [O, I] of a target whose weight is replaced."""
    return exact.overlays[f"{target.name}.weight"] - base.weight(target.name)


def _cheaper(change_OI: torch.Tensor, form: LossyForm) -> TargetEffects:
    if form.rank is not None:
        pair = leading(change_OI, form.rank).pair
        return TargetEffects(LowRank(pair.a_RI.float().contiguous(), pair.b_OR.float().contiguous()))
    alpha = change_OI.double().abs().mean()
    return TargetEffects(sign=SignDelta(signs.pack(change_OI), alpha.float().reshape(1)))


def _shapes(target: Target, form: LossyForm) -> TargetEffects:
    n_in, n_out = target.in_width, target.out_width
    if form.rank is not None:
        a_RI, b_OR = (torch.empty(shape, device="meta") for shape in ((form.rank, n_in), (n_out, form.rank)))
        return TargetEffects(LowRank(a_RI, b_OR))
    word_OP = torch.empty(n_out, signs.words(n_in), dtype=torch.int32, device="meta")
    return TargetEffects(sign=SignDelta(word_OP, torch.empty(1, device="meta")))


def _replaced(exact: Lowered, base: BaseModel, form: LossyForm, cheaper: Mapping[str, TargetEffects]) -> Lowered:
    effects = dict(exact.effects)
    for name, made in cheaper.items():
        own = effects.get(name, TargetEffects())
        others = [field.name for field in fields(own) if field.name != "bias" and getattr(own, field.name) is not None]
        assert not others, f"{name!r} is replaced as a whole and has {others} as well"
        effects[name] = replace(made, bias=own.bias)
    return replace(
        exact,
        form=f"{exact.form}, approximate={form}",
        effects={name: effects[name] for name in base.targets if name in effects},
        expected_targets=len(effects),
        exact=False,
        overlays={path: v for path, v in exact.overlays.items() if path.removesuffix(".weight") not in cheaper},
    )
