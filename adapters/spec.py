"""What people say about an adapter's folder that its files do not.

Must not know: how files are read, methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Declared:
    """Declarations that travel with a load.

    Attributes:
        initial: folder of the adapter as it was before training; an already confined path.
        residual: folder of the model the adapter was trained on, where that is not the base; likewise confined.
        trained_on_base: the pair is the whole change of the base, however much it looks trained on a residual model.
    """

    initial: Path | None = None
    residual: Path | None = None
    trained_on_base: bool = False


NOTHING_DECLARED = Declared()
