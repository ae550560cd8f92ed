"""Which adapters are in the arena and where: packed operands in, integer addresses out.

Must not know: names' meaning, requests, files, methods, who must stay. The tables are plain NumPy so that a step
gathers the addresses of all its adapters for all targets in one indexing operation.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from motet.adapters.addresses import COLUMNS, Addresses, Int32
from motet.adapters.arena import Arena
from motet.adapters.base import Target
from motet.adapters.effects import Lowered
from motet.adapters.errors import ArenaFullError
from motet.adapters.packed import Packed, operands_of, pack, touched
from motet.adapters.version import Slot


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Consecutive operands that lie end to end in the arena.

    Attributes:
        first, stop: numbers of the operands, half open.
        source, start, units: first unit in the packed form and in the arena, and how many.
    """

    first: int
    stop: int
    source: int
    start: int
    units: int


class Residency:
    """The resident set.

    Note: `place` and `release` may be called from any thread. A slot's addresses never change while it is held, so
    readers that hold a lease on the slot need no lock. Nothing is copied under the lock.
    """

    def __init__(self, targets: Mapping[str, Target], arena: Arena) -> None:
        self._targets = targets
        self.arena = arena
        self._lock = threading.Lock()
        self._tables = np.zeros((len(COLUMNS), len(targets), 0), dtype=np.int32)
        self._vacant: list[Slot] = []
        self._pieces: dict[Slot, list[_Piece]] = {}
        self._overlays: dict[Slot, dict[str, torch.Tensor]] = {}
        self._packed: dict[Slot, _Facts] = {}
        self.epoch = 0
        """Changes whenever a slot gains or loses its addresses."""

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self.arena.allocator.used * self.arena.unit_bytes

    @property
    def budget_bytes(self) -> int:
        return self.arena.allocator.capacity * self.arena.unit_bytes

    def bytes_needed(self, lowered: Lowered) -> int:
        """Bytes the adapter takes in the arena."""
        return sum(map(self.arena.units_of, operands_of(lowered))) * self.arena.unit_bytes

    def pack(self, lowered: Lowered) -> Packed:
        """The adapter as `place_packed` takes it."""
        return pack(lowered, self._targets, self.arena.unit, self.arena.units_NU.dtype)

    def overlays(self, slot: Slot) -> Mapping[str, torch.Tensor]:
        """Parameter → its replacement, a view of the arena unless it was placed beside it."""
        return self._overlays[slot]

    def touched(self, slot: Slot) -> frozenset[str]:
        """Paths of the modules that the adapter changes in any way."""
        return self._packed[slot].touched

    def vocabulary(self, slot: Slot) -> int | None:
        """One past the largest token id that the adapter serves; None where that is the base's."""
        return self._packed[slot].vocabulary

    def groups(self, slot: Slot) -> Int32:
        """[C, R] which factor of a gate multiplies each rank row of each target; R is the adapter's largest rank."""
        return self._packed[slot].groups_CR

    def placing(self, slot: Slot) -> int:
        """A number of its own for each time that a slot was filled: with an equal one, addresses are still right."""
        return self._packed[slot].placing

    def place(self, lowered: Lowered) -> Slot:
        """Pack the adapter and copy it into the arena.

        Raises:
            ArenaFullError: it does not fit; nothing was changed.
        """
        return self.place_packed(self.pack(lowered))

    def place_packed(self, packed: Packed) -> Slot:
        """Copy an adapter into the arena.

        Raises:
            ArenaFullError: it does not fit; nothing was changed.
        """
        return self._place(packed, {})

    def place_beside(self, lowered: Lowered) -> Slot:
        """As `place`, but replaced parameters become tensors of their own, which no budget counts: not to serve them.

        Raises:
            ArenaFullError: there is no memory for them; nothing was changed.
        """
        beside = {id(values): self._beside(values) for values in lowered.overlays.values()}
        packed = replace(self.pack(replace(lowered, overlays={})), touched=touched(lowered))
        return self._place(packed, {path: beside[id(values)] for path, values in lowered.overlays.items()})

    def release(self, slot: Slot) -> None:
        """Free the slot; the caller guarantees that no step uses it."""
        with self._lock:
            del self._overlays[slot], self._packed[slot]
            self._free(self._pieces.pop(slot))
            self._vacant.append(slot)
            self.epoch += 1

    def addresses(self, slots: list[Slot]) -> Addresses:
        """Addresses of the operands of these slots, one column per slot."""
        columns = self._tables[:, :, slots]
        return Addresses(*columns)

    def _place(self, packed: Packed, beside: Mapping[str, torch.Tensor]) -> Slot:
        with self._lock:
            pieces = self._allocate(packed)
        try:
            for piece in pieces:
                self.arena.copy(piece.start, packed.units_NU[piece.source : piece.source + piece.units])
        except BaseException:
            with self._lock:
                self._free(pieces)
            raise
        column_LC, overlays = self._located(packed, pieces)
        with self._lock:
            self.epoch += 1
            slot = self._vacant.pop() if self._vacant else Slot(len(self._pieces))
            self._pieces[slot], self._overlays[slot] = pieces, {**overlays, **beside}
            self._packed[slot] = _Facts(packed.touched, packed.vocabulary, packed.groups_CR, self.epoch)
            if slot >= self._tables.shape[2]:
                grown = np.zeros((*self._tables.shape[:2], max(8, 2 * self._tables.shape[2])), dtype=np.int32)
                grown[:, :, : self._tables.shape[2]] = self._tables
                self._tables = grown
            self._tables[:, :, slot] = column_LC
        return slot

    def _allocate(self, packed: Packed) -> list[_Piece]:
        """Ranges for all operands, as few as gaps allow; the caller holds the lock."""
        start_K = [*packed.start_K.tolist(), len(packed.units_NU)]
        pieces: list[_Piece] = []
        todo = [(0, len(start_K) - 1)] if len(start_K) > 1 else []
        while todo:
            first, stop = todo.pop()
            units = start_K[stop] - start_K[first]
            start = self.arena.allocator.allocate(units)
            if start is not None:
                pieces.append(_Piece(first, stop, start_K[first], start, units))
            elif stop - first > 1:
                middle = (first + stop) // 2
                todo += [(middle, stop), (first, middle)]
            else:
                self._free(pieces)
                raise self._full(packed)
        return pieces

    def _located(self, packed: Packed, pieces: list[_Piece]) -> tuple[Int32, dict[str, torch.Tensor]]:
        """The column of the tables, and views of the replaced parameters."""
        start_K = packed.start_K.copy()
        for piece in pieces:
            start_K[piece.first : piece.stop] += piece.start - piece.source
        column_LC = packed.counts_LC.copy()
        column_LC[packed.cell_K2[:, 0], packed.cell_K2[:, 1]] = start_K[: len(packed.cell_K2)]
        overlays = {
            path: self.arena.view(int(start_K[number]), torch.Size(shape))
            for path, (number, shape) in packed.overlays.items()
        }
        return column_LC, overlays

    def _free(self, pieces: list[_Piece]) -> None:
        for piece in pieces:
            self.arena.allocator.free(piece.start)

    def _beside(self, values: torch.Tensor) -> torch.Tensor:
        try:
            return values.to(self.arena.units_NU.device, self.arena.units_NU.dtype)
        except torch.OutOfMemoryError as error:
            raise ArenaFullError(
                f"{values.nbytes:,} bytes are not free beside the adapter memory, where the exact form lies while a "
                "lossy one is compared with it; lower --kv-memory or --adapter-memory"
            ) from error

    def _full(self, packed: Packed) -> ArenaFullError:
        used = self.arena.allocator.used * self.arena.unit_bytes
        return ArenaFullError(
            f"the adapter needs {packed.units_NU.nbytes:,} bytes; {used:,} of the {self.budget_bytes:,} bytes of "
            "adapter memory are taken, and no gap is left for one of its operands; unload an adapter or raise "
            "--adapter-memory"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Facts:
    """What is known of a slot beside its addresses."""

    touched: frozenset[str]
    vocabulary: int | None
    groups_CR: Int32
    placing: int
