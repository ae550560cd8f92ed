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
