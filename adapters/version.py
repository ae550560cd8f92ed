"""The identity of an adapter: a name pointing at content.

Must not know: torch, files, requests. The engine imports this module and nothing else from motet.adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

Digest = NewType("Digest", str)
"""Lower-case hexadecimal SHA-256 of an adapter's files."""


Slot = NewType("Slot", int)
"""Row of the address tables that one resident version owns."""


@dataclass(frozen=True, slots=True, order=True)
class AdapterVersion:
    """One content of one name. Two versions are the same exactly when both fields are equal."""

    name: str
    digest: Digest

    @property
    def short(self) -> str:
        """Name and the first twelve hexadecimal digits, for people."""
        return f"{self.name}@{self.digest[:12]}"
