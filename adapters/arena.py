"""One device tensor that holds every resident adapter's operands, byte-exact, addressed by integers.

Must not know: adapters, effects, targets. The tensor is flat: [N units, U elements]; a unit is the greatest common
divisor of the base's target widths, so that any row of any target is a whole number of units, one budget serves all
widths, and nothing is padded to a largest rank (docs/adr/0002).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from typing import Any

import torch

from motet.adapters.packed import units_of


class UnitAllocator:
    """Hands out contiguous ranges of units, first fit, merging what is freed with its neighbours.

    Note: not thread-safe; `Residency` holds its lock around every call.
    """

    def __init__(self, units: int) -> None:
        self._capacity = units
        self._free_start = [0] if units else []
        self._free_stop = [units] if units else []
        self._taken: dict[int, int] = {}
        self._used = 0

    @property
    def capacity(self) -> int:
        """Units in total."""
        return self._capacity

    @property
    def used(self) -> int:
        """Units handed out."""
        return self._used

    def allocate(self, units: int) -> int | None:
        """First unit of a contiguous range, or None when no gap is large enough."""
        assert units > 0
        for i, (start, stop) in enumerate(zip(self._free_start, self._free_stop, strict=True)):
            if stop - start < units:
                continue
            if stop - start == units:
                del self._free_start[i], self._free_stop[i]
            else:
                self._free_start[i] = start + units
            self._taken[start] = units
            self._used += units
            return start
        return None

    def free(self, start: int) -> None:
        """Give back a range by its first unit."""
        units = self._taken.pop(start)
        self._used -= units
        stop = start + units
        i = bisect.bisect_left(self._free_start, start)
        if i < len(self._free_start) and self._free_start[i] == stop:
            stop = self._free_stop[i]
            del self._free_start[i], self._free_stop[i]
        if i > 0 and self._free_stop[i - 1] == start:
            self._free_stop[i - 1] = stop
        else:
            self._free_start.insert(i, start)
            self._free_stop.insert(i, stop)


class Arena:
    """The tensor and its allocator.

    Note: on a CPU the memory is reserved at once but committed by the operating system as it is first written.
    """

    def __init__(self, widths: Iterable[int], budget_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.unit = math.gcd(*widths)
        self.unit_bytes = self.unit * dtype.itemsize
        self.allocator = UnitAllocator(budget_bytes // self.unit_bytes)
        self.units_NU = torch.empty((self.allocator.capacity, self.unit), dtype=dtype, device=device)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def units_of(self, operand: torch.Tensor) -> int:
        """Units that an operand takes."""
        return units_of(operand, self.unit, self.units_NU.dtype)

    def copy(self, start: int, units_NU: torch.Tensor) -> None:
        """Copy units to those from `start` on; returns once they are there."""
        kept_NU = self.units_NU[start : start + len(units_NU)]
        if self._stream is None:
            kept_NU.copy_(units_NU)
            return
        # Steps that were queued before may still read what lay here; those that come later do not wait for the copy.
        self._stream.wait_stream(torch.cuda.default_stream(kept_NU.device))
        with torch.cuda.stream(self._stream):
            kept_NU.copy_(units_NU, non_blocking=True)
        self._stream.synchronize()

    def index(self, start: int, count: int) -> torch.Tensor:
        """The int32 indices that begin at a unit; not copied."""
        return self.units_NU[start:].view(-1).view(torch.int32)[:count]

    def view(self, start: int, shape: torch.Size) -> torch.Tensor:
        """The values of this shape that begin at a unit; not copied."""
        return self.units_NU[start:].view(-1)[: shape.numel()].view(shape)
