"""Bases as adapters see them, made without a server: from a tiny model, or from names alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from motet.adapters.arena import Arena
from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.residency import Residency
from motet.kernels.cpu.pages import in_large_pages
from motet.server.model.base import base_model, targets_of


def base_of(model: Any, name: str = "base") -> BaseModel:
    """The base that a transformers model is."""
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    targets = targets_of(linears, (paths[id(embedding)], embedding), paths[id(head)])
    return base_model(name, "0" * 64, model, targets, frozenset(paths.values()) - linears.keys())


def linears(base: BaseModel) -> frozenset[str]:
    """Targets that are neither the embedding nor the head."""
    return frozenset(name for name, target in base.targets.items() if target.kind is Kind.LINEAR)


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
    arena = Arena(widths, budget_bytes, dtype, torch.device("cpu"))
    in_large_pages(arena.units_NU)
    return Residency(base.targets, arena)


def one_target_base() -> BaseModel:
    """ "base", with one linear of four by four."""
    weight = torch.ones(4, 4)
    return BaseModel(
        "base",
        "0" * 64,
        {"q_proj": Target(0, "q_proj", 4, 4, has_bias=False)},
        frozenset(),
        lambda _: weight,
        lambda _: weight[0],
        lambda _: 1.0,
        frozenset({"q_proj.weight"}),
        lambda _: weight,
        config={"hidden_size": 4},
    )
