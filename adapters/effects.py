"""The intermediate language: what a trained adapter does to one target linear, whatever method made it.

Must not know: methods, files, devices, kernels. With base weight W [O, I], bias c, input row x and rank gate g:

    h = W x + B (g ⊙ (A x))          LowRank
    h = h + V x[idx]                 ColumnSparse
    h[idx] = h[idx] + V x            RowSparse
    y = (1 + d) ⊙ h + c + b          OutputScale (d), OutputBias (b)

Effects are float32 on the CPU: lowering happens once, at load; the cast to the serving dtype comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Adds ``B (g ⊙ (A x))`` to the product of the base.

    Attributes:
        a_RI: [R, I] float32.
        b_OR: [O, R] float32, every scale folded in.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class ColumnSparse:
    """Adds ``V x[idx]``: a change of some columns of the weight.

    Attributes:
        index_S: [S] int64, distinct input indices, ascending.
        v_OS: [O, S] float32.
    """

    index_S: torch.Tensor
    v_OS: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowSparse:
    """Adds ``V x`` to the outputs idx: a change of some rows of the weight.

    Attributes:
        index_S: [S] int64, distinct output indices, ascending.
        v_SI: [S, I] float32.
    """

    index_S: torch.Tensor
    v_SI: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class OutputScale:
    """Multiplies the product (not the bias of the base) by ``1 + d``.

    The difference from one is kept, not the factor: factors lie near one, where bfloat16 has three digits, while
    the difference keeps its own relative precision.

    Attributes:
        delta_O: [O] float32, d = k - 1.
    """

    delta_O: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class OutputBias:
    """Adds b to the output, after the scale and beside the bias of the base.

    Attributes:
        bias_O: [O] float32.
    """

    bias_O: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TargetEffects:
    """All effects of one adapter on one target; absent ones are None."""

    low_rank: LowRank | None = None
    scale: OutputScale | None = None
    bias: OutputBias | None = None
    columns: ColumnSparse | None = None
    rows: RowSparse | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """An adapter after lowering: everything the server needs to know of it.

    Attributes:
        method: name of the method that was recognised, for people.
        form: file layout that was recognised, for people.
        scaling: the rule the scale was computed by, for people.
        effects: target name → effects; only targets of the base it was lowered for.
        expected_targets: how many targets the configuration names.
        exact: whether the effects reproduce the trained model, up to rounding.
        overlays: parameter of the base → float32 values that replace it: what no effect says more cheaply. A parameter
            that two modules share is replaced in both when both paths are here, with the same tensor.
    """

    method: str
    form: str
    scaling: str
    effects: Mapping[str, TargetEffects]
    expected_targets: int
    exact: bool = True
    overlays: Mapping[str, torch.Tensor] = field(default_factory=dict)
