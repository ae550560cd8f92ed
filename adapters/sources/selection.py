"""Which files of a place belong to an adapter, and how large each may be.

Must not know: where they come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from motet.adapters.bounded import Limits
from motet.adapters.checkpoint import PICKLES as MODEL_PICKLES
from motet.adapters.errors import UnsafeFormatError
from motet.adapters.source import INITIAL_FOLDERS, PICKLES
from motet.adapters.tokens import LIMITS as TOKENIZER_BYTES

DEEPEST = 2
"""Levels: the folder, and that of an initial adapter."""
MOST_FILES = 10_000
"""Files of a place that is searched for an adapter."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.(?:safetensors|json|jinja)")


def belongs(name: str) -> bool:
    """Whether a file may be a part of an adapter; such a name leaves no folder."""
    folder, _, file = name.rpartition("/")
    return (not folder or folder in INITIAL_FOLDERS) and _NAME.fullmatch(file) is not None


def most_bytes(name: str, limits: Limits) -> int:
    """The most bytes of a file of that name."""
    if name.endswith(".safetensors"):
        return limits.weights_bytes
    return TOKENIZER_BYTES.get(name.rpartition("/")[2], limits.header_bytes)


def require_no_pickle(names: Iterable[str]) -> None:
    """Refuse a place whose weights are there as a pickle only.

    Raises:
        UnsafeFormatError: they are.
    """
    known = set(names)
    pickles = sorted(known & {*PICKLES, *MODEL_PICKLES})
    if pickles and not any(name.endswith(".safetensors") for name in known):
        raise UnsafeFormatError(
            f"{pickles[0]} is a pickle, which can run code when it is read; save the adapter with "
            "safe_serialization=True"
        )
