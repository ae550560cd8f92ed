"""S²FT as selection and delta: which columns or rows of a linear were trained, and by how much they changed.

    o_proj, down_proj:  y += V x[idx]        v_proj, up_proj:  y[idx] += V x

The authors save whole models only (`full_model` reads those); this is the small form that `motet train s2ft` writes:

    adapter_config.json         {"peft_type": "S2FT", "base_model_name_or_path": …}
    adapter_model.safetensors   base_model.model.{module}.columns.{index [S], delta [O, S]}
                                base_model.model.{module}.rows.{index [S], delta [S, I]}

Source: https://arxiv.org/abs/2412.06289.
"""

from __future__ import annotations

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import ColumnSparse, Lowered, RowSparse, TargetEffects
from motet.adapters.errors import ConfigError, UnmatchedTensorError, UnsupportedError, listed
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import AdapterFiles

NAME = "s2ft"
COLUMNS, ROWS = ".columns.delta", ".rows.delta"
KEYS = ("base_model_name_or_path", "inference_mode", "peft_type", "task_type")


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration names the form."""
    return files.config.get("peft_type") == "S2FT"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Turn selections and deltas into sparse effects.

    Raises:
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    files.require_no_start(NAME)
    if unknown := files.config.keys() - set(KEYS):
        raise ConfigError(
            f"adapter_config.json has the unknown key {sorted(unknown)[0]!r}; an S2FT folder has none such"
        )
    bag = TensorBag(files.tensors)
    columns, rows = bag.modules_with(COLUMNS), bag.modules_with(ROWS)
    if strange := (columns | rows) - base.targets.keys():
        raise UnmatchedTensorError(f"{listed(strange, 1)} is not among the linear layers of {base.name!r}")
    if embedding := [name for name in rows if base.targets[name].kind is Kind.EMBEDDING]:
        raise UnsupportedError(f"{embedding[0]!r} is an embedding, of which single tokens can be selected: columns")
    effects = {
        name: TargetEffects(
            columns=_columns(target, bag) if name in columns else None,
            rows=_rows(target, bag) if name in rows else None,
        )
        for name, target in base.targets.items()
        if name in columns | rows
    }
    bag.require_empty()
    if not effects:
        raise ConfigError("the folder holds no selection: the adapter would change nothing; save it again")
    return Lowered(NAME, "selection and delta", "none", effects, expected_targets=len(effects))


def _columns(target: Target, bag: TensorBag) -> ColumnSparse:
    stem = PREFIX + target.name
    index_S = bag.take_index(f"{stem}.columns.index", target.in_width)
    v_OS = bag.take(stem + COLUMNS, (target.out_width, len(index_S)))
    order = index_S.argsort()
    return ColumnSparse(index_S[order], v_OS[:, order].contiguous())


def _rows(target: Target, bag: TensorBag) -> RowSparse:
    stem = PREFIX + target.name
    index_S = bag.take_index(f"{stem}.rows.index", target.out_width)
    v_SI = bag.take(stem + ROWS, (len(index_S), target.in_width))
    order = index_S.argsort()
    return RowSparse(index_S[order], v_SI[order].contiguous())
