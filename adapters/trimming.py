"""A pool's merge with trimmed weights: of each merged weight only the largest singular values are kept.

    W'   = W + Σ_r g_r B_r A_r                        merged
    W'_p = U_k Σ_k V_kᵀ,  k = ⌊p·min(O, I)⌋           its best approximation of rank k

Every target is decomposed by itself, exactly and in float64, so that equal asks give equal bits. W'_p replaces the
weight: it is an approximation that the request asks for, and how far it is from W' is reported.

Must not know: where α comes from, memory, requests.

Source: https://openreview.net/forum?id=HxGdbAmYYr, whose code decomposes a fused q, k, v at once, and by a randomised
algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from motet.adapters.base import BaseModel
from motet.adapters.dense import merge
from motet.adapters.effects import Lowered, TargetEffects
from motet.adapters.errors import GateError
from motet.adapters.gates.fixed import fixed
from motet.adapters.methods.principal import leading

ROUNDING = 1e-9
"""Added to p·min(O, I), so that 0.29 of 100 is 29."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What trimming did.

    Attributes:
        share: p.
        ranks: smallest and largest k.
        largest, mean: ‖W' - W'_p‖/‖W'‖ over the targets (Frobenius).
    """

    share: float
    ranks: tuple[int, int]
    largest: float
    mean: float


def ranks(targets: Iterable[str], share: float, base: BaseModel) -> dict[str, int]:
    """Target → k.

    Raises:
        GateError: the share is out of range, or leaves nothing of a target.
    """
    if not 0 < share <= 1:  # NaN too
        raise GateError("trim", f"trim is {share!r}; it must be above 0 and at most 1, which keeps everything")
    found: dict[str, int] = {}
    for name in targets:
        width = min(base.targets[name].in_width, base.targets[name].out_width)
        found[name] = math.floor(share * width + ROUNDING)
        if found[name] == 0:
            raise GateError("trim", f"trim is {share:g}, which keeps nothing of {name!r}; {1 / width:.4g} keeps rank 1")
    return found


def outline(targets: Iterable[str], base: BaseModel) -> Lowered:
    """What `trimmed` makes, without values: tells what it takes."""
    shapes = {name: (base.targets[name].out_width, base.targets[name].in_width) for name in targets}
    return _replaced({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def trimmed(pool: Lowered, alpha: Sequence[float], share: float, base: BaseModel) -> tuple[Lowered, Trimmed]:
    """The merge of a pool by α, trimmed.

    Raises:
        GateError: see `ranks`.
    """
    merged = fixed(pool, alpha)
    weights: dict[str, torch.Tensor] = {}
    missed: list[float] = []
    kept = ranks(merged.effects, share, base)
    for name, effects in merged.effects.items():
        weight_OI = _merged(effects, base.weight(name))
        best = leading(weight_OI, kept[name])
        weights[name] = (best.pair.b_OR @ best.pair.a_RI).float().contiguous()
        missed.append(best.rest / norm if (norm := float(torch.linalg.vector_norm(weight_OI))) else 0.0)
    used = sorted(kept.values())
    return _replaced(weights), Trimmed(share, (used[0], used[-1]), max(missed), math.fsum(missed) / len(missed))


def _merged(effects: TargetEffects, weight_OI: torch.Tensor) -> torch.Tensor:
    merged_OI, bias_O = merge(effects, weight_OI, None)
    assert bias_O is None, "a pool has pairs alone"
    return merged_OI


def _replaced(weights: Mapping[str, torch.Tensor]) -> Lowered:
    overlays = {f"{name}.weight": weight_OI for name, weight_OI in weights.items()}
    return Lowered("amt", "trimmed merge", "merged", {}, len(overlays), exact=False, overlays=overlays)
