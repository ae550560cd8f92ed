"""Which adapters are in the arena and where: lowered effects in, integer addresses out.

Must not know: names' meaning, requests, files, methods. The tables are plain NumPy so that a step gathers the addresses
of all its adapters for all targets in one indexing operation.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from motet.adapters.arena import Arena
from motet.adapters.base import Target
from motet.adapters.effects import Lowered, TargetEffects
from motet.adapters.errors import ArenaFullError
from motet.adapters.version import Slot

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
        return Addresses(*(getattr(self, name)[targets] for name in _COLUMNS))


_COLUMNS = tuple(field.name for field in fields(Addresses))


class Residency:
    """The resident set.

    Note: `place` and `release` may be called from any thread. A slot's addresses never change while it is held, so
    readers that hold a lease on the slot need no lock.
    """

    def __init__(self, targets: Mapping[str, Target], arena: Arena) -> None:
        self._targets = targets
        self.arena = arena
        self._lock = threading.Lock()
        self._tables = np.zeros((len(_COLUMNS), len(targets), 0), dtype=np.int32)
        self._vacant: list[Slot] = []
        self._ranges: dict[Slot, list[int]] = {}
        self._overlays: dict[Slot, dict[str, torch.Tensor]] = {}
        self._touched: dict[Slot, frozenset[str]] = {}
        self._vocabulary: dict[Slot, int | None] = {}
        self._groups: dict[Slot, Int32] = {}
        self.epoch = 0
        """Changes whenever a slot gains or loses its addresses: what was built in the same epoch is still right."""

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self.arena.allocator.used * self.arena.unit_bytes

    @property
    def budget_bytes(self) -> int:
        return self.arena.allocator.capacity * self.arena.unit_bytes

    def bytes_needed(self, lowered: Lowered) -> int:
        """Bytes the adapter takes in the arena."""
        operands = [operand for effects in lowered.effects.values() for _, operand in _operands(effects)]
        operands += {id(values): values for values in lowered.overlays.values()}.values()
        return sum(self.arena.units_of(operand) for operand in operands) * self.arena.unit_bytes

    def overlays(self, slot: Slot) -> Mapping[str, torch.Tensor]:
        """Parameter → its replacement, a view of the arena unless it was placed beside it."""
        return self._overlays[slot]

    def touched(self, slot: Slot) -> frozenset[str]:
        """Paths of the modules that the adapter changes in any way."""
        return self._touched[slot]

    def vocabulary(self, slot: Slot) -> int | None:
        """One past the largest token id that the adapter serves; None where that is the base's."""
        return self._vocabulary[slot]

    def groups(self, slot: Slot) -> Int32:
        """[C, R] which factor of a gate multiplies each rank row of each target; R is the adapter's largest rank."""
        return self._groups[slot]

    def place(self, lowered: Lowered) -> Slot:
        """Copy the adapter's operands into the arena.

        Raises:
            ArenaFullError: they do not fit; nothing was changed.
        """
        return self._place(lowered, beside=False)

    def place_beside(self, lowered: Lowered) -> Slot:
        """As `place`, but replaced parameters become tensors of their own, which no budget counts: not to serve them.

        Raises:
            ArenaFullError: there is no memory for them; nothing was changed.
        """
        return self._place(lowered, beside=True)

    def _place(self, lowered: Lowered, beside: bool) -> Slot:
        with self._lock:
            ranges, column, overlays = self._allocate(lowered, beside)
            slot = self._vacant.pop() if self._vacant else Slot(len(self._ranges))
            self._ranges[slot], self._overlays[slot] = ranges, overlays
            self._vocabulary[slot] = lowered.vocabulary
            self._touched[slot] = frozenset([*lowered.effects, *(path.rpartition(".")[0] for path in overlays)])
            self._groups[slot] = self._grouped(lowered)
            if slot >= self._tables.shape[2]:
                grown = np.zeros((*self._tables.shape[:2], max(8, 2 * self._tables.shape[2])), dtype=np.int32)
                grown[:, :, : self._tables.shape[2]] = self._tables
                self._tables = grown
            self._tables[:, :, slot] = column
            self.epoch += 1
        return slot

    def release(self, slot: Slot) -> None:
        """Free the slot; the caller guarantees that no step uses it."""
        with self._lock:
            del self._overlays[slot], self._touched[slot], self._vocabulary[slot], self._groups[slot]
            for start in self._ranges.pop(slot):
                self.arena.allocator.free(start)
            self._vacant.append(slot)
            self.epoch += 1

    def addresses(self, slots: list[Slot]) -> Addresses:
        """Addresses of the operands of these slots, one column per slot."""
        columns = self._tables[:, :, slots]
        return Addresses(*columns)

    def _allocate(self, lowered: Lowered, beside: bool) -> tuple[list[int], Int32, dict[str, torch.Tensor]]:
        """First units, the column of the tables, and the overlays; nothing where one does not fit."""
        ranges: list[int] = []
        column = np.zeros(self._tables.shape[:2], dtype=np.int32)
        overlays: dict[str, torch.Tensor] = {}
        placed: dict[int, torch.Tensor] = {}
        try:
            for name, effects in lowered.effects.items():
                target = self._targets[name].index
                for kind, operand in _operands(effects):
                    column[_COLUMNS.index(kind), target] = self._write(operand, lowered, ranges)
                for kind, count in _counts(effects, self._targets[name]):
                    column[_COLUMNS.index(kind), target] = count
            for path, values in lowered.overlays.items():
                if id(values) not in placed:
                    placed[id(values)] = (
                        self._beside(values)
                        if beside
                        else self.arena.view(self._write(values, lowered, ranges), values.shape)
                    )
                overlays[path] = placed[id(values)]
        except ArenaFullError:
            for taken in ranges:
                self.arena.allocator.free(taken)
            raise
        return ranges, column, overlays

    def _grouped(self, lowered: Lowered) -> Int32:
        """All zero where the adapter has no gate of its own: its one factor is a weight."""
        ranks = [effects.low_rank.rank for effects in lowered.effects.values() if effects.low_rank]
        groups = np.zeros((len(self._targets), max(ranks, default=0)), dtype=np.int32)
        if lowered.gate is not None:
            for name, group_R in lowered.gate.groups.items():
                groups[self._targets[name].index, : len(group_R)] = group_R
        return groups

    def _beside(self, values: torch.Tensor) -> torch.Tensor:
        try:
            return values.to(self.arena.units_NU.device, self.arena.units_NU.dtype)
        except torch.OutOfMemoryError as error:
            raise ArenaFullError(
                f"{values.nbytes:,} bytes are not free beside the adapter memory, where the exact form lies while a "
                "lossy one is compared with it; lower --kv-memory or --adapter-memory"
            ) from error

    def _write(self, operand: torch.Tensor, lowered: Lowered, ranges: list[int]) -> int:
        """The first unit of an operand that was copied into the arena; also noted in `ranges`."""
        start = self.arena.allocator.allocate(self.arena.units_of(operand))
        if start is None:
            raise self._full(lowered)
        ranges.append(start)
        self.arena.write(start, operand)
        return start

    def _full(self, lowered: Lowered) -> ArenaFullError:
        used = self.arena.allocator.used * self.arena.unit_bytes
        return ArenaFullError(
            f"the adapter needs {self.bytes_needed(lowered):,} bytes; {used:,} of the {self.budget_bytes:,} bytes of "
            "adapter memory are taken, and no gap is left for one of its operands; unload an adapter or raise "
            "--adapter-memory"
        )


def _operands(effects: TargetEffects) -> list[tuple[str, torch.Tensor]]:
    """(table column of the first unit, rows) of every operand, rows laid out as they lie in the arena."""
    operands: list[tuple[str, torch.Tensor]] = []
    if effects.low_rank:
        operands += [("a_first", effects.low_rank.a_RI), ("b_first", effects.low_rank.b_OR.T)]
    if effects.scale:
        operands.append(("scale_first", effects.scale.delta_O))
    if effects.bias:
        operands.append(("bias_first", effects.bias.bias_O))
    if effects.columns:
        operands += [("columns_first", effects.columns.v_OS.T), ("columns_index", effects.columns.index_S)]
    if effects.rows:
        operands += [("rows_first", effects.rows.v_SI), ("rows_index", effects.rows.index_S)]
    if effects.sign:
        operands.append(("sign_first", effects.sign.word_OP))
    return operands


def _counts(effects: TargetEffects, target: Target) -> list[tuple[str, int]]:
    """(table column, value) of what says how large an operand is, or that there is one."""
    return [
        ("rank", effects.low_rank.rank if effects.low_rank else 0),
        ("columns", len(effects.columns.index_S) if effects.columns else 0),
        ("rows", int((effects.rows.index_S < target.out_width).sum()) if effects.rows else 0),
        ("has_scale", int(effects.scale is not None)),
        ("has_bias", int(effects.bias is not None)),
        ("has_sign", int(effects.sign is not None)),
        ("sign_alpha", int(effects.sign.alpha_1.view(torch.int32)) if effects.sign else 0),
    ]
