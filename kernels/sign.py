"""What one step asks of the sign kernels, as plain integers: which rows, which packed signs, which factor.

Must not know: adapters, requests, tokens, the model. Built once per step on the host and shared by all targets.

An operand is one sign for each weight, ``y += α (x · signᵀ)``: bit k of word p of a row is the input 32 p + k, 1 for +1
and 0 for -1; what a last word has beyond the in width means nothing. The words are int32, row after row, kept in the
arena's own bytes from the beginning of a unit on.

Shapes: S segments, C targets, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from motet.kernels.segments import Float32, Int32, TargetShape, check_rows

WORD_BYTES = 4
WORD_BITS = 32


def words(in_width: int) -> int:
    """int32 words of one row of signs."""
    return -(-in_width // WORD_BITS)


@dataclass(frozen=True, slots=True, eq=False)
class SignSegments:
    """Runs of consecutive batch rows that share one adapter.

    Rows that lie in no segment have no such effect: the kernels leave them untouched.

    Attributes:
        row_start: [S] first row of each run; ascending.
        row_stop: [S] one past the last row; runs are not empty and do not overlap.
        first: [C, S] arena unit where the words [O, words(I)] begin.
        alpha: [C, S] the factor of all signs; finite.
        present: [C, S] bool; false where the adapter does not touch the target (the others are then ignored).
    """

    row_start: Int32
    row_stop: Int32
    first: Int32
    alpha: Float32
    present: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.row_start)

    def check(self, shapes: Sequence[TargetShape], arena_shape: tuple[int, int], itemsize: int, n_rows: int) -> None:
        """Assert that the segments are well formed and read nothing outside the batch or the arena.

        Args:
            shapes: [C] the targets.
            arena_shape: (N units, U elements per unit).
            itemsize: bytes of an element.
            n_rows: T, rows in the batch.

        Raises:
            AssertionError: they are not; whoever built them has a bug.
        """
        n_units, unit = arena_shape
        unit_bytes = unit * itemsize
        assert unit_bytes % WORD_BYTES == 0, f"units of {unit_bytes} bytes hold no whole number of int32 words"
        check_rows(self.row_start, self.row_stop, n_rows)
        expected = (len(shapes), len(self))
        for name in ("first", "alpha", "present"):
            assert getattr(self, name).shape == expected, f"{name} {getattr(self, name).shape}, not {expected}"
        assert np.isfinite(self.alpha[self.present]).all(), f"a factor is not finite: {self.alpha}"
        bytes_C = np.array([s.out_width * words(s.in_width) * WORD_BYTES for s in shapes], dtype=np.int64)
        units_C1 = -(-bytes_C // unit_bytes)[:, None]
        inside = (self.first >= 0) & (self.first + units_C1 <= n_units)
        assert (inside | ~self.present).all(), f"signs outside the arena of {n_units} units"
