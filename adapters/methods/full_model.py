"""A whole fine-tuned model: what differs from the base, bit by bit, as the cheapest effects that say it exactly.

S²FT trains some channels of the feed-forward layers and some attention heads, and leaves its checkpoint with channels
and heads reordered. The order is recovered from what it does not train: the rows of gate_proj, the heads of q_proj and
k_proj. Then a change of few columns (o_proj, down_proj) or few rows (v_proj, up_proj) remains. What is changed
throughout, as LISA and other full fine-tunes change it, replaces the base's parameter.

Source: https://arxiv.org/abs/2412.06289 (S²FT), https://arxiv.org/abs/2403.17919 (LISA), and what their code writes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import ColumnSparse, Lowered, OutputBias, RowSparse, TargetEffects
from motet.adapters.errors import ConfigError, MissingTensorError, UnmatchedTensorError, UnsupportedError, listed
from motet.adapters.methods import orders
from motet.adapters.methods.base_weights import COMPUTED, alike, stored
from motet.adapters.methods.model_config import require_same_computation
from motet.adapters.methods.vocabulary import end_paths, lower_ends, meant_rows, served_vocabulary
from motet.adapters.source import AdapterFiles, Layout
from motet.adapters.tokens import OwnTokenizer, own_tokenizer

NAME = "full-model"

LARGEST_SHARE = 0.5
"""Of the columns or rows; above it a sparse effect is dearer than the dense change."""


def claims(files: AdapterFiles) -> bool:
    """Whether it is a model directory."""
    return files.layout is Layout.MODEL


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower the directory's difference from the base.

    Raises:
        FormatError: the directory is not a fine-tune of this base.
    """
    files.require_no_start(NAME)
    require_same_computation(files, base)
    order = orders.recover(files, base)
    effects: dict[str, TargetEffects] = {}
    overlays: dict[str, torch.Tensor] = {}
    for name, target in base.targets.items():
        if target.kind is not Kind.LINEAR:
            continue
        values_OI = order.undo(name, stored(files, f"{name}.weight", (target.out_width, target.in_width)))
        columns, rows, dense_OI = _difference(values_OI, base.weight(name))
        bias = _bias(target, files, base, order)
        if dense_OI is not None:
            overlays[f"{name}.weight"] = dense_OI
        if columns or rows or bias:
            effects[name] = TargetEffects(bias=bias, columns=columns, rows=rows)
    overlays |= _replaced(files, base)
    own = own_tokenizer(files.tokenizer, base.tokenizers)
    ends = _ends(files, base, own)
    of_ends, whole_ends = lower_ends(ends, base)
    effects |= of_ends
    head = base.of_kind(Kind.HEAD)
    if head is not None and (bias := _bias(head, files, base, order)):
        effects[head.name] = replace(effects.get(head.name, TargetEffects()), bias=bias)
    overlays |= whole_ends
    if stuck := overlays.keys() - base.replaceable:
        raise UnsupportedError(f"{listed(stuck, 1)} was trained, which cannot be replaced for single rows")
    if not effects and not overlays:
        raise ConfigError(f"the directory holds the weights of {base.name!r} itself: nothing was trained")
    return Lowered(
        method=NAME if overlays else "s2ft",
        form="model directory" + (", channels and heads reordered" if order.rows or order.columns else ""),
        scaling="none",
        effects=effects,
        expected_targets=len(effects),
        overlays=overlays,
        vocabulary=served_vocabulary(ends, base, own),
    )


Difference = tuple[ColumnSparse | None, RowSparse | None, torch.Tensor | None]
"""At most one is there: a change of few columns, of few rows, or the whole new weight [O, I]."""


def _difference(values_OI: torch.Tensor, own_OI: torch.Tensor) -> Difference:
    one_OI, other_OI = alike(values_OI, own_OI)
    changed_OI = one_OI != other_OI
    column_S, row_S = (changed_OI.any(dim).nonzero()[:, 0] for dim in (0, 1))
    column_share, row_share = len(column_S) / changed_OI.shape[1], len(row_S) / changed_OI.shape[0]
    if len(column_S) == 0:
        return None, None, None
    if min(column_share, row_share) > LARGEST_SHARE:
        return None, None, values_OI.float().contiguous()
    if column_share <= row_share:
        delta_OS = values_OI[:, column_S].float() - own_OI[:, column_S]
        return ColumnSparse(column_S, delta_OS.contiguous()), None, None
    return None, RowSparse(row_S, (values_OI[row_S].float() - own_OI[row_S]).contiguous()), None


def _bias(target: Target, files: AdapterFiles, base: BaseModel, order: orders.Orders) -> OutputBias | None:
    if not target.has_bias:
        return None
    own_O = base.bias(target.name)
    values_O = order.undo_bias(target.name, stored(files, f"{target.name}.bias", (target.out_width,)))
    one_O, other_O = alike(values_O, own_O)
    return None if torch.equal(one_O, other_O) else OutputBias(values_O.float() - own_O)


def _replaced(files: AdapterFiles, base: BaseModel) -> dict[str, torch.Tensor]:
    """What differs of the parameters that are neither targets' nor the embedding's or head's."""
    of_targets = {f"{name}.{part}" for name in base.targets for part in ("weight", "bias")}
    of_targets |= {f"{name}.weight" for name in end_paths(base)}
    if absent := base.parameter_names - files.tensors.keys():
        raise MissingTensorError(f"the model directory lacks {listed(absent)}; it is incomplete or another model")
    overlays: dict[str, torch.Tensor] = {}
    for path in sorted(files.tensors.keys() - of_targets):
        if path.endswith(COMPUTED):
            continue
        if path not in base.parameter_names and path not in base.tied:
            raise UnmatchedTensorError(f"the model directory has tensor {path!r}, which {base.name!r} has not")
        own = base.parameter(path)
        values = stored(files, path, tuple(own.shape))
        one, other = alike(values, own)
        if not torch.equal(one, other):
            overlays[path] = values.float().contiguous()
    for path, first in base.tied.items():
        if path not in files.tensors and first in overlays:
            overlays[path] = overlays[first]
    return overlays


def _ends(files: AdapterFiles, base: BaseModel, own: OwnTokenizer | None) -> dict[str, torch.Tensor]:
    """The embedding's and the head's weights [N, D]; one that is not stored is the one it is tied to."""
    ends: dict[str, torch.Tensor] = {}
    stored_ends: dict[str, torch.Tensor] = {}
    for path in end_paths(base):
        name = f"{path}.weight"
        first = name if name in files.tensors else base.tied.get(name, name)
        if first not in stored_ends:
            vocabulary, width = base.parameter(name).shape
            rows = len(files.tensors[first]) if first in files.tensors and files.tensors[first].dim() else 0
            values_RD = stored(files, first, (max(rows, vocabulary), width))
            stored_ends[first] = meant_rows(path, values_RD, base, own, may_pad=True)
        ends[path] = stored_ends[first]
    return ends
