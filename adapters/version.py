"""The identity of an adapter: a name pointing at content.

Must not know: torch, files, requests. The engine imports this module and nothing else from motet.adapters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

Digest = NewType("Digest", str)
"""Lower-case hexadecimal SHA-256 of an adapter's files."""


Slot = NewType("Slot", int)
"""Row of the address tables that one resident version owns."""

_EXACT = re.compile(r"(.+)@([0-9a-f]{12,64})")


@dataclass(frozen=True, slots=True, order=True)
class AdapterVersion:
    """One content of one name. Two versions are the same exactly when both fields are equal."""

    name: str
    digest: Digest

    @property
    def short(self) -> str:
        """Name and the first twelve hexadecimal digits, for people."""
        return f"{self.name}@{self.digest[:12]}"

    def answers_to(self, asked: str) -> bool:
        """Whether `asked` is the name, or the name, @ and at least the first twelve digits of the digest."""
        exact = exactly(asked)
        return asked == self.name or (exact is not None and exact[0] == self.name and self.digest.startswith(exact[1]))


def exactly(asked: str) -> tuple[str, str] | None:
    """Name and first digits of the version that `name@digest` asks for; None where it names no version."""
    match = _EXACT.fullmatch(asked)
    return None if match is None else (match[1], match[2])
