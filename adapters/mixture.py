"""Several low-rank adapters made into one of the same rank: TIES and DARE-TIES, on the factors.

Must not know: names, files, requests. A plain weighted sum needs none of this: it is served as it is, each adapter with
its weight as gate. Here A's and B's are each merged by themselves, as PEFT's `add_weighted_adapter` does it, so the
result is no sum of the adapters' changes:

    trim    keep the largest `density` of every tensor's values (DARE: keep each with that chance, divided by it)
    elect   for each place the sign that the kept values of all adapters sum to
    merge   the mean of the values of that sign, each first multiplied by √|w|, A's also by the sign of w

The scale is in B already, so where scales differ B's signs are elected with them, which PEFT does without.

Shapes: n adapters, R rank, I/O a target's in/out widths.

Source: https://arxiv.org/abs/2306.01708 (TIES), https://arxiv.org/abs/2311.03099 (DARE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Literal

import torch

from motet.adapters.effects import Lowered, LowRank, TargetEffects
from motet.adapters.errors import GateError

MergeMethod = Literal["ties", "dare_ties"]
Trim = Callable[[torch.Tensor], torch.Tensor]
LARGEST_WEIGHT = 8.0
"""Of a part, by absolute value: far above what makes sense, far below what overflows."""
MOST_PARTS = 16


def obstacle(lowered: Lowered) -> str | None:
    """Why an adapter cannot be part of a mixture; None where it can: a weighted sum means something for pairs alone."""
    if lowered.gate is not None:
        return "it needs a gate of its own"
    if lowered.overlays or any(
        one.name != "low_rank" and getattr(effects, one.name) is not None
        for effects in lowered.effects.values()
        for one in fields(effects)
    ):
        return "it is more than low-rank pairs"
    return None


def require_weights(weights: Sequence[float]) -> None:
    """Require that there are some, and that each is finite and not absurd.

    Raises:
        GateError: otherwise.
    """
    if not 1 <= len(weights) <= MOST_PARTS:
        raise GateError("adapters", f"a mixture has {len(weights)} adapters; 1 to {MOST_PARTS} are possible")
    for place, weight in enumerate(weights):
        if not abs(weight) <= LARGEST_WEIGHT:  # NaN too
            raise GateError(
                f"adapters.{place}.weight",
                f"weight {place} is {weight!r}; it must be between -{LARGEST_WEIGHT} and {LARGEST_WEIGHT}",
            )


def merged(
    parts: Sequence[Lowered], weights: Sequence[float], method: MergeMethod, density: float, seed: int = 0
) -> Lowered:
    """One adapter of the parts' rank.

    Args:
        parts: of low-rank pairs only; see `obstacle`.
        density: share of values that is kept, above 0 and at most 1.
        seed: of DARE's choice.

    Raises:
        GateError: ranks differ on a target, or a number is out of range.
    """
    require_weights(weights)
    if not 0 < density <= 1:
        raise GateError("density", f"density is {density!r}; it must be above 0 and at most 1")
    random = torch.Generator().manual_seed(seed)

    def drop(values: torch.Tensor) -> torch.Tensor:
        kept = torch.bernoulli(torch.full_like(values, density), generator=random)
        return values * kept / density

    trim = drop if method == "dare_ties" else lambda values: _largest(values, density)
    effects: dict[str, TargetEffects] = {}
    for target in sorted({name for part in parts for name in part.effects}):
        pairs = [
            (pair, weight)
            for part, weight in zip(parts, weights, strict=True)
            if target in part.effects and (pair := part.effects[target].low_rank) is not None
        ]
        if len(ranks := {pair.rank for pair, _ in pairs}) != 1:
            raise GateError(
                "adapters",
                f"{method} needs adapters of one rank; on {target!r} they have {', '.join(map(str, sorted(ranks)))}: "
                "mix them linearly, or leave some out",
            )
        roots = [math.sqrt(abs(weight)) for _, weight in pairs]
        signed = [math.copysign(root, weight) for root, (_, weight) in zip(roots, pairs, strict=True)]
        a_RI = _elected([trim(pair.a_RI) for pair, _ in pairs], signed)
        b_OR = _elected([trim(pair.b_OR) for pair, _ in pairs], roots)
        effects[target] = TargetEffects(LowRank(a_RI, b_OR))
    return Lowered(method, f"{len(parts)} adapters, density {density:g}", "merged", effects, len(effects))


def _largest(values: torch.Tensor, density: float) -> torch.Tensor:
    """The largest by absolute value, the rest zero; at least one is kept."""
    count = max(1, int(density * values.numel()))
    kept = torch.zeros(values.numel())
    kept[values.abs().reshape(-1).topk(count).indices] = 1
    return values * kept.view_as(values)


def _elected(trimmed: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    """Mean over the adapters that agree with the elected sign; zero counts for neither."""
    values = torch.stack(list(trimmed))
    elected = torch.where(values.sum(0) >= 0, 1.0, -1.0)
    agrees = values.sign() == elected
    weighted = values * torch.tensor(factors).view(-1, *[1] * (values.dim() - 1))
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
