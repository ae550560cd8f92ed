"""Puts `AdaptedLinear` in the place of the base's linear layers: the only change made to the modelling code's modules.

Must not know: methods, requests, attention, the vocabulary. Which effects apply to which rows is decided outside, per
step.

Shapes: T rows, I/O a target's in/out widths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from motet.kernels.cpu.compiled import Engine
from motet.kernels.cpu.packed import PackedLinear, can_pack
from motet.kernels.epilogue import RowVectorPlan
from motet.kernels.ops import LowRankPlan, SignPlan, SparsePlan
from motet.server.model.overlay import OverlayPlan


@dataclass(frozen=True, slots=True, eq=False)
class AddedTokens:
    """Rows start to stop of the output head's, and the weights [X, I] of the tokens that their adapter adds."""

    start: int
    stop: int
    weight_XI: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepEffects:
    """What the adapters of one step do, ready to apply to any of the targets whose rows are the same.

    None where no adapter does such, or none can: an output head that is no target can only be replaced.
    """

    low_rank: Sequence[LowRankPlan]
    sparse: SparsePlan | None
    overlays: OverlayPlan | None
    scales: RowVectorPlan | None
    biases: RowVectorPlan | None
    added: Sequence[AddedTokens] = ()
    signs: SignPlan | None = None


class ActiveStep:
    """Where layers find the step that runs: one for those that see all rows, one for the output head.

    None between steps and when no row has an adapter; for the head also when no adapter changes the head.
    """

    def __init__(self) -> None:
        self.effects: StepEffects | None = None

    @property
    def overlays(self) -> OverlayPlan | None:
        """The step's replacements of whole parameters."""
        return None if self.effects is None else self.effects.overlays


class AdaptedLinear(nn.Module):
    """A base linear whose rows may each belong to another adapter.

    Semantics: ``y = k ⊙ (W x + B (g ⊙ A x) + V x[idx] + α (sign x)) + c + b``, and rows of V x added to some outputs,
    with the operands of each row's own adapter; one product with W for all rows.
    """

    def __init__(
        self, linear: nn.Linear, target: int, path: str, step: ActiveStep, packed: PackedLinear | None = None
    ) -> None:
        """Take the linear's place.

        Args:
            packed: computes the product with the weight; None leaves it to torch.
        """
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.target, self.packed = target, packed
        self._path = path
        self._step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the base weight and the step's effects to [..., I]."""
        effects = self._step.effects
        if effects is None and self.packed is None:
            return F.linear(x, self.weight, self.bias)
        x_TI = x.reshape(-1, self.in_features)
        if effects is None:
            return self._product(x_TI, bias=True).view(*x.shape[:-1], self.out_features)
        scales = effects.scales if effects.scales is not None and effects.scales.touches(self.target) else None
        y_TO = self._product(x_TI, bias=scales is None)
        if effects.overlays is not None:
            effects.overlays.linear_(self._path, y_TO, x_TI, self.bias if scales is None else None)
        for plan in effects.low_rank:
            plan.add_(self.target, y_TO, x_TI)
        if effects.sparse is not None and effects.sparse.touches(self.target):
            effects.sparse.add_(self.target, y_TO, x_TI)
        if effects.signs is not None and effects.signs.touches(self.target):
            effects.signs.add_(self.target, y_TO, x_TI)
        if scales is not None:
            scales.scale_(self.target, y_TO)
            if self.bias is not None:
                y_TO += self.bias
        if effects.biases is not None:
            effects.biases.add_(self.target, y_TO)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def keep_packed_only(self) -> None:
        """Free the weight, which the packed one says too; NaN stands in its place, for whoever should read it still."""
        assert self.packed is not None
        nowhere = torch.full((1, 1), torch.nan, dtype=self.weight.dtype)
        self.weight.data = nowhere.expand(self.weight.shape)

    def _product(self, x_TI: torch.Tensor, *, bias: bool) -> torch.Tensor:
        if self.packed is not None:
            return self.packed.multiply(x_TI, bias=bias)
        return F.linear(x_TI, self.weight, self.bias if bias else None)


class AdaptedHead(AdaptedLinear):
    """The output head, which has more outputs in a step where an adapter adds tokens.

    Note: what stands there for rows of other adapters means nothing; whoever reads the logits knows how many are whose.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As its parent; [..., O + X] for the largest number X of added tokens."""
        y = super().forward(x)
        added = self._step.effects.added if self._step.effects is not None else ()
        if not added:
            return y
        more = max(len(run.weight_XI) for run in added)
        x_TI, y_TN = x.reshape(-1, self.in_features), F.pad(y.reshape(-1, self.out_features), (0, more))
        for run in added:
            stop = self.out_features + len(run.weight_XI)
            y_TN[run.start : run.stop, self.out_features : stop] = x_TI[run.start : run.stop] @ run.weight_XI.T
        return y_TN.view(*x.shape[:-1], self.out_features + more)


def inject(
    model: nn.Module,
    step: ActiveStep,
    head: str | None,
    head_step: ActiveStep,
    left_out: Collection[str] = (),
    engine: Engine | None = None,
    *,
    keep_weights: bool = False,
) -> dict[str, AdaptedLinear]:
    """Replace every linear of the model.

    Args:
        head: path of the output head; it is the only target of its own step. None where there is none.
        left_out: paths of linears that stay as they are.
        engine: of the native backend, which then computes the products and keeps the weights that are not shared with
            another module in its own order only; None leaves them to torch.
        keep_weights: keep those in the order of torch too.

    Returns:
        Module path → its replacement, in the order of `named_modules`, the head last where it is a linear. The position
        is the index in the plans of its step; the head's is 0.
    """
    linears = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and name not in left_out
    }
    order = sorted(linears, key=lambda name: name == head)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    adapted: dict[str, AdaptedLinear] = {}
    for index, name in enumerate(order):
        linear = linears[name]
        packed = PackedLinear(engine, linear.weight, linear.bias) if engine and can_pack(linear.weight) else None
        if name == head:
            adapted[name] = AdaptedHead(linear, 0, name, head_step, packed)
        else:
            adapted[name] = AdaptedLinear(linear, index, name, step, packed)
        if packed is not None and uses[id(linear.weight)] == 1 and not keep_weights:
            adapted[name].keep_packed_only()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted[name])
    return adapted
