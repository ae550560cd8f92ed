"""What names mean, by the rules of docs/architecture.md and nothing else: what the catalogue must agree with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field


@dataclass
class Names:
    """Name → digests, what it means first, then what it meant before, the latest first."""

    kept: int
    versions: dict[str, list[str]] = field(default_factory=dict)

    def publish(self, name: str, digest: str) -> None:
        before = [one for one in self.versions.get(name, []) if one != digest]
        self.versions[name] = [digest, *before][: self.kept]

    def remove(self, name: str) -> None:
        del self.versions[name]

    def copy(self) -> Names:
        return copy.deepcopy(self)
