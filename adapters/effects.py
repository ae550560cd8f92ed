"""The intermediate language: what a trained adapter does to one target linear, whatever method made it.

Must not know: methods, files, devices, kernels. With base weight W [O, I], bias c, input row x and rank gate g:

    h = W x + B (g ⊙ (A x))          LowRank
    h = h + V x[idx]                 ColumnSparse
    h[idx] = h[idx] + V x            RowSparse
    h = h + α (sign x)               SignDelta
    y = (1 + d) ⊙ h + c + b          OutputScale (d), OutputBias (b)

Effects are float32 on the CPU: lowering happens once, at load; the cast to the serving dtype comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
class SignDelta:
    """Adds ``α (sign x)``: a change of every weight by the same amount, up or down. Only on request: it is lossy.

    Attributes:
        word_OP: [O, P] int32, 32 signs of a row each, see `motet.adapters.signs`.
        alpha_1: [1] float32, α.
    """

    word_OP: torch.Tensor
    alpha_1: torch.Tensor


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
    sign: SignDelta | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GateSpec:
    """What makes an adapter's rank rows count differently for each request: ``g = ω[groups]``.

    Attributes:
        kind: what computes ω: "router" (iLoRA) or "pool" (AMT).
        size: G, the factors ω that a request has.
        groups: target → [R] int64 below G: the factor that multiplies each rank row of the target's LowRank.
        tensors: name → float32, what the factors are computed from.
        facts: plain JSON data beside them.
    """

    kind: str
    size: int
    groups: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the tensors, in host memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


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
        vocabulary: one past the largest token id that the adapter serves, where it has a tokenizer of its own; None
            where the base's is used. Tokens beyond the base's vocabulary are the last columns or rows of sparse
            changes, or of overlays, of the embedding and the head, where the base has zeros.
        gate: what the rank gate of a request is computed from; None where every rank row always counts once.
    """

    method: str
    form: str
    scaling: str
    effects: Mapping[str, TargetEffects]
    expected_targets: int
    exact: bool = True
    overlays: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gate: GateSpec | None = None
    vocabulary: int | None = None
