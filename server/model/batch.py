"""Turns a plan into what one forward needs: token and position tensors, and the effects of each row's adapter.

Must not know: methods, sampling rules, the model's architecture.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from motet.adapters.addresses import Addresses, Int32
from motet.adapters.base import Kind, Target
from motet.adapters.residency import Residency
from motet.adapters.version import Slot
from motet.kernels.cpu.compiled import Engine
from motet.kernels.dispatch import Backend, low_rank_plan, sign_plan, sparse_plan
from motet.kernels.epilogue import RowVectorPlan, RowVectors
from motet.kernels.ops import LowRankPlan, SignPlan, SparsePlan
from motet.kernels.segments import Segments, TargetShape
from motet.kernels.sign import SignSegments
from motet.kernels.sparse import SparseSegments
from motet.server.engine.types import Span
from motet.server.model.division import Division
from motet.server.model.embedding import EmbeddedRun
from motet.server.model.gating import GatedRows, rank_row_factors, row_gates
from motet.server.model.inject import AddedTokens, StepEffects
from motet.server.model.overlay import OverlayPlan

PARTS = 2
"""Of a step: what runs natively and what its modules compute. Each has effects to reuse."""


class Run(NamedTuple):
    """Rows start to stop, all of one slot and gate."""

    slot: Slot
    gate: tuple[float, ...] | None
    start: int
    stop: int


Layers = list[list[Run]]
"""Runs of the first adapter of each span, then of the second where some have one, and so on: their changes add up."""


@dataclass(frozen=True, slots=True, eq=False)
class StepChanges:
    """What the adapters of one step do, by where its rows go.

    Attributes:
        body: to the linears; None when no row has an adapter.
        embedding: to the input embedding.
        head: to the output head, for the rows whose logits are needed; None when no adapter changes it.
        vocabularies: slot → how many logits its rows have, of the adapters that add tokens.
    """

    body: StepEffects | None = None
    embedding: Sequence[EmbeddedRun] = ()
    head: StepEffects | None = None
    vocabularies: Mapping[Slot, int] = field(default_factory=dict)


class EffectsBuilder:
    """Builds a step's effects from the spans' slots and gates.

    Note: the previous step's effects are reused while the same slots and gates stand at the same rows, as they do for
    most decode steps, and none of those slots was filled anew in between. A span's second and further adapters are
    low-rank pairs alone.
    """

    def __init__(
        self,
        residency: Residency,
        targets: Sequence[Target],
        backend: Backend,
        *,
        embedding: str | None,
        head: str | None,
        rows_of_position: int = 1,
        engine: Engine | None = None,
    ) -> None:
        """Nothing is built yet.

        Args:
            targets: all of the base, in the order of their index.
            embedding, head: paths of the modules; they need not be targets. None where there are none.
            rows_of_position: of a prompt; a text's token is one row, an image at one position is many.
            engine: of the native backend, which then does the low-rank work.
        """
        self._rows_of_position = rows_of_position
        self._residency = residency
        self._backend, self._engine = backend, engine
        self._embedding, self._head = embedding, head
        self._of_kind = {kind: [target for target in targets if target.kind is kind] for kind in Kind}
        self.division = Division(residency, targets, {embedding, head})
        self._latest: deque[tuple[tuple[Layers, int, list[int]], StepChanges]] = deque(maxlen=PARTS)
        self._latest_head: deque[tuple[tuple[Layers, int, list[int]], StepEffects]] = deque(maxlen=PARTS)

    def build(self, spans: Sequence[Span]) -> StepChanges:
        """Effects for the rows of these spans."""
        layers, rows = _layers([(span, len(span.tokens) * self._rows_of_position) for span in spans])
        if not layers:
            return StepChanges()
        key = (layers, rows, self._placings(layers))
        changes = next((known for of, known in self._latest if of == key), None)
        if changes is None:
            body = self._build(Kind.LINEAR, layers, rows)
            embedded = [one for runs in layers for one in self._embedded(runs)]
            changes = StepChanges(body, embedded, None, self._wider(layers[0]))
            self._latest.append((key, changes))
        if not any(self._head in self._residency.touched(run.slot) for runs in layers for run in runs):
            return changes
        return replace(changes, head=self._build_head(spans))

    def _placings(self, layers: Layers) -> list[int]:
        """Equal while every slot holds what it held."""
        return [self._residency.placing(run.slot) for runs in layers for run in runs]

    def position_overlays(self, spans: Sequence[Span]) -> OverlayPlan | None:
        """Replacements for modules whose rows are the positions, not what a position is made of."""
        layers, _ = _layers([(span, len(span.tokens)) for span in spans])
        return self._overlays(layers[0]) if layers else None

    def _build_head(self, spans: Sequence[Span]) -> StepEffects | None:
        layers, rows = _layers([(span, logit_rows(span)) for span in spans])
        layers = [[run for run in runs if self._head in self._residency.touched(run.slot)] for runs in layers]
        if not any(layers):
            return None
        key = (layers, rows, self._placings(layers))
        head = next((known for of, known in self._latest_head if of == key), None)
        if head is None:
            wider = self._wider(layers[0])
            added = [self._added(run, wider[run.slot]) for run in layers[0] if run.slot in wider]
            head = replace(self._build(Kind.HEAD, layers, rows), added=added)
            self._latest_head.append((key, head))
        return head

    def _wider(self, runs: list[Run]) -> dict[Slot, int]:
        """Slot → the adapter's vocabulary, of those that add tokens to the base's."""
        head = self._of_kind[Kind.HEAD]
        found = {run.slot: self._residency.vocabulary(run.slot) for run in runs} if head else {}
        return {slot: size for slot, size in found.items() if size is not None and size > head[0].out_width}

    def _added(self, run: Run, vocabulary: int) -> AddedTokens:
        """The weights of the tokens that a run's adapter adds: the end of an overlay, or of the sparse rows."""
        (target,) = self._of_kind[Kind.HEAD]
        weight_NI = self._residency.overlays(run.slot).get(f"{self._head}.weight")
        if weight_NI is not None:
            return AddedTokens(run.start, run.stop, weight_NI[target.out_width :])
        at = self._residency.addresses([run.slot]).of(slice(target.index, target.index + 1))
        first, known = int(at.rows_first[0, 0]), int(at.rows[0, 0])
        shape = torch.Size((known + vocabulary - target.out_width, target.in_width))
        return AddedTokens(run.start, run.stop, self._residency.arena.view(first, shape)[known:])

    def _embedded(self, runs: list[Run]) -> list[EmbeddedRun]:
        """The runs whose adapter changes the embedding."""
        return [self._embedded_run(run) for run in runs if self._embedding in self._residency.touched(run.slot)]

    def _embedded_run(self, run: Run) -> EmbeddedRun:
        weight_VD = self._residency.overlays(run.slot).get(f"{self._embedding}.weight")
        if not self._of_kind[Kind.EMBEDDING]:
            return EmbeddedRun(run.start, run.stop, weight_VD)
        (target,) = self._of_kind[Kind.EMBEDDING]
        arena = self._residency.arena
        at = self._residency.addresses([run.slot]).of(slice(target.index, target.index + 1))
        rank, tokens, has_scale = (int(one[0, 0]) for one in (at.rank, at.columns, at.has_scale))
        width, vocabulary = target.out_width, target.in_width

        def view(first: Int32, *shape: int) -> torch.Tensor:
            return arena.view(int(first[0, 0]), torch.Size(shape))

        index = arena.index(int(at.columns_index[0, 0]), tokens)
        group_R = self._residency.groups(run.slot)[target.index, :rank]
        gate_R = None if run.gate is None else torch.from_numpy(rank_row_factors(group_R, run.gate))
        return EmbeddedRun(
            start=run.start,
            stop=run.stop,
            weight_VD=weight_VD,
            low_rank=(view(at.a_first, rank, vocabulary), view(at.b_first, rank, width)) if rank else None,
            gate_R=None if gate_R is None else gate_R.to(arena.units_NU.device),
            tokens=(index, view(at.columns_first, tokens, width)) if tokens else None,
            scale_D=view(at.scale_first, width) if has_scale else None,
            adds_tokens=(self._residency.vocabulary(run.slot) or 0) > vocabulary,
        )

    def _build(self, kind: Kind, layers: Layers, rows: int) -> StepEffects:
        targets, runs = self._of_kind[kind], _whatever_the_gate(layers[0])
        if not targets:
            return StepEffects((), None, self._overlays(runs), None, None)
        shapes = [TargetShape(target.in_width, target.out_width) for target in targets]
        span = slice(targets[0].index, targets[0].index + len(targets))
        addresses = self._residency.addresses([run.slot for run in runs]).of(span)
        arena_NU = self._residency.arena.units_NU
        row_start = np.array([run.start for run in runs], dtype=np.int32)
        row_stop = np.array([run.stop for run in runs], dtype=np.int32)
        out_widths = [shape.out_width for shape in shapes]
        scales = RowVectors(row_start, row_stop, addresses.scale_first, addresses.has_scale != 0)
        biases = RowVectors(row_start, row_stop, addresses.bias_first, addresses.has_bias != 0)
        return StepEffects(
            low_rank=tuple(self._low_rank(one, shapes, span, rows) for one in layers),
            sparse=self._sparse(addresses, shapes, row_start, row_stop, rows),
            overlays=self._overlays(runs),
            scales=RowVectorPlan(arena_NU, out_widths, scales, rows),
            biases=RowVectorPlan(arena_NU, out_widths, biases, rows),
            signs=self._signs(addresses, shapes, row_start, row_stop, rows),
        )

    def _low_rank(self, runs: list[Run], shapes: list[TargetShape], span: slice, rows: int) -> LowRankPlan:
        gated = [
            GatedRows(self._residency.groups(run.slot)[span], run.gate, run.start, run.stop)
            for run in runs
            if run.gate is not None
        ]
        of_slot = _whatever_the_gate(runs)
        addresses = self._residency.addresses([run.slot for run in of_slot]).of(span)
        segments = Segments(
            np.array([run.start for run in of_slot], dtype=np.int32),
            np.array([run.stop for run in of_slot], dtype=np.int32),
            addresses.a_first,
            addresses.b_first,
            addresses.rank,
            row_gates(gated, len(shapes), rows),
        )
        backend = self._backend if self._engine is None else "native"
        return low_rank_plan(backend, self._residency.arena.units_NU, shapes, segments, rows, self._engine)

    def _overlays(self, runs: list[Run]) -> OverlayPlan | None:
        found = [(run.start, run.stop, self._residency.overlays(run.slot)) for run in runs]
        return OverlayPlan(found) if any(replacements for _, _, replacements in found) else None

    def _sparse(
        self, addresses: Addresses, shapes: list[TargetShape], row_start: Int32, row_stop: Int32, n_rows: int
    ) -> SparsePlan | None:
        if not addresses.columns.any() and not addresses.rows.any():
            return None
        columns = SparseSegments(
            row_start, row_stop, addresses.columns_first, addresses.columns_index, addresses.columns
        )
        rows = SparseSegments(row_start, row_stop, addresses.rows_first, addresses.rows_index, addresses.rows)
        return sparse_plan(self._backend, self._residency.arena.units_NU, shapes, columns, rows, n_rows)

    def _signs(
        self, addresses: Addresses, shapes: list[TargetShape], row_start: Int32, row_stop: Int32, n_rows: int
    ) -> SignPlan | None:
        if not addresses.has_sign.any():
            return None
        alpha = np.ascontiguousarray(addresses.sign_alpha).view(np.float32)
        segments = SignSegments(row_start, row_stop, addresses.sign_first, alpha, addresses.has_sign != 0)
        return sign_plan(self._backend, self._residency.arena.units_NU, shapes, segments, n_rows)


def logit_rows(span: Span) -> int:
    """How many of a span's rows need logits: those with prompt targets and, when it draws, its last."""
    return len(span.prompt_targets) + span.draw


def _layers(spans: Sequence[tuple[Span, int]]) -> tuple[Layers, int]:
    """Runs of neighbouring spans with one adapter and gate, and the number of all rows.

    Args:
        spans: each with how many rows it has.
    """
    layers: Layers = [[] for _ in range(max((len(span.applied) for span, _ in spans), default=0))]
    row = 0
    for span, rows in spans:
        stop = row + rows
        for runs, one in zip(layers, span.applied if rows else (), strict=False):
            if runs and runs[-1][:2] == (one.lease.slot, one.gate) and runs[-1].stop == row:
                runs[-1] = runs[-1]._replace(stop=stop)
            else:
                runs.append(Run(one.lease.slot, one.gate, row, stop))
        row = stop
    return layers, row


def _whatever_the_gate(runs: Sequence[Run]) -> list[Run]:
    """The runs of one slot after another, without the gates that part them."""
    merged: list[Run] = []
    for run in runs:
        if merged and (merged[-1].slot, merged[-1].stop) == (run.slot, run.start):
            merged[-1] = merged[-1]._replace(stop=run.stop)
        else:
            merged.append(run._replace(gate=None))
    return merged


def token_tensors(spans: Sequence[Span], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Input tokens and positions of all rows, [1, T] each."""
    tokens = [token for span in spans for token in span.tokens]
    positions = [position for span in spans for position in range(span.start, span.start + len(span.tokens))]
    return torch.tensor([tokens], device=device), torch.tensor([positions], device=device)
