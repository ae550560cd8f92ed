"""Where an adapter's operands lie in the arena, as the tables of integers that kernels read.

Must not know: how places are found, requests, methods.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Addresses:
    """Where operands lie, for some slots: [C targets, S slots] first arena unit and what is present.

    Attributes:
        a_first, b_first: of A [R, I] and Bᵀ [R, O]; meaningless where rank is 0.
        rank: true rank, 0 where the adapter has no low-rank effect on the target.
        scale_first, bias_first: of the vectors [O]; meaningless where absent.
        columns_first, columns_index: of Vᵀ [S, O] and of the indices of a ColumnSparse.
        rows_first, rows_index: of V [S, I] and of the indices of a RowSparse.
        columns, rows: how many of either, 0 where absent; rows of added tokens lie behind the others, not counted.
        sign_first: of the words [O, P] of a SignDelta.
        sign_alpha: the bits of its α, a float32.
        has_scale, has_bias, has_sign: 0 or 1.
    """

    a_first: Int32
    b_first: Int32
    rank: Int32
    scale_first: Int32
    bias_first: Int32
    columns_first: Int32
    columns_index: Int32
    columns: Int32
    rows_first: Int32
    rows_index: Int32
    rows: Int32
    sign_first: Int32
    sign_alpha: Int32
    has_scale: Int32
    has_bias: Int32
    has_sign: Int32

    def of(self, targets: slice) -> Addresses:
        """The addresses of some of the targets."""
        return Addresses(*(getattr(self, name)[targets] for name in COLUMNS))


COLUMNS = tuple(field.name for field in fields(Addresses))
