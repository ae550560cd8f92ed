"""The load receipt: what an adapter turned out to be, for people and for `motet adapters inspect`.

Must not know: memory, devices, methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from motet.adapters.base import BaseModel
from motet.adapters.dense import merge
from motet.adapters.effects import Lowered, TargetEffects
from motet.adapters.version import Digest


@dataclass(frozen=True, slots=True)
class Receipt:
    """Facts about one lowered adapter.

    Attributes:
        ranks: smallest and largest true rank.
        targets_matched, targets_expected: linears with effects, and linears the configuration names.
        relative_norms: target, or replaced parameter → ‖ΔW‖/‖W‖ (Frobenius).
        resident_bytes: what it takes in the serving dtype.
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


def receipt(lowered: Lowered, digest: Digest, base: BaseModel, resident_bytes: int) -> Receipt:
    """Summarise a lowered adapter. Costs little beside lowering."""
    ranks = [effects.low_rank.rank for effects in lowered.effects.values() if effects.low_rank]
    return Receipt(
        digest=digest,
        method=lowered.method,
        form=lowered.form,
        scaling=lowered.scaling,
        exact=lowered.exact,
        ranks=(min(ranks), max(ranks)) if ranks else (0, 0),
        targets_matched=len(lowered.effects),
        targets_expected=lowered.expected_targets,
        relative_norms={
            **{name: relative_norm(effects, name, base) for name, effects in lowered.effects.items()},
            **{path: _replaced(values, base.parameter(path)) for path, values in lowered.overlays.items()},
        },
        resident_bytes=resident_bytes,
    )


def _replaced(values: torch.Tensor, own: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(own))
    return float(torch.linalg.vector_norm(values - own)) / norm if norm else math.inf


def relative_norm(effects: TargetEffects, target: str, base: BaseModel) -> float:
    """‖ΔW‖/‖W‖ of the effects on a target; biases do not count; infinite where W is zero.

    A scale or a sparse change needs the dense weight; a low-rank change alone does not: ‖BA‖² = Σ (BᵀB) ⊙ (AAᵀ).
    """
    if effects.scale or effects.columns or effects.rows:
        weight_OI = base.weight(target)
        merged_OI, _ = merge(effects, weight_OI, None)
        norm = float(torch.linalg.vector_norm(merged_OI - weight_OI))
    elif effects.low_rank:
        a_RI, b_OR = effects.low_rank.a_RI.double(), effects.low_rank.b_OR.double()
        norm = float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().clamp(min=0).sqrt())
    else:
        norm = 0.0
    weight_norm = base.weight_norm(target)
    return norm / weight_norm if weight_norm else math.inf
