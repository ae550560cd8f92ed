"""The dense merge of one target's effects: the weight and bias of a plain linear that computes the same.

Must not know: files, devices, the serving path. It is the reference that the serving path is compared with.
"""

from __future__ import annotations

import torch

from motet.adapters.effects import TargetEffects


def merge(
    effects: TargetEffects, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fold the effects into a linear.

    Semantics: ``W' = (1 + d) ⊙ (W + B A + sparse)``, row by row, where sparse adds V to the columns or rows idx;
    ``c' = c + b``.

    Args:
        weight_OI: W [O, I] float32 on the CPU; not changed.
        bias_O: c [O] float32 on the CPU; None where the linear has none.

    Returns:
        W' [O, I] and c' [O], float32; c' is None where there is neither c nor b.
    """
    merged_OI = weight_OI.clone()
    if effects.low_rank is not None:
        merged_OI += effects.low_rank.b_OR @ effects.low_rank.a_RI
    if effects.columns is not None:
        merged_OI[:, effects.columns.index_S] += effects.columns.v_OS
    if effects.rows is not None:
        merged_OI[effects.rows.index_S] += effects.rows.v_SI
    if effects.scale is not None:
        merged_OI *= (1 + effects.scale.delta_O)[:, None]
    if effects.bias is None:
        return merged_OI, bias_O
    return merged_OI, effects.bias.bias_O if bias_O is None else bias_O + effects.bias.bias_O
