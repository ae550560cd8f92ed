"""Checks the header of a safetensors file while the file arrives, before its tensors do.

Must not know: where it comes from, where it goes.
"""

from __future__ import annotations

from motet.adapters.bounded import Limits, check_header, header_size
from motet.adapters.errors import CorruptSourceError


class HeaderWatch:
    """Sees the bytes of one file in their order; of other files than .safetensors it sees nothing.

    Args:
        size: bytes of the whole file, where that is known.
    """

    def __init__(self, name: str, size: int | None, limits: Limits) -> None:
        self._name, self._size, self._limits = name, size, limits
        self._start = bytearray()
        self._done = not name.endswith(".safetensors")

    def feed(self, chunk: bytes) -> None:
        """The next bytes.

        Raises:
            CorruptSourceError: the header is impossible, or announces more than the limits.
        """
        if self._done:
            return
        self._start += chunk
        if len(self._start) < 8:
            return
        needed = 8 + header_size(self._name, bytes(self._start[:8]), self._size, self._limits)
        if len(self._start) >= needed:
            check_header(self._name, bytes(self._start[:needed]), self._size, self._limits)
            self._start.clear()
            self._done = True

    def finish(self) -> None:
        """No more bytes follow.

        Raises:
            CorruptSourceError: the header is not whole.
        """
        if not self._done:
            raise CorruptSourceError(f"{self._name} ends within its header; it is truncated: copy it again")
