"""Where a version comes from, in the words of whoever published it: enough to make the same version again.

Must not know: names, versions, what is in a folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Found:
    """An origin as folders of this machine.

    Attributes:
        origin: what finds exactly this again, where the one that was asked for may come to mean something else.
    """

    folder: Path
    declared: Declared
    origin: Origin


Resolve = Callable[[Origin], AbstractContextManager[Found]]
"""Finds the folders of an origin, which stay until the block is left.

Raises AdapterError when one is not there or may not be read, or the lossy form does not exist.
"""


def folders(roots: Sequence[Path]) -> Resolve:
    """Folders below the adapter roots; anywhere, where the origin is trusted."""

    @contextlib.contextmanager
    def resolve(origin: Origin) -> Iterator[Found]:
        yield placed(origin, lambda path: (confine(Path(path), roots), path))

    return resolve


def placed(origin: Origin, place: Callable[[str], tuple[Path, str]]) -> Found:
    """The folders of an origin.

    Args:
        place: finds the folder of a source that is not trusted, and the source that finds exactly this again.

    Raises:
        ConfigError: the lossy form does not exist.
    """
    form = None if origin.approximate is None else LossyForm.parse(origin.approximate)
    (source, pinned), (initial, pinned_initial), (residual, pinned_residual) = (
        (None, None) if path is None else (Path(path), path) if origin.trusted else place(path)
        for path in (origin.source, origin.initial, origin.residual)
    )
    assert source is not None
    assert pinned is not None
    again = replace(origin, source=pinned, initial=pinned_initial, residual=pinned_residual)
    return Found(source, Declared(initial, residual, origin.trained_on_base, form), again)
