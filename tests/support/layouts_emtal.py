"""EMTAL on SwiGLU: feed-forward channels in clusters, pairs in that order, a faded router; and its small folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.layout import CHANGE, Layout
from tests.support.models import ALL_LINEARS

Maker = Callable[[Any, Path, int], Layout]

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
TEMPERATURE = 5.0


class Adjusted(nn.Module):
    """y = W x + c + x a b, with scale 1.

    Attributes:
        a_IR, b_RO: the trained pair, as the authors store it.
    """

    def __init__(self, linear: nn.Linear, a_IR: torch.Tensor, b_RO: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.a_IR, self.b_RO = a_IR, b_RO

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        y_TO: torch.Tensor = self.linear(x_TI)
        return y_TO + x_TI @ self.a_IR @ self.b_RO


class Routed(nn.Module):
    """A feed-forward layer in clustered order whose router scales the channels of each cluster.

    Attributes:
        gate, up, down: linears in clustered order, adjusted or not.
        act: what the gate goes through.
        router_KI: one row a cluster.
        fading: 0: the router alone; 1: every channel counts as in the base.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, act: Any, router_KI: torch.Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, act
        self.router_KI = router_KI
        self.fading = 1.0

    def scales(self, x_TI: torch.Tensor) -> torch.Tensor:
        """ρ [..., K]: one a cluster."""
        clusters = len(self.router_KI)
        share = (x_TI @ self.router_KI.T / TEMPERATURE).softmax(-1)
        return clusters * ((1 - self.fading) * share + self.fading / clusters)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        gate_TF = self.gate(x_TI)
        scales_TF = self.scales(x_TI).repeat_interleave(gate_TF.shape[-1] // len(self.router_KI), dim=-1)
        y_TI: torch.Tensor = self.down(self.act(scales_TF * gate_TF) * self.up(x_TI))
        return y_TI


def emtal(linears: Sequence[str] = ALL_LINEARS, *, router: bool = True, rank: int = 4, experts: int = 8) -> Maker:
    """Cluster the channels, train pairs in that order beside a faded router, save the small folder.

    Args:
        linears: leaves of the linears that have a pair.
        router: whether the router is saved.
        experts: clusters a layer.
    """

    @torch.no_grad()
    def write(model: Any, folder: Path, seed: int) -> Layout:
        generator = torch.Generator().manual_seed(seed)
        oracle, tensors, deltas = copy.deepcopy(model), {}, {}
        for layer, block in enumerate(oracle.model.layers):
            feed, attention, stem = block.mlp, block.self_attn, f"model.layers.{layer}"
            order_F = torch.randperm(feed.gate_proj.out_features, generator=generator)
            made = {}
            for leaf in linears:
                parent = f"{stem}.{'mlp' if leaf in FEED_FORWARD else 'self_attn'}"
                linear = model.get_submodule(f"{parent}.{leaf}")
                a_IR, b_RO = _pair(linear.weight, rank, generator)
                tensors[f"base_model.model.{parent}.lora_{leaf}_a"] = a_IR
                tensors[f"base_model.model.{parent}.lora_{leaf}_b"] = b_RO
                deltas[f"{parent}.{leaf}"] = _in_place(leaf, (a_IR.double() @ b_RO.double()).T, order_F)
                made[leaf] = (a_IR, b_RO)
            router_KI = torch.randn(experts, feed.gate_proj.in_features, generator=generator)
            if router:
                tensors[f"base_model.model.{stem}.mlp.gate_weight_lora.weight"] = router_KI
            if set(FEED_FORWARD) & set(linears):
                tensors[f"base_model.model.{stem}.mlp.order"] = order_F.to(torch.int32 if layer else torch.int64)
            cluster(feed, order_F)
            for leaf in made:
                owner = feed if leaf in FEED_FORWARD else attention
                setattr(owner, leaf, Adjusted(getattr(owner, leaf), *made[leaf]))
            block.mlp = Routed(feed.gate_proj, feed.up_proj, feed.down_proj, feed.act_fn, router_KI)
        folder.mkdir(parents=True)
        config = {"peft_type": "EMTAL", "base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM", "r": rank}
        config |= {"experts": experts, "temperature": TEMPERATURE, "fading": 1}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return Layout(folder, oracle, "emtal", deltas_OI=deltas)

    return write


def cluster(feed: Any, order_F: torch.Tensor) -> None:
    """Move the channels of a feed-forward layer: then channel j is what channel order[j] was."""
    for linear in (feed.gate_proj, feed.up_proj):
        linear.weight.copy_(linear.weight[order_F].clone())
    feed.down_proj.weight.copy_(feed.down_proj.weight[:, order_F].clone())


def _pair(weight_OI: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """a [I, R] and b [R, O] that change a weight by a few per cent."""
    out_width, in_width = weight_OI.shape
    a_IR = torch.randn(in_width, rank, generator=generator)
    b_RO = torch.randn(rank, out_width, generator=generator)
    size = CHANGE * 4 * torch.linalg.vector_norm(weight_OI) / torch.linalg.vector_norm(a_IR @ b_RO)
    return size.sqrt() * a_IR, size.sqrt() * b_RO


def _in_place(leaf: str, delta_OI: torch.Tensor, order_F: torch.Tensor) -> torch.Tensor:
    """A change in clustered order where the base has the channels, copied one by one."""
    if leaf not in FEED_FORWARD:
        return delta_OI
    moved_OI = torch.zeros_like(delta_OI)
    for clustered, place in enumerate(order_F.tolist()):
        if leaf == "down_proj":
            moved_OI[:, place] = delta_OI[:, clustered]
        else:
            moved_OI[place] = delta_OI[clustered]
    return moved_OI
