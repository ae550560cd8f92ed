"""What a checkpoint says of single tokens: new rows of the embedding and of the output head, as the cheapest change.

Must not know: configurations, names of tensors. The embedding is the linear W^T over one-hot rows, so a changed token
is a column of it; of the head it is a row. Rows beyond the base's vocabulary are those of added tokens: the base has
zeros.

Shapes: V tokens of the base, N ≥ V of the checkpoint, D width, S changed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import ColumnSparse, RowSparse, TargetEffects
from motet.adapters.errors import ConfigError, UnsupportedError, listed
from motet.adapters.methods.base_weights import alike
from motet.adapters.tokens import TOKENIZER_FILE, OwnTokenizer

LARGEST_SHARE = 0.5
"""Of the tokens; above it a sparse change is dearer than the dense one."""

PADDED_TO = 8
"""Training code pads the vocabulary to a multiple of this, or of a multiple of it."""

Ends = Mapping[str, torch.Tensor]
"""Path of the embedding or the head → its new weight [N, D], in the checkpoint's dtype."""


def end_paths(base: BaseModel) -> list[str]:
    """Paths of the embedding and the head, targets or not."""
    return [*(path for path, target in base.targets.items() if target.kind is not Kind.LINEAR), *base.no_targets]


def meant_rows(
    path: str, values_ND: torch.Tensor, base: BaseModel, own: OwnTokenizer | None, *, may_pad: bool = False
) -> torch.Tensor:
    """The rows of a checkpoint's embedding or head that some token has: rows that only pad are left out.

    Args:
        own: the adapter's tokenizer, where it is not the base's.
        may_pad: whether rows without a tokenizer are padding where they fill up to a multiple of PADDED_TO.

    Raises:
        ConfigError: no tokenizer says what the rows beyond the base's mean.
    """
    rows, known = len(values_ND), len(base.parameter(f"{path}.weight"))
    if own is not None:
        return values_ND[: max(known, min(rows, own.size))]
    if rows > known and not (may_pad and rows % PADDED_TO == 0):
        raise ConfigError(
            f"{path!r} has {rows:,} rows, {rows - known:,} more than {base.name!r} has tokens, and no tokenizer says "
            f"what they mean: put {TOKENIZER_FILE} and tokenizer_config.json, as save_pretrained writes them, beside "
            "the adapter"
        )
    return values_ND[:known]


def served_vocabulary(ends: Ends, base: BaseModel, own: OwnTokenizer | None) -> int | None:
    """One past the largest token id that is served, of an adapter with a tokenizer of its own; else None.

    Args:
        ends: those the adapter has weights of, each cut to its meant rows.

    Raises:
        UnsupportedError: the base cannot take tokens that are added.
        ConfigError: the embedding and the head do not have the same tokens.
    """
    if own is None:
        return None
    paths = end_paths(base)
    known = min((len(base.parameter(f"{path}.weight")) for path in paths), default=0)
    rows = {path: len(ends[path]) if path in ends else known for path in paths}
    if (vocabulary := max(rows.values(), default=0)) <= known:
        return known
    if base.no_targets:
        path, reason = next(iter(base.no_targets.items()))
        raise UnsupportedError(f"tokens cannot be added to {path!r} of {base.name!r}: {reason}")
    head = base.of_kind(Kind.HEAD)
    if head is None or head.has_bias or base.of_kind(Kind.EMBEDDING) is None:
        raise UnsupportedError(f"tokens cannot be added to {base.name!r}: its head or embedding is of another kind")
    if fewer := [path for path, count in rows.items() if count < vocabulary]:
        raise ConfigError(
            f"the adapter adds tokens up to {vocabulary - 1}, but has no rows for all of them in {listed(fewer, 1)}; "
            "save it again with save_embedding_layers=True"
        )
    return vocabulary


def lower_ends(ends: Ends, base: BaseModel) -> tuple[dict[str, TargetEffects], dict[str, torch.Tensor]]:
    """Changes of few tokens as sparse effects, others as overlays; nothing where nothing differs.

    Returns:
        Path → effects, and parameter → its replacement; two that are one tensor in `ends` stay one.
    """
    effects: dict[str, TargetEffects] = {}
    overlays: dict[str, torch.Tensor] = {}
    found: dict[int, _Change] = {}
    for path, values_ND in ends.items():
        name = f"{path}.weight"
        if id(values_ND) not in found or not base.is_tied(name):
            found[id(values_ND)] = _changed(values_ND, base.parameter(name))
        index_S, delta_SD, dense_ND = found[id(values_ND)]
        if len(index_S) == 0:
            continue
        if path in base.targets and delta_SD is not None:
            effects[path] = _sparse(base.targets[path], index_S, delta_SD)
        else:
            overlays[name] = dense_ND
    return effects, overlays


_Change = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
"""Changed tokens [S]; their difference [S, D], where they are few; the whole [N, D] float32."""


def _changed(values_ND: torch.Tensor, own_VD: torch.Tensor) -> _Change:
    known = len(own_VD)
    one_VD, other_VD = alike(values_ND[:known], own_VD)
    old_S = (one_VD != other_VD).any(1).nonzero()[:, 0]
    index_S = torch.cat([old_S, torch.arange(known, len(values_ND))])
    dense_ND = values_ND.float().contiguous()
    if len(old_S) > LARGEST_SHARE * known:
        return index_S, None, dense_ND
    delta_SD = dense_ND[index_S]
    delta_SD[: len(old_S)] -= own_VD[old_S]
    return index_S, delta_SD, dense_ND


def _sparse(target: Target, index_S: torch.Tensor, delta_SD: torch.Tensor) -> TargetEffects:
    if target.kind is Kind.EMBEDDING:
        return TargetEffects(columns=ColumnSparse(index_S, delta_SD.T.contiguous()))
    return TargetEffects(rows=RowSparse(index_S, delta_SD))
