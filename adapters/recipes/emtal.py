"""EMTAL: one LoRA pair per linear, learnt while a router weighs clusters of channels, and less so with every step.

The channels of a SwiGLU layer are put in the order of K clusters of equal size, by the direction of their gate rows:

    ρ = K ((1 - f) softmax(x Wrᵀ / τ) + f / K), each of its K values repeated over a cluster's channels
    h = act(ρ ⊙ (gate(x) + x a_g b_g)) ⊙ (up(x) + x a_u b_u),  y = down(h) + h a_d b_d

and the fading f goes from 0 to 1 over the first half of the steps: what is saved is LoRA on channels in another order.
With label-word tasks, what each has learnt is held by the quality-retaining loss (`quality`).

The authors draw both factors from N(0, 0.02²): then the model starts beside the base by noise, which matters little in
their 100 epochs and much in 150 steps. Here a is drawn so and b is zero, as in LoRA, and the router is zero, so ρ is 1:
the start is the base, and clusters part as soon as gradients differ. The scale is 1, whatever alpha is.

Must not know: the other starts, data, loops. Source: https://arxiv.org/abs/2501.06884 and the authors' code (vision
transformers), carried over to SwiGLU.

Shapes: I/O in and out width of a linear, R rank, F channels, K clusters, T rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, normalize

from motet.adapters.methods.emtal import ATTENTION, INNER, OUTER
from motet.adapters.methods.tensors import PREFIX
from motet.adapters.recipes.clusters import clustered_order
from motet.adapters.recipes.errors import TargetError
from motet.adapters.recipes.folder import write
from motet.adapters.recipes.quality import QualityRetaining
from motet.adapters.recipes.trainee import Setup, Trainee

EXPERTS = 16
TEMPERATURE = 5.0
"""The authors' K and τ."""
SPREAD = 0.02
"""Standard deviation of a at first; the authors'."""
FEED_FORWARD = (*OUTER, INNER)


class PairLinear(nn.Module):
    """A frozen linear layer with a pair beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        """The change is zero."""
        super().__init__()
        self.base_layer = base
        self.a_IR = nn.Parameter(torch.randn(base.in_features, rank) * SPREAD)
        self.b_RO = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """W x + c + x a b."""
        y_TO: torch.Tensor = self.base_layer(x_TI)
        return y_TO + x_TI @ self.a_IR @ self.b_RO


class RoutedFeedForward(nn.Module):
    """A SwiGLU layer with its channels in clustered order and a router that scales the clusters."""

    def __init__(self, plain: Any, order_F: torch.Tensor, fading: torch.Tensor) -> None:
        """Reorder the layer in place; the router is zero.

        Args:
            plain: with gate_proj, up_proj, down_proj and act_fn.
            order_F: channel j becomes what channel order[j] was.
            fading: f, one number shared by all layers.
        """
        super().__init__()
        for outer in (plain.gate_proj, plain.up_proj):
            outer.weight.data = outer.weight.data[order_F]
            if outer.bias is not None:
                outer.bias.data = outer.bias.data[order_F]
        plain.down_proj.weight.data = plain.down_proj.weight.data[:, order_F].contiguous()
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj
        self.act_fn, self.order_F, self._fading = plain.act_fn, order_F, fading
        self.router_KI = nn.Parameter(torch.zeros(EXPERTS, plain.gate_proj.in_features))

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """A faded router is not computed."""
        gate_TF = self.gate_proj(x_TI)
        if float(self._fading) < 1:
            gate_TF = gate_TF * self.scales(x_TI).repeat_interleave(len(self.order_F) // EXPERTS, dim=-1)
        y_TI: torch.Tensor = self.down_proj(self.act_fn(gate_TF) * self.up_proj(x_TI))
        return y_TI

    def scales(self, x_TI: torch.Tensor) -> torch.Tensor:
        """ρ [T, K]; the mean of each row is 1."""
        share_TK = (linear(x_TI, self.router_KI) / TEMPERATURE).softmax(-1)
        return EXPERTS * (1 - self._fading) * share_TK + self._fading


def fading_at(done: int, steps: int) -> float:
    """The f of a step: a line from 0 to 1 over the first half of the steps."""
    half = steps // 2
    return min(done / half, 1.0) if half else 1.0


def start(setup: Setup) -> Trainee:
    """Put the channels in order, a router into every feed-forward layer with a target, and a pair beside each target.

    Raises:
        TargetError: a target is none of a SwiGLU block's linears, or the channels do not split evenly.
        DataError: a label word of the tasks is not one token.
    """
    if strange := sorted(set(setup.targets) - {*ATTENTION, *FEED_FORWARD}):
        raise TargetError(
            f"--targets names {strange[0]!r}; emtal adapts {', '.join((*ATTENTION, *FEED_FORWARD))} of SwiGLU models"
        )
    setup.model.requires_grad_(False)
    fading = torch.zeros(())
    routed = _route(setup, fading)
    pairs: dict[str, PairLinear] = {}
    for path, module in list(setup.model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, nn.Linear) and leaf in setup.targets:
            pairs[path] = PairLinear(module, setup.rank)
            setattr(setup.model.get_submodule(parent), leaf, pairs[path])
    trainable: dict[str, nn.Parameter] = {}
    for path, pair in pairs.items():
        parent, _, leaf = path.rpartition(".")
        trainable[f"{PREFIX}{parent}.lora_{leaf}_a"] = pair.a_IR
        trainable[f"{PREFIX}{parent}.lora_{leaf}_b"] = pair.b_RO
    routers = {f"{PREFIX}{path}.gate_weight_lora.weight": layer.router_KI for path, layer in routed.items()}
    orders = {f"{PREFIX}{path}.order": layer.order_F.to(torch.int32) for path, layer in routed.items()}

    def before_step(done: int, steps: int) -> None:
        fading.fill_(fading_at(done, steps))
        for router in routers.values():
            router.requires_grad_(float(fading) < 1)

    def save(folder: Path) -> None:
        config = {
            "peft_type": "EMTAL",
            "base_model_name_or_path": setup.base_name,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": setup.rank,
            "experts": EXPERTS,
            "temperature": TEMPERATURE,
            "fading": float(fading),
        }
        said = routers if float(fading) < 1 else {}  # a faded router says nothing
        write(folder, {**trainable, **orders, **said}, config, getattr(torch, setup.recipe.saved_dtype))

    classes = setup.classes()
    further = QualityRetaining(classes) if classes else None
    return Trainee(
        setup.model,
        {**trainable, **routers},
        save,
        before_step=before_step,
        further_loss=further,
        kept={"fading": fading, **(further.kept if further else {})},
    )


def _route(setup: Setup, fading: torch.Tensor) -> dict[str, RoutedFeedForward]:
    """Path → what took the place of each feed-forward layer with a target."""
    routed: dict[str, RoutedFeedForward] = {}
    if not set(setup.targets) & set(FEED_FORWARD):
        return routed
    for path, module in list(setup.model.named_modules()):
        if not all(hasattr(module, leaf) for leaf in (*FEED_FORWARD, "act_fn")):
            continue
        gate: Any = module.gate_proj
        if gate.out_features % EXPERTS:
            raise TargetError(
                f"{path!r} has {gate.out_features} channels, which do not split into {EXPERTS} experts of one size; "
                "leave gate_proj, up_proj and down_proj out of --targets"
            )
        order_F = clustered_order(normalize(gate.weight, dim=1), EXPERTS, torch.default_generator)
        parent, _, leaf = path.rpartition(".")
        routed[path] = RoutedFeedForward(module, order_F, fading)
        setattr(setup.model.get_submodule(parent), leaf, routed[path])
    return routed
