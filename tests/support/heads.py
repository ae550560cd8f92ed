"""Heads of random weights as files, and vbll's own layer of the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vbll import DiscClassification

from motet.adapters.heads import HeadFile, Parameterization

RANK = 3


def random_head(kind: str, labels: Sequence[str], width: int, seed: int, spread: float = 1.0, **facts: Any) -> HeadFile:
    """Logits of order `spread` on features of order one, with variances of about as much; half of them off-diagonal."""
    generator = torch.Generator().manual_seed(seed)
    classes = len(labels)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    scale = spread / width**0.5
    if kind == "softmax":
        tensors = {"weight": draw(classes, width, scale=scale), "bias": draw(classes)}
    else:
        log = torch.tensor(scale / 2).log() * (2 if kind == "lowrank" else 1)
        tensors = {
            "noise_mean": draw(classes, scale=0.1),
            "noise_logdiag": draw(classes, scale=0.1) - 2,
            "W_mean": draw(classes, width, scale=scale),
            "W_logdiag": log + draw(classes, width, scale=0.1),
        }
    if kind in ("dense", "lowrank"):
        columns = width if kind == "dense" else RANK
        tensors["W_offdiag"] = draw(classes, width, columns, scale=scale / 2 / columns**0.5)
    return HeadFile(parameterization=Parameterization(kind), labels=tuple(labels), tensors=tensors, **facts)


def vbll_layer(head: HeadFile) -> Any:
    """The package's layer with the same state, in float64."""
    classes, width = head.tensors["W_mean"].shape
    layer = DiscClassification(width, classes, 0.01, parameterization=head.parameterization.value, cov_rank=RANK)
    layer.load_state_dict(dict(head.tensors))
    return layer.double().eval()
