"""What one step asks of the sparse kernels, as plain integers: which rows, which operand, which index list.

Must not know: adapters, requests, tokens, the model. Built once per step on the host and shared by all targets.

Two effects share this form. ColumnSparse gathers inputs, ``y += V x[idx]``; its operand is Vᵀ, S rows of the out width.
RowSparse scatters to outputs, ``y[idx] += V x``; its operand is V, S rows of the in width. The indices of one operand
are distinct int32, kept in the arena's own bytes from the beginning of a unit on.

Shapes: S segments (and, in an operand, its indices), C targets, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from motet.kernels.segments import Int32, check_rows

INDEX_BYTES = 4
"""Of one entry of an index list."""


@dataclass(frozen=True, slots=True, eq=False)
class SparseSegments:
    """Runs of consecutive batch rows that share one adapter, for one of the two effects.

    Rows that lie in no segment have no such effect: the kernels leave them untouched.

    Attributes:
        row_start: [S] first row of each run; ascending.
        row_stop: [S] one past the last row; runs are not empty and do not overlap.
        first: [C, S] arena unit where the operand begins, row after row.
        index_first: [C, S] arena unit where the index list begins.
        count: [C, S] indices, and rows of the operand; 0 where the adapter does not touch the target (its firsts are
            then ignored).
    """

    row_start: Int32
    row_stop: Int32
    first: Int32
    index_first: Int32
    count: Int32

    def __len__(self) -> int:
        return len(self.row_start)

    def check(
        self,
        widths: Sequence[int],
        indexed_widths: Sequence[int],
        arena_shape: tuple[int, int],
        itemsize: int,
        n_rows: int,
    ) -> None:
        """Assert that the segments are well formed and read nothing outside the batch or the arena.

        Args:
            widths: [C] elements in a row of the operand: the out widths for ColumnSparse, the in widths for RowSparse.
            indexed_widths: [C] elements that the indices choose from: the other widths.
            arena_shape: (N units, U elements per unit).
            itemsize: bytes of an element.
            n_rows: T, rows in the batch.

        Raises:
            AssertionError: they are not; whoever built them has a bug. The index lists themselves are not read.
        """
        n_units, unit = arena_shape
        unit_bytes = unit * itemsize
        assert unit_bytes % INDEX_BYTES == 0, f"units of {unit_bytes} bytes hold no whole number of int32 indices"
        check_rows(self.row_start, self.row_stop, n_rows)
        expected = (len(widths), len(self))
        for name in ("first", "index_first", "count"):
            assert getattr(self, name).shape == expected, f"{name} {getattr(self, name).shape}, not {expected}"
        assert (self.count >= 0).all(), f"negative count in {self.count}"
        most_C1 = np.asarray(indexed_widths, dtype=np.int64)[:, None]
        assert (self.count <= most_C1).all(), f"more indices than the {list(indexed_widths)} there are: {self.count}"
        units, rest = np.divmod(np.asarray(widths, dtype=np.int64), unit)
        assert not rest.any(), f"widths {list(widths)} are not multiples of the arena's unit {unit}"
        index_units = -(-self.count.astype(np.int64) * INDEX_BYTES // unit_bytes)
        for first, length in ((self.first, self.count * units[:, None]), (self.index_first, index_units)):
            inside = (first >= 0) & (first + length <= n_units)
            assert (inside | (self.count == 0)).all(), f"operand or index list outside the arena of {n_units} units"

    def operands(self) -> list[int]:
        """[S] equal numbers read the same operands and index lists on every target."""
        reads_S = np.concatenate([self.first, self.index_first, self.count]).T.copy()
        numbers: dict[bytes, int] = {}
        return [numbers.setdefault(reads.tobytes(), len(numbers)) for reads in reads_S]
