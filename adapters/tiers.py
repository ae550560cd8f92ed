"""Which versions are on the device: the memory that the engine asks before it runs a generation.

Must not know: requests, names' meaning, steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Tiers:
    """Every published version is on the device, and stays there."""

    def hold(self, leases: Sequence[Any]) -> bool:
        return True

    def let_go(self, leases: Sequence[Any]) -> None:
        pass

    def want(self, leases: Sequence[Any]) -> None:
        pass

    def failure(self, lease: Any) -> str | None:
        return None
