"""Where a version comes from, in the words of whoever published it: enough to make the same version again.

Must not know: names, versions, what is in a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from motet.adapters.source import confine
from motet.adapters.spec import Declared, LossyForm


@dataclass(frozen=True, slots=True)
class Origin:
    """A source and its declarations, as text that outlives the process.

    Attributes:
        source, initial, residual: where the adapter is, and what `Declared` says of it.
        approximate: the name of a lossy form.
        trusted: whoever started the server named these places, so they need not be below an adapter root.
    """

    source: str
    initial: str | None = None
    residual: str | None = None
    trained_on_base: bool = False
    approximate: str | None = None
    trusted: bool = False

    @classmethod
    def of(cls, folder: Path, declared: Declared) -> Origin:
        """Of folders of this machine, wherever the next process starts."""
        initial, residual = (
            None if part is None else str(part.absolute()) for part in (declared.initial, declared.residual)
        )
        form = None if declared.approximate is None else str(declared.approximate)
        return cls(str(folder.absolute()), initial, residual, declared.trained_on_base, form, trusted=True)

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Origin:
        """What `dump` wrote."""
        return cls(**json.loads(text))


Resolve = Callable[[Origin], tuple[Path, Declared]]
"""Finds the folders of an origin.

Raises AdapterError when one is not there or may not be read, or the lossy form does not exist.
"""


def folders(roots: Sequence[Path]) -> Resolve:
    """Folders below the adapter roots; anywhere, where the origin is trusted."""

    def resolve(origin: Origin) -> tuple[Path, Declared]:
        source, initial, residual = (
            None if path is None else Path(path) if origin.trusted else confine(Path(path), roots)
            for path in (origin.source, origin.initial, origin.residual)
        )
        assert source is not None
        form = None if origin.approximate is None else LossyForm.parse(origin.approximate)
        return source, Declared(initial, residual, origin.trained_on_base, form)

    return resolve
