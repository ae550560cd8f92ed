"""Which versions an answer is of, as every response says it.

Must not know: how they were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from motet.adapters.version import AdapterVersion


def header(versions: Sequence[AdapterVersion]) -> dict[str, str]:
    """`X-Motet-Adapter`: every version with its whole digest; nothing for the base alone."""
    return {"X-Motet-Adapter": ", ".join(f"{one.name}@{one.digest}" for one in versions)} if versions else {}


def fields(versions: Sequence[AdapterVersion]) -> dict[str, Any]:
    """`adapter`, or `adapters` of a mixture, beside `model`; nothing for the base alone."""
    said = [{"name": one.name, "version": one.digest} for one in versions]
    return {} if not said else {"adapter": said[0]} if len(said) == 1 else {"adapters": said}
