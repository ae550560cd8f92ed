"""A lowered adapter as it lies in the arena, but anywhere: its operands end to end in the serving dtype.

Bringing it to the device is then a copy of one range, or of few, and no arithmetic. Must not know: where it is kept,
arenas' free ranges, methods.

Shapes: N units of U elements, K operands, C targets, L columns of the address tables, R largest rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from motet.adapters.addresses import COLUMNS, Int32
from motet.adapters.base import Target
from motet.adapters.effects import Lowered, TargetEffects


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What the device needs of an adapter.

    Attributes:
        units_NU: the operands on the CPU; the end of each one's last unit is zero.
        start_K: first unit of each operand, ascending.
        cell_K2: (column of the tables, index of the target) of the operands but for the last ones, which are replaced
            parameters.
        counts_LC: what the tables say beside addresses; zero where those belong.
        overlays: path of a replaced parameter → number of its operand, and its shape.
        touched: paths of the modules that the adapter changes in any way.
        vocabulary: see `Lowered`.
        groups_CR: which factor of a gate multiplies each rank row; all zero where there is no gate.
    """

    units_NU: torch.Tensor
    start_K: Int32
    cell_K2: Int32
    counts_LC: Int32
    overlays: Mapping[str, tuple[int, tuple[int, ...]]]
    touched: frozenset[str]
    vocabulary: int | None
    groups_CR: Int32

    @property
    def bytes(self) -> int:
        """In host memory."""
        arrays = (self.start_K, self.cell_K2, self.counts_LC, self.groups_CR)
        return self.units_NU.nbytes + sum(array.nbytes for array in arrays)


def units_of(operand: torch.Tensor, unit: int, dtype: torch.dtype) -> int:
    """Units that an operand takes, the last one perhaps in part; an index takes four bytes."""
    if operand.is_floating_point():
        return math.ceil(operand.numel() / unit)
    return math.ceil(operand.numel() * torch.int32.itemsize / (unit * dtype.itemsize))


def operands_of(lowered: Lowered) -> list[torch.Tensor]:
    """Every operand once: a parameter that replaces two is one."""
    found = [operand for effects in lowered.effects.values() for _, operand in _operands(effects)]
    return [*found, *{id(values): values for values in lowered.overlays.values()}.values()]


def pack(lowered: Lowered, targets: Mapping[str, Target], unit: int, dtype: torch.dtype) -> Packed:
    """Lay the operands out.

    Args:
        unit: U, the arena's.
    """
    counts_LC = np.zeros((len(COLUMNS), len(targets)), dtype=np.int32)
    cells: list[tuple[int, int]] = []
    for name, effects in lowered.effects.items():
        target = targets[name]
        cells += [(COLUMNS.index(kind), target.index) for kind, _ in _operands(effects)]
        for kind, count in _counts(effects, target):
            counts_LC[COLUMNS.index(kind), target.index] = count
    operands = operands_of(lowered)
    sizes = [units_of(operand, unit, dtype) for operand in operands]
    starts = np.cumsum([0, *sizes], dtype=np.int64).astype(np.int32)
    units_NU = torch.empty((int(starts[-1]), unit), dtype=dtype)
    numbers: dict[int, int] = {}
    for number, (operand, start, size) in enumerate(zip(operands, starts.tolist(), sizes, strict=False)):
        _write(units_NU[start : start + size].view(-1), operand)
        numbers[id(operand)] = number
    overlays = {path: (numbers[id(values)], tuple(values.shape)) for path, values in lowered.overlays.items()}
    return Packed(
        units_NU=units_NU,
        start_K=starts[:-1].copy(),
        cell_K2=np.array(cells, dtype=np.int32).reshape(-1, 2),
        counts_LC=counts_LC,
        overlays=overlays,
        touched=touched(lowered),
        vocabulary=lowered.vocabulary,
        groups_CR=_grouped(lowered, targets),
    )


def touched(lowered: Lowered) -> frozenset[str]:
    """Paths of the modules that the adapter changes in any way."""
    return frozenset([*lowered.effects, *(path.rpartition(".")[0] for path in lowered.overlays)])


def _write(units: torch.Tensor, operand: torch.Tensor) -> None:
    """Values, cast to the serving dtype, or indices, as int32; then zeros."""
    kept = units if operand.is_floating_point() else units.view(torch.int32)
    kept[: operand.numel()].copy_(operand.reshape(-1))
    kept[operand.numel() :].zero_()


def _grouped(lowered: Lowered, targets: Mapping[str, Target]) -> Int32:
    """All zero where the adapter has no gate of its own: its one factor is a weight."""
    ranks = [effects.low_rank.rank for effects in lowered.effects.values() if effects.low_rank]
    groups_CR = np.zeros((len(targets), max(ranks, default=0)), dtype=np.int32)
    if lowered.gate is not None:
        for name, group_R in lowered.gate.groups.items():
            groups_CR[targets[name].index, : len(group_R)] = group_R
    return groups_CR


def _operands(effects: TargetEffects) -> list[tuple[str, torch.Tensor]]:
    """(table column of the first unit, rows) of every operand, rows laid out as they lie in the arena."""
    operands: list[tuple[str, torch.Tensor]] = []
    if effects.low_rank:
        operands += [("a_first", effects.low_rank.a_RI), ("b_first", effects.low_rank.b_OR.T)]
    if effects.scale:
        operands.append(("scale_first", effects.scale.delta_O))
    if effects.bias:
        operands.append(("bias_first", effects.bias.bias_O))
    if effects.columns:
        operands += [("columns_first", effects.columns.v_OS.T), ("columns_index", effects.columns.index_S)]
    if effects.rows:
        operands += [("rows_first", effects.rows.v_SI), ("rows_index", effects.rows.index_S)]
    if effects.sign:
        operands.append(("sign_first", effects.sign.word_OP))
    return operands


def _counts(effects: TargetEffects, target: Target) -> list[tuple[str, int]]:
    """(table column, value) of what says how large an operand is, or that there is one."""
    return [
        ("rank", effects.low_rank.rank if effects.low_rank else 0),
        ("columns", len(effects.columns.index_S) if effects.columns else 0),
        ("rows", int((effects.rows.index_S < target.out_width).sum()) if effects.rows else 0),
        ("has_scale", int(effects.scale is not None)),
        ("has_bias", int(effects.bias is not None)),
        ("has_sign", int(effects.sign is not None)),
        ("sign_alpha", int(effects.sign.alpha_1.view(torch.int32)) if effects.sign else 0),
    ]
