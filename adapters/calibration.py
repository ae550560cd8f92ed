"""How well calibrated a head was found to be: what its file says of it, checked.

Must not know: heads, how calibration is done. Every score is of examples that did not choose the temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from motet.adapters.errors import ConfigError
from motet.adapters.ranges import Range, require_numbers

LONGEST_SET = 256
LARGEST_NUMBER = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Of a head with its temperature.

    Attributes:
        set: what people call the examples.
        n: how many examples the scores are of; the threshold was fitted on them too.
        ece: expected calibration error in 15 bins.
        nll: nats.
        brier: from 0 to 2.
        miss_rate: that the threshold was fitted for: of new requests at most this share is abstained from. None where
            none was fitted.
    """

    set: str
    n: int
    ece: float
    nll: float
    brier: float
    miss_rate: float | None


_RANGES: Mapping[str, Range] = {
    "n": Range(int, 1, LARGEST_NUMBER),
    "ece": Range(object, 0, 1),
    "nll": Range(object, 0, LARGEST_NUMBER),
    "brier": Range(object, 0, 2),
    "miss_rate": Range(object, 0, 1, optional=True),
}
_KEYS = ("set", *_RANGES)


def parse(place: str, value: object) -> Calibration | None:
    """The object of a file, or null.

    Args:
        place: of the object, for messages.

    Raises:
        ConfigError: it is neither.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != set(_KEYS):
        said = f"has the keys {', '.join(map(str, value))}" if isinstance(value, dict) else f"is {value!r}"
        raise ConfigError(f"{place} {said}; it must be null or have the keys {', '.join(_KEYS)}")
    return checked(place, Calibration(**value))


def checked(place: str, calibration: Calibration) -> Calibration:
    """The calibration itself, once every value is right.

    Raises:
        ConfigError: one is not.
    """
    require_set(place, calibration.set)
    require_numbers(place, calibration, _RANGES)
    return calibration


def require_set(place: str, name: object) -> None:
    """Refuse a name that a file could not keep.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_SET or not name.isprintable():
        raise ConfigError(f"{place}: set {name!r} is no string of 1 to {LONGEST_SET} printable characters")


def dumped(calibration: Calibration | None) -> dict[str, Any] | None:
    """The object that `parse` reads."""
    return None if calibration is None else asdict(calibration)
