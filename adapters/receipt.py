"""The load receipt: what an adapter turned out to be, for people and for `motet adapters inspect`.

Must not know: memory, devices, methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from motet.adapters.approximate import Remaining, remaining
from motet.adapters.base import BaseModel, Kind
from motet.adapters.dense import merge
from motet.adapters.effects import ColumnSparse, Lowered, TargetEffects
from motet.adapters.gates.fixed import fixed, uniform
from motet.adapters.lowering import Lowering
from motet.adapters.version import Digest


@dataclass(frozen=True, slots=True)
class LogprobError:
    """How far a lossy form's answers are from those of the exact one, in nats.

    Attributes:
        largest, mean: |difference| of the log-probabilities of the tokens of fixed texts, as served.
        tokens: how many were compared.
    """

    largest: float
    mean: float
    tokens: int

    @classmethod
    def between(cls, exact: Sequence[Sequence[float]], lossy: Sequence[Sequence[float]]) -> LogprobError:
        """Compare text by text, token by token; at least one token."""
        differences = [
            abs(one - other)
            for text, other_text in zip(exact, lossy, strict=True)
            for one, other in zip(text, other_text, strict=True)
        ]
        broken = any(math.isnan(difference) for difference in differences)
        largest = math.inf if broken else max(differences)
        return cls(largest, math.inf if broken else math.fsum(differences) / len(differences), len(differences))


@dataclass(frozen=True, slots=True)
class LossyError:
    """What a lossy form misses.

    Attributes:
        form: the one that was asked for.
        change: what it leaves of the weights' change.
        logprobs: measured through the engine; None where there is none, as in `motet adapters inspect`.
    """

    form: str
    change: Remaining
    logprobs: LogprobError | None = None

    def __str__(self) -> str:
        said = f"{self.form}: misses {self.change.relative:.1%} of the change of {len(self.change.targets)} weights"
        if self.logprobs is None:
            return said
        error = self.logprobs
        return f"{said}, moves log-probabilities by {error.mean:.3g} on average, {error.largest:.3g} at most"


@dataclass(frozen=True, slots=True)
class Receipt:
    """Facts about one lowered adapter.

    Attributes:
        ranks: smallest and largest true rank.
        targets_matched, targets_expected: linears with effects, and linears the configuration names.
        relative_norms: target, or replaced parameter → ‖ΔW‖/‖W‖ (Frobenius).
        resident_bytes: what it takes in the serving dtype.
        error: of a lossy form that was asked for.
        head: its parameterization and labels; None where there is no output head.
        head_bytes: what it takes in host memory, beside `resident_bytes`.
        gate: the factors that the norms were measured at, all alike; None where the adapter has no gate.
    """

    digest: Digest
    method: str
    form: str
    scaling: str
    exact: bool
    ranks: tuple[int, int]
    targets_matched: int
    targets_expected: int
    relative_norms: dict[str, float]
    resident_bytes: int
    error: LossyError | None = None
    head: str | None = None
    head_bytes: int = 0
    gate: tuple[float, ...] | None = None

    def measured(self, exact: Sequence[Sequence[float]], lossy: Sequence[Sequence[float]]) -> Receipt:
        """With the difference of log-probabilities, text by text, token by token."""
        assert self.error is not None
        return replace(self, error=replace(self.error, logprobs=LogprobError.between(exact, lossy)))


def receipt(lowering: Lowering, base: BaseModel, bytes_needed: Callable[[Lowered], int]) -> Receipt:
    """Summarise a lowered adapter. Costs little beside lowering."""
    lowered, head, error = lowering.lowered, lowering.head, None
    if lowering.exact is not None:
        error = LossyError(lowering.form, remaining(lowering.exact.lowered, lowered, base))
    gate = None if lowered.gate is None else uniform(lowered.gate)
    ranks = [effects.low_rank.rank for effects in lowered.effects.values() if effects.low_rank]
    return Receipt(
        digest=lowering.digest,
        method=lowered.method,
        form=lowered.form,
        scaling=lowered.scaling,
        exact=lowered.exact,
        ranks=(min(ranks), max(ranks)) if ranks else (0, 0),
        targets_matched=len(lowered.effects),
        targets_expected=lowered.expected_targets,
        relative_norms={
            **{
                name: relative_norm(effects, name, base, lowered.overlays.get(f"{name}.weight"))
                for name, effects in fixed(lowered, gate).effects.items()
            },
            **{path: _replaced(values, base.parameter(path)) for path, values in lowered.overlays.items()},
        },
        resident_bytes=bytes_needed(lowered),
        error=error,
        head=None if head is None else f"{head.parameterization.value}, {len(head.labels)} labels",
        head_bytes=0 if head is None else head.bytes,
        gate=gate,
    )


def _replaced(values: torch.Tensor, own: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(own))
    return _distance(values, own) / norm if norm else math.inf


def _distance(one: torch.Tensor, own: torch.Tensor) -> float:
    """‖one - own‖; the base has zeros where `one` has more rows or columns, as it has for added tokens."""
    missing = [one.shape[dim] - own.shape[dim] for dim in reversed(range(own.dim()))]
    own = F.pad(own, [pad for more in missing for pad in (0, more)])
    return float(torch.linalg.vector_norm(one - own))


def relative_norm(effects: TargetEffects, target: str, base: BaseModel, replaced: torch.Tensor | None = None) -> float:
    """‖ΔW‖/‖W‖ of the effects on a target; biases do not count; infinite where W is zero.

    A scale, signs or several changes need the dense weight. One alone does not: ‖BA‖² = Σ (BᵀB) ⊙ (AAᵀ).

    Args:
        replaced: the parameter that the effects act on, where the adapter replaces it.
    """
    sparse = [part for part in (effects.columns, effects.rows) if part is not None]
    several = len(sparse) + (effects.low_rank is not None) > 1
    if effects.scale or effects.sign or several or replaced is not None:
        weight_OI = own_OI = base.weight(target)
        if replaced is not None:
            weight_OI = replaced.T if base.targets[target].kind is Kind.EMBEDDING else replaced
        norm = _distance(merge(effects, weight_OI, None)[0], own_OI)
    elif sparse:
        values = sparse[0].v_OS if isinstance(sparse[0], ColumnSparse) else sparse[0].v_SI
        norm = float(torch.linalg.vector_norm(values))
    elif effects.low_rank:
        a_RI, b_OR = effects.low_rank.a_RI.double(), effects.low_rank.b_OR.double()
        norm = float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().clamp(min=0).sqrt())
    else:
        norm = 0.0
    weight_norm = base.weight_norm(target)
    return norm / weight_norm if weight_norm else math.inf
