"""Which names adapters may have.

Must not know: what they mean.
"""

from __future__ import annotations

import re

from motet.adapters.errors import InvalidNameError

_ALLOWED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_RESERVED = re.compile(r".*/(lowered|rollback|merges(/.*)?)")
"""Below /v1/adapters these would be read as something else."""


def check_name(name: str, base: str) -> None:
    """Refuse a name that cannot be published.

    Args:
        base: the base model's.

    Raises:
        InvalidNameError: it cannot.
    """
    if not _ALLOWED.fullmatch(name):
        raise InvalidNameError(
            f"adapter name {name!r} is not allowed; use up to 128 letters, digits and . _ : / @ + -, and begin with a "
            "letter or digit"
        )
    if _RESERVED.fullmatch(name):
        raise InvalidNameError(
            f"adapter name {name!r} is not allowed: /lowered, /rollback and /merges end addresses of other things; "
            "choose another"
        )
    if name == base:
        raise InvalidNameError(f"adapter name {name!r} is the base model's name; choose another")
