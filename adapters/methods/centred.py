"""The change between two low-rank pairs, in a form that survives rounding: B A - B0 A0 = (B - B0) A + B0 (A - A0).

Must not know: where the pairs come from. Stacked as [B, -B0] [A; A0], the two products are each as large as the part of
the base they were taken from, and cancel to the small change; in bfloat16 their rounding errors can exceed it. In the
centred form every term is as small as the change.
"""

from __future__ import annotations

import torch

from motet.adapters.effects import LowRank

WORST_CONDITION = 1e4
"""Of the change of coordinates that aligns a start; beyond it, it would lose what float32 factors hold."""

NEAR = 0.5
"""‖difference‖/‖one of them‖ below which two halves of a pair are the trained and the initial one."""


def centred(trained: LowRank, start: LowRank) -> LowRank:
    """What training changed: rank R + R0, in float32 from float64 differences.

    Args:
        trained, start: of the same shapes, scales folded into both B.
    """
    a_RI, b_OR, a0_RI, b0_OR = (part.double() for part in (trained.a_RI, trained.b_OR, start.a_RI, start.b_OR))
    return LowRank(
        torch.cat([a_RI, a_RI - a0_RI]).float().contiguous(), torch.cat([b_OR - b0_OR, b0_OR], 1).float().contiguous()
    )


def aligned(start: LowRank, trained: LowRank) -> LowRank:
    """The start with the same product, in the coordinates in which it lies nearest to the trained A.

    A start that was recomputed is known up to B0 T⁻¹, T A0: an SVD on another machine may flip the signs of a pair of
    singular vectors, and then A - A0 would be large. T is the least-squares solution of T A0 = A.
    """
    a0_RI, b0_OR = start.a_RI.double(), start.b_OR.double()
    t_RR = torch.linalg.lstsq(a0_RI.T, trained.a_RI.double().T).solution.T
    if not torch.linalg.cond(t_RR) < WORST_CONDITION:  # NaN too
        return start
    return LowRank(t_RR @ a0_RI, torch.linalg.solve(t_RR, b0_OR, left=False))


def recentred(pair: LowRank) -> LowRank:
    """The same product, centred, where the pair is a stack [B, -B0] [A; A0] of two that are near each other.

    This is what PEFT's conversion of PiSSA, CorDA and OLoRA adapters to plain LoRA writes.
    """
    half, odd = divmod(pair.rank, 2)
    if odd or half == 0:
        return pair
    trained = LowRank(pair.a_RI[:half], pair.b_OR[:, :half])
    start = LowRank(pair.a_RI[half:], -pair.b_OR[:, half:])
    near = all(
        float(torch.linalg.vector_norm(one - other)) < NEAR * float(torch.linalg.vector_norm(one))
        for one, other in ((trained.a_RI, start.a_RI), (trained.b_OR, start.b_OR))
    )
    return centred(trained, start) if near else pair
