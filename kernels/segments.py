"""What one step asks of the low-rank kernels, as plain integers: which rows, which rank rows, which gate.

Must not know: adapters, requests, tokens, the model. Built once per step on the host and shared by all targets.

Shapes: S segments, C targets, T batch rows, G different gates, R the largest rank in the step, N units in the arena, U
elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class TargetShape:
    """Widths of one target linear, in elements; both are multiples of the arena's unit."""

    in_width: int
    out_width: int


@dataclass(frozen=True, slots=True, eq=False)
class Gates:
    """Factors of rank rows, which may differ from batch row to batch row.

    Attributes:
        of_row: [T] which gate a row has; any number below G where the row is in no segment.
        factor: [C, G, R] of each rank row, zero-padded.
    """

    of_row: Int32
    factor: Float32


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Runs of consecutive batch rows that share one adapter.

    Rows that lie in no segment have no adapter: the kernels leave them untouched.

    Attributes:
        row_start: [S] first row of each run; ascending.
        row_stop: [S] one past the last row; runs are not empty and do not overlap.
        a_first: [C, S] arena unit where A [rank, in_width] begins, row after row.
        b_first: [C, S] arena unit where Bᵀ [rank, out_width] begins, the scale folded in.
        rank: [C, S] true rank; 0 where the adapter does not touch the target (its firsts are then ignored).
        gates: None when every factor is 1.
    """

    row_start: Int32
    row_stop: Int32
    a_first: Int32
    b_first: Int32
    rank: Int32
    gates: Gates | None = None

    def __len__(self) -> int:
        return len(self.row_start)

    def check(self, shapes: Sequence[TargetShape], arena_shape: tuple[int, int], n_rows: int) -> None:
        """Assert that the segments are well formed and read nothing outside the batch or the arena.

        Args:
            shapes: [C] the targets.
            arena_shape: (N units, U elements per unit).
            n_rows: T, rows in the batch.

        Raises:
            AssertionError: they are not; whoever built them has a bug.
        """
        n_units, unit = arena_shape
        check_rows(self.row_start, self.row_stop, n_rows)
        expected = (len(shapes), len(self))
        for name in ("a_first", "b_first", "rank"):
            assert getattr(self, name).shape == expected, f"{name} {getattr(self, name).shape}, not {expected}"
        assert (self.rank >= 0).all(), f"negative rank in {self.rank}"
        if self.gates is not None:
            largest, (n_targets, n_gates, width) = int(self.rank.max(initial=0)), self.gates.factor.shape
            assert n_targets == len(shapes), f"gates for {n_targets} targets, not {len(shapes)}"
            assert width >= largest, f"gates are {width} wide, narrower than rank {largest}"
            assert self.gates.of_row.shape == (n_rows,), f"gates of {self.gates.of_row.shape} rows, not {n_rows}"
            known = (self.gates.of_row >= 0) & (self.gates.of_row < n_gates)
            assert known.all(), f"a row has gate {self.gates.of_row[~known][0]} of {n_gates}"
        for first, widths in (
            (self.a_first, [shape.in_width for shape in shapes]),
            (self.b_first, [shape.out_width for shape in shapes]),
        ):
            units, rest = np.divmod(np.asarray(widths, dtype=np.int64), unit)
            assert not rest.any(), f"widths {widths} are not multiples of the arena's unit {unit}"
            inside = (first >= 0) & (first + self.rank * units[:, None] <= n_units)
            assert (inside | (self.rank == 0)).all(), f"operand outside the arena of {n_units} units"


def check_rows(row_start: Int32, row_stop: Int32, n_rows: int) -> None:
    """Assert that runs of rows are not empty, ascend, do not overlap and end within the batch.

    Args:
        row_start: [S] first row of each run.
        row_stop: [S] one past the last.
        n_rows: T, rows in the batch.

    Raises:
        AssertionError: they do not.
    """
    assert row_start.shape == row_stop.shape, f"{len(row_start)} starts, {len(row_stop)} stops"
    bounds = np.stack([row_start, row_stop], axis=1).reshape(-1)
    edges = np.concatenate([[0], bounds, [n_rows]])
    assert (np.diff(edges) >= 0).all(), f"runs {bounds} overlap or leave the batch of {n_rows} rows"
    assert (row_start < row_stop).all(), f"empty run in {bounds}"
