"""Turns a plan into what one forward needs: token and position tensors, and the effects of each row's adapter.

Must not know: methods, sampling rules, the model's architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from motet.adapters.base import Target
from motet.adapters.residency import Addresses, Int32, Residency
from motet.adapters.version import Slot
from motet.kernels.dispatch import Backend, low_rank_plan, sparse_plan
from motet.kernels.epilogue import RowVectorPlan, RowVectors
from motet.kernels.ops import SparsePlan
from motet.kernels.segments import Segments, TargetShape
from motet.kernels.sparse import SparseSegments
from motet.server.engine.types import Span
from motet.server.model.inject import StepEffects
from motet.server.model.overlay import OverlayPlan


class Run(NamedTuple):
    """Rows start to stop, all of one slot."""

    slot: Slot
    start: int
    stop: int


class EffectsBuilder:
    """Builds a step's effects from the spans' slots.

    Note: the previous step's effects are reused while the same slots stand at the same rows, as they do for most decode
    steps, and no slot was filled or freed in between.
    """

    def __init__(self, residency: Residency, targets: Sequence[Target], backend: Backend) -> None:
        self._residency = residency
        self._backend = backend
        self._shapes = [TargetShape(target.in_width, target.out_width) for target in targets]
        self._latest: tuple[tuple[list[Run], int, int], StepEffects] | None = None

    def build(self, spans: Sequence[Span]) -> StepEffects | None:
        """Effects for the rows of these spans; None when no span has an adapter."""
        runs, rows = _runs(spans)
        if not runs:
            return None
        key = (runs, rows, self._residency.epoch)
        if self._latest is None or self._latest[0] != key:
            self._latest = (key, self._build(runs, rows))
        return self._latest[1]

    def _build(self, runs: list[Run], rows: int) -> StepEffects:
        addresses = self._residency.addresses([run.slot for run in runs])
        arena_NU = self._residency.arena.units_NU
        row_start = np.array([run.start for run in runs], dtype=np.int32)
        row_stop = np.array([run.stop for run in runs], dtype=np.int32)
        segments = Segments(row_start, row_stop, addresses.a_first, addresses.b_first, addresses.rank)
        out_widths = [shape.out_width for shape in self._shapes]
        scales = RowVectors(row_start, row_stop, addresses.scale_first, addresses.has_scale != 0)
        biases = RowVectors(row_start, row_stop, addresses.bias_first, addresses.has_bias != 0)
        return StepEffects(
            low_rank=low_rank_plan(self._backend, arena_NU, self._shapes, segments, rows),
            sparse=self._sparse(addresses, row_start, row_stop, rows),
            overlays=self._overlays(runs),
            scales=RowVectorPlan(arena_NU, out_widths, scales, rows),
            biases=RowVectorPlan(arena_NU, out_widths, biases, rows),
        )

    def _overlays(self, runs: list[Run]) -> OverlayPlan | None:
        found = [(run.start, run.stop, self._residency.overlays(run.slot)) for run in runs]
        return OverlayPlan(found) if any(replacements for _, _, replacements in found) else None

    def _sparse(self, addresses: Addresses, row_start: Int32, row_stop: Int32, n_rows: int) -> SparsePlan | None:
        if not addresses.columns.any() and not addresses.rows.any():
            return None
        columns = SparseSegments(
            row_start, row_stop, addresses.columns_first, addresses.columns_index, addresses.columns
        )
        rows = SparseSegments(row_start, row_stop, addresses.rows_first, addresses.rows_index, addresses.rows)
        return sparse_plan(self._backend, self._residency.arena.units_NU, self._shapes, columns, rows, n_rows)


def _runs(spans: Sequence[Span]) -> tuple[list[Run], int]:
    """Runs of neighbouring spans with one adapter, and the number of all rows."""
    runs: list[Run] = []
    row = 0
    for span in spans:
        stop = row + len(span.tokens)
        if span.lease is not None:
            slot = span.lease.slot
            if runs and runs[-1].slot == slot and runs[-1].stop == row:
                runs[-1] = Run(slot, runs[-1].start, stop)
            else:
                runs.append(Run(slot, row, stop))
        row = stop
    return runs, row


def token_tensors(spans: Sequence[Span], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Input tokens and positions of all rows, [1, T] each."""
    tokens = [token for span in spans for token in span.tokens]
    positions = [position for span in spans for position in range(span.start, span.start + len(span.tokens))]
    return torch.tensor([tokens], device=device), torch.tensor([positions], device=device)
