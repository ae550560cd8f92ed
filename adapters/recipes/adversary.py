"""Adversarial meta-training: the loss of an episode under perturbed texts and perturbed factors.

    ℓ(q)  = scale · cos(f(q), m_c),  m_c: class means of f over the support,  f: state of the last token after the norm
    δ     = ε/√D · sign ∇ CE(ℓ(q))              on the token embeddings of the queries; each moves by ε
    loss  = CE(ℓ(q)) + λ · KL(ℓ(q) ‖ ℓ(q + δ))
    w̃     = w + γ ‖w‖ ∇loss/‖∇loss‖              each factor of the member in training
    and the gradient of the loss at w̃ is taken at w.

The authors maximise the KL by several steps; here one step against the cross entropy, which starts where the KL's
gradient is zero, costs a third of that.

Must not know: files, how a pool is stored.

Shapes: B rows, T positions, D width, S support rows, N queries, C classes.
Source: https://openreview.net/forum?id=HxGdbAmYYr
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, linear, normalize
from torch.nn.utils.rnn import pad_sequence

from motet.adapters.recipes.episodes import WAYS, Episode, Episodes
from motet.adapters.recipes.halves import states
from motet.adapters.recipes.pool_network import PoolNetwork

KL_SHARE = 6.0
FACTOR_SHARE = 0.005
"""The authors' λ and γ."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """An episode below the layers that train; alike for all members.

    Attributes:
        support_BTD, query_BTD: states that enter those layers.
        support_B, query_B: the last token of each row.
        embedded_BTD: the queries' token embeddings, that `query_BTD` has a gradient to.
    """

    support_BTD: torch.Tensor
    support_B: torch.Tensor
    query_BTD: torch.Tensor
    query_B: torch.Tensor
    embedded_BTD: torch.Tensor


@dataclass(slots=True, eq=False)
class Adversary:
    """The loss of a step. The members take turns on each episode.

    Attributes:
        lower, upper: halves of the decoder that `embed` belongs to; the pool lies in the upper one.
        epsilons: how far each member's texts are perturbed, in the embeddings' norm; one each.
        member: in training.
    """

    pool: PoolNetwork
    embed: Any
    lower: Any
    upper: Any
    episodes: Episodes
    epsilons: Sequence[float]
    member: int = 0
    _numbers: Sequence[int] = ()
    _seen: Seen | None = None

    def before_step(self, done: int, _steps: int) -> None:
        """Give the turn to the next member."""
        self.member = done % len(self.epsilons)

    def loss(self, numbers: Sequence[int]) -> torch.Tensor:
        """Of an episode, at the perturbed factors; gradients reach the factors in training and the scale."""
        episode = Episode.of(numbers)
        support_S, query_N = episode.labels
        self.pool.alone(self.member)
        seen = self._below(numbers, episode)
        epsilon = self.epsilons[self.member]
        moved_BTD = self._attacked(seen, support_S, query_N, epsilon) if epsilon else None
        robust = self._robust(seen, moved_BTD, support_S, query_N)
        gradients = torch.autograd.grad(robust, self.pool.factors(self.member))
        self.pool.push(self.member, gradients, FACTOR_SHARE)
        try:
            return self._robust(seen, moved_BTD, support_S, query_N)
        finally:
            self.pool.release()

    def _below(self, numbers: Sequence[int], episode: Episode) -> Seen:
        """Computed at the first turn on an episode."""
        if self._seen is None or list(self._numbers) != list(numbers):
            rows = self.episodes.rows
            support_BT, support_B = padded([rows[number] for number in episode.support])
            query_BT, query_B = padded([rows[number] for number in episode.queries])
            embedded_BTD = self.embed(query_BT).detach().requires_grad_()
            with torch.no_grad():
                support_BTD = states(self.lower, self.embed(support_BT))
            query_BTD = states(self.lower, embedded_BTD)
            self._seen = Seen(support_BTD, support_B, query_BTD, query_B, embedded_BTD)
            self._numbers = numbers
        return self._seen

    def _attacked(self, seen: Seen, support_S: torch.Tensor, query_N: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The states that enter the upper layers when the queries' embeddings are perturbed."""
        with torch.no_grad():
            means_CD = class_means(last(states(self.upper, seen.support_BTD), seen.support_B), support_S, WAYS)
        logits_NC = self._logits(seen.query_BTD, seen.query_B, means_CD)
        (gradient_BTD,) = torch.autograd.grad(cross_entropy(logits_NC, query_N), seen.embedded_BTD, retain_graph=True)
        with torch.no_grad():
            return states(self.lower, perturbed(seen.embedded_BTD, gradient_BTD, epsilon))

    def _robust(
        self, seen: Seen, moved_BTD: torch.Tensor | None, support_S: torch.Tensor, query_N: torch.Tensor
    ) -> torch.Tensor:
        means_CD = class_means(last(states(self.upper, seen.support_BTD), seen.support_B), support_S, WAYS)
        logits_NC = self._logits(seen.query_BTD.detach(), seen.query_B, means_CD)
        loss = cross_entropy(logits_NC, query_N)
        if moved_BTD is None:
            return loss
        moved_NC = self._logits(moved_BTD, seen.query_B, means_CD).log_softmax(1)
        return loss + KL_SHARE * kl_div(moved_NC, logits_NC.log_softmax(1), reduction="batchmean", log_target=True)

    def _logits(self, states_BTD: torch.Tensor, last_B: torch.Tensor, means_CD: torch.Tensor) -> torch.Tensor:
        scaled_NC: torch.Tensor = self.pool.scale_cls * cosines(last(states(self.upper, states_BTD), last_B), means_CD)
        return scaled_NC


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids [B, T] padded to the right, position of the last token of each row [B])."""
    ids_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids_BT, torch.tensor([len(row) - 1 for row in rows])


def last(states_BTD: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
    """Features [B, D] float32: of each row the state at its last token."""
    return states_BTD[torch.arange(len(last_B)), last_B].float()


def class_means(features_SD: torch.Tensor, labels_S: torch.Tensor, classes: int) -> torch.Tensor:
    """[C, D]."""
    return torch.stack([features_SD[labels_S == number].mean(0) for number in range(classes)])


def cosines(features_ND: torch.Tensor, means_CD: torch.Tensor) -> torch.Tensor:
    """[N, C] float32, whatever autocast would have."""
    with torch.autocast("cpu", enabled=False):
        made: torch.Tensor = linear(normalize(features_ND, dim=1), normalize(means_CD, dim=1))
        return made


def perturbed(embedded_BTD: torch.Tensor, gradient_BTD: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Each token's embedding moved by ε, up the gradient's signs; pads, which have no gradient, stay."""
    step = epsilon / math.sqrt(embedded_BTD.shape[-1])
    return embedded_BTD + step * gradient_BTD.sign()
