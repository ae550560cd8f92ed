"""What the gates of a step's requests mean for the rank rows of its adapters.

Must not know: what computes a gate, methods, kernels.

Shapes: C targets, S runs, R an adapter's largest rank, or the largest of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from motet.adapters.residency import Int32


def rank_row_factors(
    groups: Sequence[Int32], gates: Sequence[tuple[float, ...] | None]
) -> npt.NDArray[np.float32] | None:
    """[C, S, R] the factor of each rank row, one where a run has no gate; None when no run has one.

    Args:
        groups: of each run's adapter, [C, R]: which factor of the gate a rank row has.
        gates: of each run.
    """
    if all(gate is None for gate in gates):
        return None
    targets, widest = len(groups[0]), max(group_CR.shape[1] for group_CR in groups)
    factors_CSR = np.ones((targets, len(gates), widest), dtype=np.float32)
    for run, (group_CR, gate) in enumerate(zip(groups, gates, strict=True)):
        if gate is not None:
            factors_CSR[:, run, : group_CR.shape[1]] = np.asarray(gate, dtype=np.float32)[group_CR]
    return factors_CSR
