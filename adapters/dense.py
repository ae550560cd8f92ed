"""The dense merge of one target's effects: the weight and bias of a plain linear that computes the same.

Must not know: files, devices, the serving path. It is the reference that the serving path is compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from motet.adapters import signs
from motet.adapters.effects import TargetEffects


def merge(
    effects: TargetEffects, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fold the effects into a linear.

    Semantics: ``W' = (1 + d) ⊙ (W + B A + sparse + α sign)``, row by row, where sparse adds V to the columns or rows
    idx; ``c' = c + b``.

    Tokens that the adapter adds are rows or columns beyond those of W, which has zeros there: W' has them all, and the
    other effects end where W ends.

    Args:
        weight_OI: W [O, I] float32 on the CPU; not changed.
        bias_O: c [O] float32 on the CPU; None where the linear has none.

    Returns:
        W' [O, I] and c' [O], float32; c' is None where there is neither c nor b.
    """
    merged_OI = _widened(effects, weight_OI).clone()
    if effects.low_rank is not None:
        change_OI = effects.low_rank.b_OR @ effects.low_rank.a_RI
        merged_OI[: change_OI.shape[0], : change_OI.shape[1]] += change_OI
    if effects.columns is not None:
        merged_OI[:, effects.columns.index_S] += effects.columns.v_OS
    if effects.rows is not None:
        merged_OI[effects.rows.index_S] += effects.rows.v_SI
    if effects.sign is not None:
        merged_OI += effects.sign.alpha_1 * signs.unpack(effects.sign.word_OP, weight_OI.shape[1])
    if effects.scale is not None:
        merged_OI[: len(effects.scale.delta_O)] *= (1 + effects.scale.delta_O)[:, None]
    if effects.bias is None:
        return merged_OI, bias_O
    return merged_OI, effects.bias.bias_O if bias_O is None else bias_O + effects.bias.bias_O


def _widened(effects: TargetEffects, weight_OI: torch.Tensor) -> torch.Tensor:
    """W with zeros where a sparse change lies beyond it."""
    rows, columns = weight_OI.shape
    if effects.rows is not None:
        rows = max(rows, int(effects.rows.index_S[-1]) + 1)
    if effects.columns is not None:
        columns = max(columns, int(effects.columns.index_S[-1]) + 1)
    return F.pad(weight_OI, (0, columns - weight_OI.shape[1], 0, rows - weight_OI.shape[0]))
