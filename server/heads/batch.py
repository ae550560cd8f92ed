"""Answers for a batch of requests that may each have another head.

Must not know: adapters' names, schemas, the engine. Rows of one head are computed together; their answers do not
depend on it beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from motet.adapters.heads import HeadFile, Parameterization
from motet.server.heads.gaussian import GaussianHead
from motet.server.heads.plain import SoftmaxHead
from motet.server.heads.predictive import Logits, Predictive, exact
from motet.server.heads.sampling import monte_carlo


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A head ready to compute; compared by identity.

    Attributes:
        temperature: its logits are divided by it.
    """

    layer: GaussianHead | SoftmaxHead
    temperature: float = 1.0

    @classmethod
    def of(cls, file: HeadFile, device: torch.device) -> Head:
        """The head of a checked file, float32 on the device."""
        tensors = {name: tensor.to(device) for name, tensor in file.tensors.items()}
        plain = file.parameterization is Parameterization.SOFTMAX
        return cls(
            SoftmaxHead.of(tensors) if plain else GaussianHead.of(file.parameterization, tensors), file.temperature
        )


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One request.

    Attributes:
        x_D: the feature that the head was trained on.
        samples: draws of a Monte Carlo answer; None is the exact one.
        seed: of the draws.
    """

    head: Head
    x_D: torch.Tensor
    samples: int | None = None
    seed: int = 0


def logits(rows: Sequence[Row]) -> list[Logits]:
    """The logits of every row, temperature applied."""
    groups: dict[Head, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.head, []).append(index)
    found: dict[int, Logits] = {}
    for head, members in groups.items():
        mean_NC, variance_NC = head.layer.logits(torch.stack([rows[index].x_D for index in members]))
        for place, index in enumerate(members):
            variance_C = None if variance_NC is None else variance_NC[place]
            found[index] = Logits(mean_NC[place], variance_C).tempered(head.temperature)
    return [found[index] for index in range(len(rows))]


def predict(rows: Sequence[Row]) -> list[Predictive]:
    """The answer to every row.

    Raises:
        HeadError: a head's logits are not finite.
    """
    every = logits(rows)
    sampled = {
        index: monte_carlo(every[index], row.samples, row.seed)
        for index, row in enumerate(rows)
        if row.samples is not None
    }
    rest = [index for index in range(len(rows)) if index not in sampled]
    found = sampled | dict(zip(rest, exact([every[index] for index in rest]), strict=True))
    return [found[index] for index in range(len(rows))]
