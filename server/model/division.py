"""Which rows of a step a whole native step can compute, by what their adapters do.

Must not know: methods, how either way computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from motet.adapters.base import Kind, Target
from motet.adapters.residency import Residency
from motet.adapters.version import Slot
from motet.server.engine.types import Span

MOST_LAYERED = 8
"""Adapters of one row in a native step, as kernels/cpu/native/adapters.h has it."""


class Division:
    """Knows of each slot what of it only the layers' modules compute.

    Note: used by the step thread only.
    """

    def __init__(self, residency: Residency, targets: Sequence[Target], apart: Collection[str | None]) -> None:
        """Nothing is known yet.

        Args:
            apart: paths of the modules that compute for themselves either way: the embedding and the head.
        """
        self._residency, self._apart = residency, set(apart)
        self._linears = slice(0, sum(target.kind is Kind.LINEAR for target in targets))
        self._known: dict[Slot, tuple[int, str | None]] = {}

    def modules_only(self, span: Span) -> str | None:
        """What of a span's adapters no native step knows; None where it knows all."""
        for one in span.applied:
            slot, placing = one.lease.slot, self._residency.placing(one.lease.slot)
            if slot not in self._known or self._known[slot][0] != placing:
                self._known[slot] = placing, self._of_slot(slot)
            if (kind := self._known[slot][1]) is not None:
                return kind
        return "layered" if len(span.applied) > MOST_LAYERED else None

    def _of_slot(self, slot: Slot) -> str | None:
        replaced = {path.rpartition(".")[0] for path in self._residency.overlays(slot)}
        if replaced - self._apart:
            return "overlay"
        at = self._residency.addresses([slot]).of(self._linears)
        if at.columns.any() or at.rows.any():
            return "sparse"
        return "sign" if at.has_sign.any() else None
