"""Batches for the sign kernels, with an oracle that shares no code with them.

The arena is NaN wherever no live words lie, and what a last word has beyond the in width is random, so that a read of
either shows.

Shapes: T batch rows, I/O a target's in/out widths, P words of a row, C targets, S segments, N units in the arena, U
elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from motet.kernels.dispatch import Backend, sign_plan
from motet.kernels.ops import SignPlan
from motet.kernels.segments import TargetShape
from motet.kernels.sign import SignSegments
from tests.support.low_rank import Run


@dataclass(frozen=True)
class SignCase:
    """A batch and what it should become."""

    arena_NU: torch.Tensor
    shapes: list[TargetShape]
    segments: SignSegments
    x_TI: list[torch.Tensor]
    y_TO: list[torch.Tensor]
    expected_TO: list[torch.Tensor]
    """[C] float64, from dense signs."""
    magnitude_TO: list[torch.Tensor]
    """[C] float64, |y| + |α (x · signᵀ)|: what a backend may round on the way to each element."""
    live_T: list[torch.Tensor]
    """[C] bool, false where y must stay as it is."""

    @property
    def n_rows(self) -> int:
        return len(self.y_TO[0])

    def plan(self, backend: Backend) -> SignPlan:
        """Asserts that it is this backend's."""
        plan = sign_plan(backend, self.arena_NU, self.shapes, self.segments, self.n_rows)
        assert plan.backend == backend
        return plan

    def run(self, backend: Backend) -> list[torch.Tensor]:
        """[C] what the backend makes of y."""
        plan = self.plan(backend)
        outputs = []
        for target, (x_TI, y_TO) in enumerate(zip(self.x_TI, self.y_TO, strict=True)):
            out_TO = y_TO.clone()
            plan.add_(target, out_TO, x_TI)
            outputs.append(out_TO)
        return outputs


def packed(sign_OI: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """[O, P] int32 by NumPy: bit k of word p is input 32 p + k; bits beyond the inputs are random."""
    n_out, n_in = sign_OI.shape
    bits = torch.randint(0, 2, (n_out, -(-n_in // 32) * 32), generator=random).numpy().astype(np.uint8)
    bits[:, :n_in] = (sign_OI > 0).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i4").copy())


def make_sign_case(
    runs: Sequence[Run],
    has_signs: Sequence[Sequence[bool]],
    shapes: Sequence[tuple[int, int]],
    *,
    unit: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
) -> SignCase:
    """Random signs, factors and rows of order 1.

    Args:
        runs: the batch, row after row.
        has_signs: [adapters][C] whether the adapter has signs on the target.
        shapes: [C] (in, out) widths.
        unit: U.
        dtype: of the arena, x and y.
        device: of the tensors.
        seed: of all that is random.
    """
    random = torch.Generator().manual_seed(seed)
    pieces, n_units = [torch.full((2, unit), torch.nan, dtype=dtype)], 2
    operands = {}
    for adapter, by_target in enumerate(has_signs):
        for c, ((i, o), has) in enumerate(zip(shapes, by_target, strict=True)):
            if not has:
                continue
            sign_OI = torch.randint(0, 2, (o, i), generator=random) * 2 - 1
            word_N = packed(sign_OI, random).reshape(-1)
            units = torch.full((-(-len(word_N) * 4 // (unit * dtype.itemsize)), unit), torch.nan, dtype=dtype)
            units.view(torch.int32).view(-1)[: len(word_N)] = word_N
            alpha = float(np.float32(torch.randn(1, generator=random).item() / i**0.5))
            operands[adapter, c] = (sign_OI.double(), alpha, n_units)
            pieces += [units, torch.full((1, unit), torch.nan, dtype=dtype)]
            n_units += len(units) + 1

    stops = np.cumsum([run.n_rows for run in runs], dtype=np.int32)
    starts = stops - np.array([run.n_rows for run in runs], dtype=np.int32)
    taken = [s for s, run in enumerate(runs) if run.adapter is not None]
    adapters = [run.adapter for run in runs if run.adapter is not None]
    size = (len(shapes), len(taken))
    first, alphas = np.full(size, 10**9, dtype=np.int32), np.full(size, np.nan, dtype=np.float32)
    present = np.zeros(size, dtype=np.bool_)
    x_TI = [torch.randn(int(stops[-1]), i, generator=random).to(dtype) for i, _ in shapes]
    y_TO = [torch.randn(int(stops[-1]), o, generator=random).to(dtype) for _, o in shapes]
    expected_TO = [y.double() for y in y_TO]
    magnitude_TO = [y.double().abs() for y in y_TO]
    live_T = [torch.zeros(len(y), dtype=torch.bool) for y in y_TO]
    for c in range(size[0]):
        for s, adapter in enumerate(adapters):
            if (adapter, c) not in operands:
                continue
            sign_OI, alpha, first[c, s] = operands[adapter, c]
            alphas[c, s], present[c, s] = alpha, True
            rows = slice(starts[taken[s]], stops[taken[s]])
            product_TO = alpha * (x_TI[c][rows].double() @ sign_OI.T)
            expected_TO[c][rows] += product_TO
            magnitude_TO[c][rows] += product_TO.abs()
            live_T[c][rows] = True
    return SignCase(
        arena_NU=torch.cat(pieces).to(device),
        shapes=[TargetShape(i, o) for i, o in shapes],
        segments=SignSegments(starts[taken], stops[taken], first, alphas, present),
        x_TI=[x.to(device) for x in x_TI],
        y_TO=[y.to(device) for y in y_TO],
        expected_TO=[y.to(device) for y in expected_TO],
        magnitude_TO=[y.to(device) for y in magnitude_TO],
        live_T=[live.to(device) for live in live_T],
    )
