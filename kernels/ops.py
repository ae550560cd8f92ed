"""The kernels' contract: what every backend computes.

Must not know: adapters, requests, the model. `reference` is the specification, the others are held to it by tests.

Shapes: T batch rows, I/O a target's in/out widths, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from typing import Protocol

import torch


class LowRankPlan(Protocol):
    """The low-rank work of one step, prepared once and applied to every target."""

    @property
    def backend(self) -> str:
        """Name of the backend that does the work."""

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add every segment's low-rank product to its rows, in place.

        Semantics: for each segment s and each row t in [row_start_s, row_stop_s),
        ``y_t += Σ_r g_sr · (A_sr · x_t) · Bᵀ_sr``, accumulated in float32 and rounded to y's dtype once by
        `reference`; the other backends may round the rank-r intermediate to the arena's dtype. Rows outside every
        segment keep their value (a −0 may become a +0), and a target that no segment touches returns at once.

        Args:
            target: index into the plan's target shapes.
            y_TO: [T, O], contiguous, the arena's dtype and device; updated in place.
            x_TI: [T, I], contiguous, the same dtype and device.

        Note:
            Operands must be finite: a backend may multiply a foreign adapter's B by zero. Whoever fills the arena
            refuses the rest. Rows of x and y need not be: what they hold stays in their own row.
            The plan reads the arena at each call, so its operands must stay where they are while the plan is in use.
        """


class SparsePlan(Protocol):
    """The ColumnSparse and RowSparse work of one step, prepared once and applied to every target."""

    @property
    def backend(self) -> str:
        """Name of the backend that does the work."""

    def touches(self, target: int) -> bool:
        """Whether any row has such an effect on the target."""

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add every segment's gathered and scattered products to its rows, in place.

        Semantics: ``y_t += Σ_s x_t[idx_s] · Vᵀ_s`` for each row t of a column segment, then, for each row t of a row
        segment, ``y_t[idx_s] += V_s · x_t``, accumulated in float32 and rounded to y's dtype once by `reference`; the
        other backends round y after each of the two, and may round what they scatter before they add it. Rows outside
        every segment keep their value (a −0 may become a +0), as do the outputs no index names where a row has
        RowSparse only; a target that no segment touches returns at once.

        Args:
            target: index into the plan's target shapes.
            y_TO: [T, O], contiguous, the arena's dtype and device; updated in place. Holds the base product already.
            x_TI: [T, I], contiguous, the same dtype and device.

        Note:
            The indices of an operand must be distinct and within the width they choose from: a backend neither checks
            nor clamps them, and adds without atomics. Operands must be finite. Whoever fills the arena refuses the
            rest. Rows of x and y need not be finite: what they hold stays in their own row.
            Operands and index lists must stay where they are, and as they are, while the plan is in use: a backend may
            read them at each call or keep what it read at a target's first.
        """


class SignPlan(Protocol):
    """The work with packed signs of one step, prepared once and applied to every target."""

    @property
    def backend(self) -> str:
        """Name of the backend that does the work."""

    def touches(self, target: int) -> bool:
        """Whether any row has such an effect on the target."""

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add every segment's product with its signs to its rows, in place.

        Semantics: for each segment s and each row t in [row_start_s, row_stop_s), ``y_t += α_s (x_t · sign_sᵀ)`` with
        sign_s [O, I] of +1 and -1, accumulated in float32 and rounded to y's dtype once. Rows outside every segment
        keep their value, and a target that no segment touches returns at once.

        Args:
            target: index into the plan's target shapes.
            y_TO: [T, O], contiguous, the arena's dtype and device; updated in place. Holds the base product already.
            x_TI: [T, I], contiguous, the same dtype and device.

        Note:
            Rows of x and y need not be finite: what they hold stays in their own row. The plan reads the words at each
            call, so they must stay where they are while the plan is in use.
        """
