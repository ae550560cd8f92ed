"""The specification of the sign product: float32 loops a reviewer can check by eye.

Must not know: how to be fast. Runs on any device.

Shapes: T batch rows, I/O a target's in/out widths, P words of a row, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from motet.kernels.segments import TargetShape
from motet.kernels.sign import WORD_BITS, SignSegments, words


class ReferenceSignPlan:
    """See `motet.kernels.ops.SignPlan`."""

    backend = "reference"

    def __init__(self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: SignSegments) -> None:
        self._arena_NU = arena_NU
        self._shapes = shapes
        self._segments = segments

    def touches(self, target: int) -> bool:
        """See `motet.kernels.ops.SignPlan.touches`."""
        return bool(self._segments.present[target].any())

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.SignPlan.add_`."""
        segments, shape = self._segments, self._shapes[target]
        for s in range(len(segments)):
            if segments.present[target, s]:
                sign_OI = self._signs(int(segments.first[target, s]), shape)
                rows = slice(int(segments.row_start[s]), int(segments.row_stop[s]))
                product_TO = x_TI[rows].float() @ sign_OI.T
                y_TO[rows] = (y_TO[rows].float() + float(segments.alpha[target, s]) * product_TO).to(y_TO.dtype)

    def _signs(self, first: int, shape: TargetShape) -> torch.Tensor:
        """[O, I] float32 of +1 and -1, from the unit where the words begin."""
        n_words = words(shape.in_width)
        word_OP = self._arena_NU[first:].view(torch.int32).reshape(-1)[: shape.out_width * n_words]
        place = torch.arange(WORD_BITS, dtype=torch.int32, device=word_OP.device)
        bit_OI = (word_OP.view(shape.out_width, n_words, 1) >> place & 1).reshape(shape.out_width, -1)
        return 2 * bit_OI[:, : shape.in_width].float() - 1
