"""What a head says about one request: probabilities, and how much of their entropy is the head's own doubt.

Must not know: heads, features, files. Logits are independent Gaussians, z_c ~ N(m_c, v_c), or certain:

    P = E[softmax(z)]      total = H(P)      aleatoric = E[H(softmax(z))]      epistemic = total - aleatoric

All entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from motet.server.heads.errors import HeadError
from motet.server.heads.quadrature import integrate, outer_nodes

MOST_CELLS = 1 << 20
"""Classes times outer nodes that are integrated at a time: some 60 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """Of one request.

    Attributes:
        mean_C: [C] m.
        variance_C: [C] v, at least 0; None says that the logits are certain.
    """

    mean_C: torch.Tensor
    variance_C: torch.Tensor | None = None

    def tempered(self, temperature: float) -> Logits:
        """Semantics: z / T, so m / T and v / T²."""
        variance_C = None if self.variance_C is None else self.variance_C / temperature**2
        return Logits(self.mean_C / temperature, variance_C)


@dataclass(frozen=True, slots=True, eq=False)
class Predictive:
    """The answer to one request.

    Attributes:
        p_C: [C] float64 on the CPU, sums to 1.
        total, aleatoric, epistemic: nats; 0 ≤ aleatoric ≤ total ≤ log C, and epistemic is the difference.
    """

    p_C: torch.Tensor
    total: float
    aleatoric: float
    epistemic: float

    @classmethod
    def of(cls, p_C: torch.Tensor, aleatoric: float) -> Predictive:
        """Rounding may leave the aleatoric entropy a little outside of its bounds; then it is the bound."""
        total = float(torch.special.entr(p_C).sum())
        aleatoric = min(max(aleatoric, 0.0), total)
        return cls(p_C, total, aleatoric, total - aleatoric)


def exact(requests: Sequence[Logits]) -> list[Predictive]:
    """The answers by quadrature, P off by less than 1e-11, entropies by less than 1e-9; requests may differ in C.

    Raises:
        HeadError: logits are not finite, or a variance is negative.
    """
    answers: list[Predictive | None] = [None] * len(requests)
    uncertain: list[int] = []
    for index, logits in enumerate(requests):
        check(logits)
        if logits.variance_C is None:
            answers[index] = softmax(logits.mean_C)
        else:
            uncertain.append(index)
    for part in _chunks([requests[index] for index in uncertain]):
        for place, answer in _integrated([requests[uncertain[place]] for place in part], part):
            answers[uncertain[place]] = answer
    return [answer for answer in answers if answer is not None]


def softmax(mean_C: torch.Tensor) -> Predictive:
    """The answer of certain logits: nothing is epistemic."""
    p_C = mean_C.detach().cpu().double().softmax(-1)
    entropy = float(torch.special.entr(p_C).sum())
    return Predictive(p_C, entropy, entropy, 0.0)


def check(logits: Logits) -> None:
    """Require a distribution.

    Raises:
        HeadError: it is none.
    """
    mean_C, variance_C = logits.mean_C, logits.variance_C
    if not mean_C.isfinite().all():
        raise HeadError("the head's logits are not finite; the hidden state overflowed, or the adapter is damaged")
    if variance_C is None:
        return
    assert variance_C.shape == mean_C.shape
    if not (variance_C.isfinite() & (variance_C >= 0)).all():
        raise HeadError(
            "the variances of the head's logits are not finite numbers of at least 0; the hidden state overflowed, or "
            "the head's covariance is far too large"
        )


def _integrated(requests: Sequence[Logits], places: Sequence[int]) -> Iterator[tuple[int, Predictive]]:
    mean_K, variance_K, request_K = _flat(requests)
    p_K, aleatoric_N = integrate(mean_K, variance_K, request_K, len(requests))
    sizes = [len(logits.mean_C) for logits in requests]
    for place, p_C, aleatoric in zip(places, torch.split(p_K, sizes), aleatoric_N.tolist(), strict=True):
        yield place, Predictive.of(p_C / p_C.sum(), aleatoric)


def _chunks(requests: Sequence[Logits]) -> Iterator[list[int]]:
    """Places of requests that fit into memory together, like beside like: a chunk shares its outer grid."""
    if not requests:
        return
    nodes = outer_nodes(*_flat(requests), len(requests)).tolist()
    chunk: list[int] = []
    rows = 0
    for place in sorted(range(len(requests)), key=nodes.__getitem__):
        rows += len(requests[place].mean_C)
        if chunk and rows * nodes[place] > MOST_CELLS:
            yield chunk
            chunk, rows = [], len(requests[place].mean_C)
        chunk.append(place)
    yield chunk


def _flat(requests: Sequence[Logits]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean_K, variance_K, request_K of all classes in a row."""
    means = [logits.mean_C.detach().cpu().double() for logits in requests]
    variances = [logits.variance_C.detach().cpu().double() for logits in requests if logits.variance_C is not None]
    sizes = torch.tensor([len(mean_C) for mean_C in means])
    return torch.cat(means), torch.cat(variances), torch.arange(len(requests)).repeat_interleave(sizes)
