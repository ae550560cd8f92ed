"""Recovers the order in which a checkpoint keeps rows of the base: training that reorders channels leaves no record.

Must not know: models, files. A row is recognised by its bytes.
"""

from __future__ import annotations

import torch

from motet.adapters.errors import ConfigError


def order_of(rows_MK: torch.Tensor, base_MK: torch.Tensor, what: str) -> torch.Tensor | None:
    """For each row of the checkpoint, its place in the base: rows[i] = base[order[i]], bit for bit.

    Args:
        rows_MK, base_MK: of one shape and dtype.
        what: for the error message.

    Returns:
        [M] int64; None when rows were changed and those that were not stand in their places, so that there is no
        order to recover.

    Raises:
        ConfigError: rows were moved, and some cannot be found, or two of the base are equal.
    """
    here = (rows_MK == base_MK).all(1)
    if bool(here.all()):
        return torch.arange(len(rows_MK))
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(_bytes(base_MK)):
        places.setdefault(row, []).append(place)
    found = [[i] if here[i] else places.get(row, []) for i, row in enumerate(_bytes(rows_MK))]
    if all(not candidates or bool(here[i]) for i, candidates in enumerate(found)):
        return None
    if unclear := [i for i, candidates in enumerate(found) if len(candidates) != 1]:
        raise ConfigError(
            f"{what} are reordered, but {len(unclear)} of {len(found)} cannot be recognised among the base's (first "
            f"row {unclear[0]}): they were changed as well, or this is another base model"
        )
    order = [candidates[0] for candidates in found]
    if len(set(order)) != len(order):
        raise ConfigError(f"{what} hold a row of the base twice: this is no reordering of the base model")
    return torch.tensor(order)


def _bytes(rows_MK: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows_MK.contiguous().view(torch.uint8).reshape(len(rows_MK), -1).numpy()]
