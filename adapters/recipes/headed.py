"""An adapter learnt together with a head of its own, which answers one of the task's words at the end of the question.

Must not know: data, the loop, how an adapter or a head is computed.

Shapes: N answer tokens of a step, D hidden size, C classes.

Source: https://arxiv.org/abs/2604.03388 for PoLAR with a variational head. Ours are the start of the means, at the rows
of the vocabulary's head for the words less their mean, and the rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from motet.adapters import heads
from motet.adapters.heads import HeadFile, Parameterization
from motet.adapters.recipes import variational
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.recipes.variational import SoftmaxHead, VariationalHead

SHARES = {"W_logdiag": 10.0, "noise_logdiag": 10.0, "W_offdiag": 0.025}
MEAN_SHARE = 0.25
"""Of the learning rate. Logarithms have far to go; the many entries of a factor diverge with a higher share."""


def start(
    setup: Setup, body: Callable[[Setup], Trainee], parameterization: Parameterization, laplace: bool = False
) -> Trainee:
    """The adapter of `body`, and a head that starts as the vocabulary's.

    Args:
        laplace: whether the Laplace approximation takes the place of what a dense covariance has learnt.

    Raises:
        DataError: the answers are not one list of words, each one token.
        FormatError: the file of a head cannot say the seed.
    """
    if not setup.labels:
        raise DataError("a head learns one task whose answers are a list of words; choose one such --task, not several")
    (tokens,) = setup.classes()
    tokens_C = torch.tensor(tokens)
    rows_CD = setup.model.lm_head.weight[tokens_C].detach()
    mean_CD = rows_CD - rows_CD.mean(0)
    if parameterization is Parameterization.SOFTMAX:
        head: SoftmaxHead | VariationalHead = SoftmaxHead(mean_CD)
        facts: dict[str, Any] = {}
    else:
        head = VariationalHead(mean_CD, parameterization, setup.n_rows)
        facts = {
            "prior_scale": variational.PRIOR_SCALE,
            "wishart_scale": variational.WISHART_SCALE,
            "dof": variational.DOF,
        }
    seed = torch.initial_seed()
    trainee = body(setup)

    def objective(states_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """Of the words alone: what ends an answer is not the head's."""
        rows, y_N = (labels_N[:, None] == tokens_C).nonzero(as_tuple=True)
        return head.loss(states_ND[rows], y_N)

    def file() -> HeadFile:
        return HeadFile(
            parameterization=parameterization,
            labels=setup.labels,
            tensors=variational.tensors(head),
            label_token_ids=tuple(tokens),
            n_train=setup.n_rows,
            seed=seed,
            **facts,
        )

    heads.checked(file())  # rather than after the training

    def save(folder: Path) -> None:
        """The head first: a folder is complete with its configuration."""
        heads.write(file(), folder)
        trainee.save(folder)

    named = dict(head.named_parameters(prefix="head"))
    rates = {f"head.{name}": SHARES.get(name, MEAN_SHARE) for name, _ in head.named_parameters()}
    return replace(
        trainee,
        trainable={**trainee.trainable, **named},
        save=save,
        objective=objective,
        classify=head.means,
        refit=head.refit if laplace and isinstance(head, VariationalHead) else None,
        rates={**trainee.rates, **rates},
    )
