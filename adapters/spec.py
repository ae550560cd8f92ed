"""What people say about an adapter's folder that its files do not, and in which form they want it.

Must not know: how files are read, methods.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from motet.adapters.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LossyForm:
    """A cheaper form of weights that are replaced as a whole, for those who ask for it.

    Attributes:
        rank: of the low-rank pairs that stand for their changes, "svd-R"; None is one bit a weight, "1bit".
    """

    rank: int | None = None

    def __str__(self) -> str:
        return "1bit" if self.rank is None else f"svd-{self.rank}"

    @classmethod
    def parse(cls, text: str) -> LossyForm:
        """The form of this name.

        Raises:
            ConfigError: there is none.
        """
        if text == "1bit":
            return cls()
        if match := re.fullmatch(r"svd-([1-9][0-9]{0,4})", text):
            return cls(int(match[1]))
        raise ConfigError(
            f"approximate {text!r} is no form that is served; write svd-R for pairs of rank R, as svd-16, or 1bit"
        )


@dataclass(frozen=True, slots=True)
class Declared:
    """Declarations that travel with a load.

    Attributes:
        initial: folder of the adapter as it was before training; an already confined path.
        residual: folder of the model the adapter was trained on, where that is not the base; likewise confined.
        trained_on_base: the pair is the whole change of the base, however much it looks trained on a residual model.
        approximate: the lossy form to serve instead of replaced weights; None serves what the folder says.
    """

    initial: Path | None = None
    residual: Path | None = None
    trained_on_base: bool = False
    approximate: LossyForm | None = None


NOTHING_DECLARED = Declared()
