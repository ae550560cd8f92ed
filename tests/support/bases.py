"""Bases as adapters see them, made without a server: from a tiny model, or from names alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from motet.adapters.arena import Arena
from motet.adapters.base import BaseModel, Target
from motet.adapters.residency import Residency


def base_of(model: Any, name: str = "base") -> BaseModel:
    """The base that a transformers model is: every linear but the head is a target."""
    head = model.get_output_embeddings()
    linears: dict[str, nn.Linear] = {
        path: module for path, module in model.named_modules() if type(module) is nn.Linear and module is not head
    }
    parents = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}

    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = dict(model.named_parameters())
    tied = {path: next(first for first in own if own[first] is p) for path, p in parameters.items() if path not in own}

    def parameter(path: str) -> torch.Tensor:
        return parameters[path].detach().float()

    targets = {
        path: Target(index, path, linear.in_features, linear.out_features, linear.bias is not None)
        for index, (path, linear) in enumerate(linears.items())
    }
    return BaseModel(
        name=name,
        fingerprint="0" * 64,
        targets=targets,
        other_modules=frozenset(parents - targets.keys()),
        weight=lambda path: parameter(f"{path}.weight"),
        bias=lambda path: parameter(f"{path}.bias"),
        weight_norm=lambda path: float(torch.linalg.vector_norm(parameter(f"{path}.weight"))),
        parameter_names=frozenset(own),
        parameter=parameter,
        tied=tied,
        replaceable=frozenset(path for path in parameters if not path.endswith("_proj.bias")),
    )


def base_of_names(targets: Iterable[str], other_modules: Iterable[str] = ()) -> BaseModel:
    """A base of which only the names matter."""

    def nothing(path: str) -> Any:
        raise AssertionError(f"{path}: this base has names only")

    return BaseModel(
        name="base",
        fingerprint="0" * 64,
        targets={path: Target(index, path, 4, 4, has_bias=False) for index, path in enumerate(targets)},
        other_modules=frozenset(other_modules),
        weight=nothing,
        bias=nothing,
        weight_norm=nothing,
        parameter_names=frozenset(),
        parameter=nothing,
    )


def residency_of(base: BaseModel, budget_bytes: int = 1 << 20, dtype: torch.dtype = torch.float32) -> Residency:
    """An empty arena for the base."""
    widths = {width for target in base.targets.values() for width in (target.in_width, target.out_width)}
    return Residency(base.targets, Arena(widths, budget_bytes, dtype, torch.device("cpu")))
