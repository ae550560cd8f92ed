"""What the gates of a step's requests mean for the rank rows of its adapters.

Must not know: what computes a gate, methods, kernels' inner workings.

Shapes: C targets, G different gates, R an adapter's largest rank, or the largest of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from motet.adapters.addresses import Int32
from motet.kernels.segments import Float32, Gates


class GatedRows(NamedTuple):
    """Batch rows start to stop, whose adapter's rank rows have these factors.

    Attributes:
        group_CR: which factor of the gate a rank row has.
    """

    group_CR: Int32
    gate: tuple[float, ...]
    start: int
    stop: int


def rank_row_factors(group_CR: Int32, gate: tuple[float, ...]) -> Float32:
    """[C, R] the factor of each rank row."""
    return np.asarray(gate, dtype=np.float32)[group_CR]


def row_gates(gated: Sequence[GatedRows], n_targets: int, n_rows: int) -> Gates | None:
    """The factors of all batch rows, one where a row is in no run; None when none is."""
    if not gated:
        return None
    widest = max(run.group_CR.shape[1] for run in gated)
    factor_CGR = np.ones((n_targets, 1 + len(gated), widest), dtype=np.float32)
    of_row = np.zeros(n_rows, dtype=np.int32)
    for number, run in enumerate(gated, 1):
        factor_CGR[:, number, : run.group_CR.shape[1]] = rank_row_factors(run.group_CR, run.gate)
        of_row[run.start : run.stop] = number
    return Gates(of_row, factor_CGR)
