"""EMTAL: one LoRA pair per linear over feed-forward channels in clustered order, with a router that faded away.

    ρ = K ((1 - f) softmax(x Wrᵀ / τ) + f / K), each of its K values repeated over F / K neighbouring channels
    h = act(ρ ⊙ (gate(x) + x a_g b_g)) ⊙ (up(x) + x a_u b_u),  y = down(h) + h a_d b_d

Once the fading f is 1, ρ is 1 whatever the router says, and what is left is LoRA on channels that training keeps in
the order of its clusters; lowering puts them back where the base has them:

    A = aᵀ, B = bᵀ; of gate and up B[order[j]] = bᵀ[j], of down A[:, order[j]] = aᵀ[:, j]

The authors train vision transformers and save pickles (`motet convert emtal` reads those); this is their spelling on
SwiGLU, which `motet train emtal` writes:

    adapter_config.json         {"peft_type": "EMTAL", "r": …, "experts": K, "temperature": τ, "fading": f, …}
    adapter_model.safetensors   base_model.model.{parent}.lora_{leaf}_{a [I, r], b [r, O]}, scale 1
                                base_model.model.{mlp}.order [F]: clustered channel j is the base's channel order[j]
                                base_model.model.{mlp}.gate_weight_lora.weight [K, hidden], which may be absent

Source: https://arxiv.org/abs/2501.06884 and the layout of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from motet.adapters.base import BaseModel, Target
from motet.adapters.effects import Lowered, LowRank, TargetEffects
from motet.adapters.errors import ConfigError, MissingTensorError, ShapeError, UnsupportedError
from motet.adapters.methods.config_values import boolean, number, one_of, positive_int
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import AdapterFiles

NAME = "emtal"
KEYS = (
    "base_model_name_or_path",
    "experts",
    "fading",
    "inference_mode",
    "peft_type",
    "r",
    "task_type",
    "temperature",
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
OUTER, INNER = ("gate_proj", "up_proj"), "down_proj"
"""Linears of a feed-forward layer whose rows, and whose columns, are its channels."""


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration of which the router has faded."""

    rank: int
    experts: int


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration names the form."""
    return files.config.get("peft_type") == "EMTAL"


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Turn pairs in clustered order into pairs in the base's.

    Raises:
        UnsupportedError: the router has not faded, or a linear is adapted whose channels are in an unknown order.
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    files.require_no_start(NAME)
    config = parse(files.config)
    bag = TensorBag(files.tensors)
    stems = bag.modules_with("_a", "_b")
    adapted = {name for name in base.targets if _stem(name) in stems}
    if strange := sorted(name for name in adapted if _leaf(name) not in (*ATTENTION, *OUTER, INNER)):
        raise UnsupportedError(
            f"{strange[0]!r} has an EMTAL pair, but is none of {', '.join((*ATTENTION, *OUTER, INNER))}; the order of "
            "its channels is not known: train the adapter on these"
        )
    orders = {
        mlp: order_F
        for mlp, (width, hidden) in _feed_forward(base).items()
        if (order_F := _order(mlp, width, hidden, config, adapted, bag)) is not None
    }
    effects = {
        name: TargetEffects(low_rank=_pair(target, config.rank, orders.get(_parent(name)), bag))
        for name, target in base.targets.items()
        if name in adapted
    }
    bag.require_empty()
    if not effects:
        raise ConfigError("the folder holds no pair: the adapter would change nothing; save it again")
    return Lowered(NAME, "router faded", "none", effects, expected_targets=len(effects))


def parse(config: Mapping[str, Any]) -> Config:
    """Check every key.

    Raises:
        ConfigError: a key is unknown or has an impossible value.
        UnsupportedError: fading is below 1.
    """
    if unknown := config.keys() - set(KEYS):
        raise ConfigError(
            f"adapter_config.json has the unknown key {sorted(unknown)[0]!r}; an EMTAL folder has none such"
        )
    if not isinstance(name := config.get("base_model_name_or_path"), str | None):
        raise ConfigError(f"base_model_name_or_path={name!r} is neither a name nor null")
    one_of("task_type", config.get("task_type"), ("CAUSAL_LM",))
    boolean(config, "inference_mode")
    rank = positive_int("r", config.get("r"))
    experts = positive_int("experts", config.get("experts"))
    temperature = number("temperature", config.get("temperature"))
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature:g} is not above 0; it divides the router's logits")
    fading = number("fading", config.get("fading"))
    if not 0 <= fading <= 1:
        raise ConfigError(f"fading={fading:g} is not between 0 (the router alone) and 1 (faded)")
    if fading < 1:
        raise UnsupportedError(
            f"fading={fading:g} is below 1: the router still scales the feed-forward channels of every token, which no "
            "fixed change of the weights can say; train on until fading is 1"
        )
    return Config(rank, experts)


def _feed_forward(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Feed-forward layer → number of its channels, width of its input."""
    outer = {_parent(name): (t.out_width, t.in_width) for name, t in base.targets.items() if _leaf(name) in OUTER}
    inner = {_parent(name): (t.in_width, t.out_width) for name, t in base.targets.items() if _leaf(name) == INNER}
    return {**outer, **inner}


def _order(mlp: str, width: int, hidden: int, config: Config, adapted: set[str], bag: TensorBag) -> torch.Tensor | None:
    """The order of the channels [F] int64, None where nothing is stored about the layer; takes the router as well."""
    name, router = f"{PREFIX}{mlp}.order", f"{PREFIX}{mlp}.gate_weight_lora.weight"
    needed = any(f"{mlp}.{leaf}" in adapted for leaf in (*OUTER, INNER))
    routed = bag.take_if_present(router, (config.experts, hidden)) is not None
    stored = mlp in bag.modules_with(".order")
    if needed and not stored:
        raise MissingTensorError(
            f"tensor {name!r} is missing: the pairs of {mlp!r} are in the order of its clusters, and without it no "
            "channel can be told from another; save the adapter with it"
        )
    if (needed or stored or routed) and width % config.experts:
        raise ConfigError(
            f"experts={config.experts} do not divide the {width} channels of {mlp!r} evenly; the adapter belongs to "
            "another base model or its experts are configured wrongly"
        )
    if not stored:
        return None
    order_F = bag.take_index(name, width)
    if len(order_F) != width:
        raise ShapeError(
            f"tensor {name!r} has {len(order_F)} places, expected {width}, every channel of {mlp!r} once; the adapter "
            "belongs to another base model"
        )
    return order_F


def _pair(target: Target, rank: int, order_F: torch.Tensor | None, bag: TensorBag) -> LowRank:
    stem = PREFIX + _stem(target.name)
    a_RI = bag.take(f"{stem}_a", (target.in_width, rank)).T.contiguous()
    b_OR = bag.take(f"{stem}_b", (rank, target.out_width)).T.contiguous()
    if order_F is not None and _leaf(target.name) in OUTER:
        b_OR = b_OR[order_F.argsort()]
    elif order_F is not None and _leaf(target.name) == INNER:
        a_RI = a_RI[:, order_F.argsort()]
    return LowRank(a_RI, b_OR)


def _stem(name: str) -> str:
    """What the names of a target's two tensors begin with, less the prefix."""
    return f"{_parent(name)}.lora_{_leaf(name)}"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
