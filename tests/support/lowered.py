"""Small lowered adapters made by hand, and what they take of an arena and a host."""

from __future__ import annotations

import torch

from motet.adapters.effects import Lowered, LowRank, TargetEffects
from tests.support.bases import base_of_names, residency_of

BASE = base_of_names(["q"])


def lowered(value: float = 1.0, rank: int = 1) -> Lowered:
    """A pair on the only target of BASE, all of whose values are the same."""
    pair = LowRank(torch.full((rank, 4), float(value)), torch.full((4, rank), float(value)))
    return Lowered("lora", "by hand", "none", {"q": TargetEffects(pair)}, 1)


_ANY = residency_of(BASE).pack(lowered())
DEVICE_BYTES = _ANY.units_NU.nbytes
"""Of one of rank 1 in float32."""
HOST_BYTES = _ANY.bytes
