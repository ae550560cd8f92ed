"""Rows of one width out of the arena, for a group of targets: as a view where they lie together, else gathered.

Must not know: what the rows mean.

Shapes: C targets of the group, P pieces (runs of consecutive rows), L rows in all pieces, W width of a row,
N units in the arena, U elements per unit.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from motet.kernels.segments import Int32


class ArenaRows(Protocol):
    """[L, W] rows of each target of a group."""

    def read(self, target: int) -> torch.Tensor:
        """The target's rows, [L, W]; may alias the arena. `target` is the position within the group."""


class ViewedRows:
    """One piece: consecutive in the arena, so reading costs nothing."""

    def __init__(self, arena_NU: torch.Tensor, first_C: Int32, n_rows: int, width: int) -> None:
        self._flat = arena_NU.view(-1)
        self._begin: list[int] = (first_C.astype(np.int64) * arena_NU.shape[1]).tolist()
        self._shape = (n_rows, width)

    def read(self, target: int) -> torch.Tensor:
        """See `ArenaRows.read`."""
        return self._flat.as_strided(self._shape, (self._shape[1], 1), self._begin[target])


class GatheredRows:
    """Several pieces: copied together by one `index_select` over an index that was made once for the group."""

    def __init__(self, arena_NU: torch.Tensor, first_CP: Int32, rows_P: npt.NDArray[np.integer], width: int) -> None:
        self._arena_NU = arena_NU
        self._width = width
        units_P = rows_P * (width // arena_NU.shape[1])
        begin_P = np.cumsum(units_P) - units_P  # where each piece begins among the gathered units
        within = np.arange(units_P.sum(), dtype=np.int32) - np.repeat(begin_P.astype(np.int32), units_P)
        units = torch.from_numpy(np.repeat(first_CP, units_P, axis=1) + within)
        self._units_C = units.to(arena_NU.device).unbind(0)

    def read(self, target: int) -> torch.Tensor:
        """See `ArenaRows.read`."""
        return self._arena_NU.index_select(0, self._units_C[target]).view(-1, self._width)


def arena_rows(arena_NU: torch.Tensor, first_CP: Int32, rows_P: npt.NDArray[np.integer], width: int) -> ArenaRows:
    """Prepare to read the same pieces of several targets.

    Args:
        arena_NU: [N, U], contiguous.
        first_CP: [C, P] unit where each piece begins.
        rows_P: [P] rows in each piece.
        width: W, elements in a row; a multiple of U.

    Returns:
        Reads [L, W] per target, the pieces one after the other.
    """
    if len(rows_P) == 1:
        return ViewedRows(arena_NU, first_CP[:, 0], int(rows_P[0]), width)
    return GatheredRows(arena_NU, first_CP, rows_P, width)
