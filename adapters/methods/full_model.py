"""A whole fine-tuned model: what differs from the base, bit by bit, as the cheapest effects that say it exactly.

S²FT trains some channels of the feed-forward layers and some attention heads, and leaves its checkpoint with channels
and heads reordered. The order is recovered from what it does not train: the rows of gate_proj, the heads of q_proj and
k_proj. Then a change of few columns (o_proj, down_proj) or few rows (v_proj, up_proj) remains.

Source: https://arxiv.org/abs/2412.06289 and the fused checkpoints that its authors' code writes.
"""

from __future__ import annotations

import torch

from motet.adapters.base import BaseModel
from motet.adapters.effects import ColumnSparse, Lowered, RowSparse, TargetEffects
from motet.adapters.errors import ConfigError, UnmatchedTensorError, UnsupportedError
from motet.adapters.methods import orders
from motet.adapters.methods.base_weights import COMPUTED, TIED, alike, stored
from motet.adapters.source import AdapterFiles, Layout

NAME = "full-model"

LARGEST_SHARE = 0.5
"""Of the columns or rows; above it a sparse effect is dearer than the dense change."""


def claims(files: AdapterFiles) -> bool:
    """Whether it is a model directory."""
    return files.layout is Layout.MODEL


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower the directory's difference from the base.

    Raises:
        UnsupportedError: more differs than sparse effects can say.
        FormatError: the directory is not a fine-tune of this base.
    """
    files.require_no_start(NAME)
    order = orders.recover(files, base)
    effects: dict[str, TargetEffects] = {}
    for name, target in base.targets.items():
        values_OI = stored(files, f"{name}.weight", (target.out_width, target.in_width))
        effect = _difference(order.undo(name, values_OI), base.weight(name), name)
        if effect is not None:
            effects[name] = effect
    _require_rest(files, base, order)
    if not effects:
        raise ConfigError(f"the directory holds the weights of {base.name!r} itself: nothing was trained")
    reordered = bool(order.rows or order.columns)
    return Lowered(
        method="s2ft",
        form="model directory, channels and heads reordered" if reordered else "model directory",
        scaling="none",
        effects=effects,
        expected_targets=len(effects),
    )


def _difference(values_OI: torch.Tensor, own_OI: torch.Tensor, name: str) -> TargetEffects | None:
    """The cheaper of a column-sparse and a row-sparse change; None where nothing was trained."""
    one_OI, other_OI = alike(values_OI, own_OI)
    changed_OI = one_OI != other_OI
    column_S, row_S = (changed_OI.any(dim).nonzero()[:, 0] for dim in (0, 1))
    if len(column_S) == 0:
        return None
    column_share, row_share = len(column_S) / changed_OI.shape[1], len(row_S) / changed_OI.shape[0]
    if min(column_share, row_share) > LARGEST_SHARE:
        raise UnsupportedError(
            f"{name!r} differs from the base in {column_share:.0%} of its columns and {row_share:.0%} of its rows; "
            f"only changes of at most {LARGEST_SHARE:.0%} of either (S²FT) are served: save the adapter as LoRA"
        )
    if column_share <= row_share:
        delta_OS = values_OI[:, column_S].float() - own_OI[:, column_S]
        return TargetEffects(columns=ColumnSparse(column_S, delta_OS.contiguous()))
    return TargetEffects(rows=RowSparse(row_S, (values_OI[row_S].float() - own_OI[row_S]).contiguous()))


def _require_rest(files: AdapterFiles, base: BaseModel, order: orders.Orders) -> None:
    """Require that everything but the targets' weights is the base's own.

    Note: training code pads the vocabulary; rows beyond the base's are left out.
    """
    weights = {f"{name}.weight" for name in base.targets}
    biases = {f"{name}.bias": name for name in base.targets}
    for name in sorted(files.tensors.keys() - weights):
        own = name if name in base.parameter_names else TIED.get(name, name)
        if name.endswith(COMPUTED):
            continue
        if own not in base.parameter_names:
            raise UnmatchedTensorError(f"the model directory has tensor {name!r}, which {base.name!r} has not")
        expected = base.parameter(own)
        values = files.tensors[name]
        padded = values.dim() == 2 and values.shape[0] > expected.shape[0] and values.shape[1:] == expected.shape[1:]
        values = values[: expected.shape[0]] if padded else stored(files, name, tuple(expected.shape))
        if name in biases:
            values = order.undo_bias(biases[name], values)
        one, other = alike(values, expected)
        if not torch.equal(one, other):
            raise UnsupportedError(
                f"tensor {name!r} was trained as well; of a model directory only the linear layers' weights are served"
            )
    if absent := sorted(base.parameter_names - files.tensors.keys()):
        raise UnmatchedTensorError(f"the model directory lacks {absent[0]!r}; it is incomplete or another model")
