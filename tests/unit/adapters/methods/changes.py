"""Ways to spoil a file of tensors. Knows nothing of adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]


def drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.__setitem__(name, value)


def replace_with(name: str, shape: tuple[int, ...]) -> Change:
    """Ones of another shape, where there must be a tensor already."""

    def change(tensors: Tensors) -> None:
        assert name in tensors
        tensors[name] = torch.ones(shape)

    return change


def poison(name: str, value: float) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name][-1, -1] = value

    return change


def rename(old: str, new: str) -> Change:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change
