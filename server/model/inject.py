"""Puts `AdaptedLinear` in the place of the base's linear layers: the only change made to the modelling code's modules.

Must not know: methods, requests, attention, the vocabulary. Which effects apply to which rows is decided outside, per
step.

Shapes: T rows, I/O a target's in/out widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from motet.kernels.epilogue import RowVectorPlan
from motet.kernels.ops import LowRankPlan, SparsePlan
from motet.server.model.overlay import OverlayPlan


@dataclass(frozen=True, slots=True, eq=False)
class StepEffects:
    """What the adapters of one step do, ready to apply to any target; None where no adapter does such."""

    low_rank: LowRankPlan
    sparse: SparsePlan | None
    overlays: OverlayPlan | None
    scales: RowVectorPlan
    biases: RowVectorPlan


class ActiveStep:
    """Where the layers of one model find the step that runs; None between steps and when no row has an adapter."""

    def __init__(self) -> None:
        self.effects: StepEffects | None = None
        self.logit_rows: torch.Tensor | None = None

    @property
    def overlays(self) -> OverlayPlan | None:
        """The step's replacements of whole parameters."""
        return None if self.effects is None else self.effects.overlays


class AdaptedLinear(nn.Module):
    """A base linear whose rows may each belong to another adapter.

    Semantics: ``y = k ⊙ (W x + B (g ⊙ A x) + V x[idx]) + c + b``, and rows of V x added to some outputs, with the
    operands of each row's own adapter; one product with W for all rows.
    """

    def __init__(self, linear: nn.Linear, target: int, path: str, step: ActiveStep) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._target, self._path = target, path
        self._step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the base weight and the step's effects to [..., I]."""
        effects = self._step.effects
        if effects is None:
            return F.linear(x, self.weight, self.bias)
        x_TI = x.reshape(-1, self.in_features)
        scaled = effects.scales.touches(self._target)
        y_TO = F.linear(x_TI, self.weight, None if scaled else self.bias)
        if effects.overlays is not None:
            effects.overlays.linear_(self._path, y_TO, x_TI, None if scaled else self.bias)
        effects.low_rank.add_(self._target, y_TO, x_TI)
        if effects.sparse is not None and effects.sparse.touches(self._target):
            effects.sparse.add_(self._target, y_TO, x_TI)
        if scaled:
            effects.scales.scale_(self._target, y_TO)
            if self.bias is not None:
                y_TO += self.bias
        effects.biases.add_(self._target, y_TO)
        return y_TO.view(*x.shape[:-1], self.out_features)


def inject(model: nn.Module, step: ActiveStep, skip: frozenset[str]) -> dict[str, AdaptedLinear]:
    """Replace every linear of the model except those in `skip`.

    Returns:
        Module path → its replacement, in the order of `named_modules`; the position is the target's index.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name not in skip}
    adapted: dict[str, AdaptedLinear] = {}
    for index, (name, linear) in enumerate(linears.items()):
        adapted[name] = AdaptedLinear(linear, index, name, step)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted[name])
    return adapted
