"""Reads the checkpoints of AMT's authors: pickles of a whole DINO vision transformer, pairs beside its linears.

Must not know: what a pool becomes, transformers. Two layouts: one checkpoint a member as it was trained
(backbone.blocks.{i}.….lora_A), or one for the whole pool (backbone.model.blocks.{i}.….lora_A.{p}). Their weights are
W_res; everything else in them must be the base's.

Source: the layout of the authors' code, https://openreview.net/forum?id=HxGdbAmYYr.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from motet.adapters.convert.plain_pickle import read_plain_pickle
from motet.adapters.effects import LowRank
from motet.adapters.errors import ConfigError, MissingTensorError, ShapeError
from motet.adapters.methods.base_weights import rounding
from motet.adapters.methods.tensors import TensorBag

LINEARS: Mapping[str, tuple[str, ...]] = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
"""The authors' linear of a block → transformers' linears that stand for it, by rows."""

TRAINED, PACKED = "backbone.", "backbone.model."
"""Before the names of a checkpoint of one member, and of one of the whole pool."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One member of the pool as it was saved.

    Attributes:
        name: of its file, for messages.
        residuals: linear → W_res [O, I].
        pairs: linear → the fused pair, A [k·r, I] and B [O, r], of k linears by rows.
        scale_cls, bias_cls: of its cosine classifier.
        strength: the ε of the attack it was trained with, in 255ths; None where it is not said.
    """

    name: str
    residuals: Mapping[str, torch.Tensor]
    pairs: Mapping[str, LowRank]
    scale_cls: float
    bias_cls: float
    strength: float | None


def members_in(file: Path, base: Mapping[str, torch.Tensor], alone: bool) -> list[Member]:
    """The members in one checkpoint, once everything in it is accounted for.

    Args:
        base: name in timm → tensor, without a head.
        alone: no other checkpoint belongs to the pool.

    Raises:
        UnsafeFormatError: the file holds more than tensors and plain values.
        FormatError: it is not AMT's, is incomplete, or was trained on another base.
    """
    saved = read_plain_pickle(file)
    state = saved.get("model")
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ConfigError(f"{file.name} has no 'model' of tensors; give a checkpoint of AMT's code")
    packed = any(name.startswith(PACKED) for name in state)
    if packed and not alone:
        raise ConfigError(f"{file.name} holds a whole pool; convert it alone, or give one checkpoint a member")
    start = PACKED if packed else TRAINED
    first = f"{start}blocks.0.attn.qkv.lora_B"
    labels = sorted(
        (name.removeprefix(first) for name in state if name.startswith(first)), key=lambda name: (len(name), name)
    )
    expected = [f".{place}" for place in range(len(labels))] if packed else [""]
    if not labels or labels != expected:
        raise MissingTensorError(
            f"{file.name} has {len(labels)} tensors that begin with {first!r}, not {'.0 and on' if packed else '1'}; "
            "it is no checkpoint of AMT, or incomplete"
        )
    fused_b = state[first + labels[0]]
    if fused_b.dim() != 2 or not fused_b.numel():
        raise ShapeError(
            f"tensor {first + labels[0]!r} has shape {list(fused_b.shape)}; it must be a matrix, not empty"
        )
    rank, bag = fused_b.shape[1], TensorBag(state)
    residuals: dict[str, torch.Tensor] = {}
    pairs: list[dict[str, LowRank]] = [{} for _ in labels]
    for name, weight in base.items():
        values = bag.take(start + name, tuple(weight.shape))
        linear = name.removesuffix(".weight")
        parts = LINEARS.get(linear.split(".", 2)[-1]) if name.startswith("blocks.") else None
        if parts is None or linear == name:
            _require_same(name, values, weight, file.name)
            continue
        residuals[linear] = values
        for label, of_member in zip(labels, pairs, strict=True):
            a_RI = bag.take(f"{start}{linear}.lora_A{label}", (rank * len(parts), weight.shape[1]))
            of_member[linear] = LowRank(a_RI, bag.take(f"{start}{linear}.lora_B{label}", (weight.shape[0], rank)))
    scale_cls, bias_cls = float(bag.take("scale_cls", (1,))), float(bag.take("bias", (1,)))
    bag.require_empty()
    options = vars(saved["args"]) if isinstance(saved.get("args"), argparse.Namespace) else {}
    epsilon = None if packed else options.get("epsilon")
    strength = float(epsilon) if isinstance(epsilon, int | float) else None
    return [Member(file.name, residuals, of_member, scale_cls, bias_cls, strength) for of_member in pairs]


def _require_same(name: str, values: torch.Tensor, expected: torch.Tensor, file: str) -> None:
    if bool(((values - expected).abs() > rounding(values, expected) * expected.abs()).any()):
        raise ConfigError(
            f"tensor {name!r} of {file} is not that of the base: it was trained on another model, or more was trained "
            "than the pairs; give the ViT that training began with"
        )
