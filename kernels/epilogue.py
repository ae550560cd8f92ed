"""What follows the products on a mixed batch: each row's own output scale and output bias, on any device.

Must not know: which method made the vectors, nor the low-rank work before them.

With h = W x and no bias, an adapted linear is ``y = k ⊙ (h + B(g ⊙ A x)) + c + b``: k is the adapter's OutputScale
(DoRA), c the base bias, which k must not touch, b the adapter's OutputBias. So, in this order: base product without
c, low-rank product, `scale_`, c, `add_`. Where `touches` is false for the scale, c may go with the base product.

Shapes: T batch rows, O a target's out width, S segments, C targets, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from motet.kernels.arena_rows import ArenaRows, arena_rows
from motet.kernels.segments import Int32, check_rows

# A longer segment is worth its own call: gathering a vector of 1536 for each of 32 rows takes about as long as
# two calls it saves (torch 2.13, two cores).
_ROWS_WORTH_A_CALL = 32


@dataclass(frozen=True, slots=True, eq=False)
class RowVectors:
    """One arena row of a target's out width for each segment that has one.

    Attributes:
        row_start: [S] first batch row of each segment; ascending.
        row_stop: [S] one past the last; segments are not empty and do not overlap.
        first: [C, S] arena unit where the vector begins.
        present: [C, S] whether the segment has a vector on the target; where not, its first is ignored.
    """

    row_start: Int32
    row_stop: Int32
    first: Int32
    present: npt.NDArray[np.bool_]


class RowVectorPlan:
    """The scales, or the biases, of one step, prepared once and applied to every target.

    Attributes:
        vectors: what it was prepared from, for whoever applies them otherwise.

    Note: rows without a vector are not touched. The plan reads the arena at each call.
    """

    def __init__(self, arena_NU: torch.Tensor, out_widths: Sequence[int], vectors: RowVectors, n_rows: int) -> None:
        """Prepare.

        Args:
            arena_NU: [N, U], contiguous.
            out_widths: [C] elements, multiples of U.
            vectors: who has which.
            n_rows: T, rows in the batch.
        """
        check_rows(vectors.row_start, vectors.row_stop, n_rows)
        assert vectors.first.shape == vectors.present.shape == (len(out_widths), len(vectors.row_start))
        self.vectors = vectors
        self._work: list[tuple[list[tuple[slice, ArenaRows]], int]] = [([], 0)] * len(out_widths)
        groups: dict[tuple[int, bytes], list[int]] = {}
        for target in np.flatnonzero(vectors.present.any(axis=1)).tolist():
            key = (out_widths[target], vectors.present[target].tobytes())
            groups.setdefault(key, []).append(target)
        for (width, _), group in groups.items():
            runs = _prepare(arena_NU, width, vectors, group)
            for position, target in enumerate(group):
                self._work[target] = (runs, position)

    def touches(self, target: int) -> bool:
        """Whether any row has a vector on the target."""
        return bool(self._work[target][0])

    def scale_(self, target: int, y_TO: torch.Tensor) -> None:
        """Scale the rows, in place: ``y_t += d_t ⊙ y_t``, d being scale − 1.

        Args:
            target: index into the out widths.
            y_TO: [T, O] without any bias, the arena's dtype and device.

        Note:
            The arena holds scale − 1 because a DoRA scale is near 1, where bfloat16 has steps of 2⁻⁷; its distance
            from 1 keeps eight bits of its own.
        """
        for rows, d_TO in self._vectors(target):
            y_rows = y_TO[rows]
            y_rows.addcmul_(y_rows, d_TO)

    def add_(self, target: int, y_TO: torch.Tensor) -> None:
        """Add the biases, in place: ``y_t += b_t``.

        Args:
            target: index into the out widths.
            y_TO: [T, O], scaled already; the arena's dtype and device.
        """
        for rows, b_TO in self._vectors(target):
            y_TO[rows].add_(b_TO)

    def _vectors(self, target: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Runs of rows with [1, O] or one vector per row."""
        runs, position = self._work[target]
        for rows, vectors in runs:
            yield rows, vectors.read(position)


def _prepare(
    arena_NU: torch.Tensor, width: int, vectors: RowVectors, group: list[int]
) -> list[tuple[slice, ArenaRows]]:
    prepared = []
    for run in _runs(vectors, vectors.present[group[0]]):
        start, stop = vectors.row_start[run], vectors.row_stop[run]
        first_CT = vectors.first[np.ix_(group, run)]
        if len(run) > 1:
            first_CT = np.repeat(first_CT, stop - start, axis=1)
        once = np.ones(first_CT.shape[1], dtype=np.int32)
        prepared.append((slice(int(start[0]), int(stop[-1])), arena_rows(arena_NU, first_CT, once, width)))
    return prepared


def _runs(vectors: RowVectors, present_S: npt.NDArray[np.bool_]) -> list[list[int]]:
    """Present segments that one call can serve: touching short ones together, each long one alone."""
    runs: list[list[int]] = []
    open_stop: int | None = None  # where the last run ends, if a short segment may still join it
    for s in np.flatnonzero(present_S).tolist():
        start, stop = int(vectors.row_start[s]), int(vectors.row_stop[s])
        short = stop - start < _ROWS_WORTH_A_CALL
        if short and open_stop == start:
            runs[-1].append(s)
        else:
            runs.append([s])
        open_stop = stop if short else None
    return runs
