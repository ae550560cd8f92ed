"""How good probabilities are: pure functions of what was said and what was true.

Must not know: heads, how the probabilities came about. Shapes: N examples, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""


def nll(p_NC: torch.Tensor, y_N: torch.Tensor) -> float:
    """Mean of -log p of the true label, in nats; infinite where one was called impossible."""
    return float(-true(p_NC, y_N).log().mean())


def brier(p_NC: torch.Tensor, y_N: torch.Tensor) -> float:
    """Mean of Σ_c (p_c - [c is true])², from 0 to 2."""
    truth_NC = torch.zeros_like(p_NC).scatter_(-1, y_N[:, None], 1.0)
    return float((p_NC - truth_NC).square().sum(-1).mean())


def accuracy(p_NC: torch.Tensor, y_N: torch.Tensor) -> float:
    """How often the likeliest label is the true one."""
    return float((p_NC.argmax(-1) == y_N).double().mean())


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """How often the likeliest label is the true one, by how sure the answer was; float64, in B bins of equal width.

    Attributes:
        count_B: examples in each bin.
        confidence_B: mean of their largest probability; 0 where there are none.
        accuracy_B: share of them whose likeliest label is the true one; 0 where there are none.
    """

    count_B: torch.Tensor
    confidence_B: torch.Tensor
    accuracy_B: torch.Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: Σ_b n_b/N · |accuracy_b - confidence_b|."""
        gap_B = (self.accuracy_B - self.confidence_B).abs()
        return float((self.count_B * gap_B).sum() / self.count_B.sum())


def reliability(p_NC: torch.Tensor, y_N: torch.Tensor, bins: int = BINS) -> Reliability:
    """By bins ((b-1)/B, b/B] of the largest probability.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599.
    """
    confidence_N, label_N = p_NC.double().max(-1)
    bin_N = (confidence_N * bins).ceil().long().clamp(1, bins) - 1

    def total(value_N: torch.Tensor) -> torch.Tensor:
        return value_N.new_zeros(bins).index_add_(0, bin_N, value_N)

    count_B = total(torch.ones_like(confidence_N))
    divisor_B = count_B.clamp_min(1)
    return Reliability(count_B, total(confidence_N) / divisor_B, total((label_N == y_N).double()) / divisor_B)


def calibration_error(p_NC: torch.Tensor, y_N: torch.Tensor, bins: int = BINS) -> float:
    """Expected calibration error, in bins of equal width."""
    return reliability(p_NC, y_N, bins).error


def auroc(score_N: torch.Tensor, positive_N: torch.Tensor) -> float:
    """Probability that a positive example has a higher score than a negative one, ties counting half.

    Raises:
        ValueError: all examples are of one kind.
    """
    positive_N = positive_N.bool()
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        raise ValueError(f"AUROC needs both kinds of examples; there are {positives} positive and {negatives} negative")
    score_N = score_N.double()
    below_P = torch.searchsorted(score_N[~positive_N].sort().values, score_N[positive_N])
    up_to_P = torch.searchsorted(score_N[~positive_N].sort().values, score_N[positive_N], right=True)
    return float((below_P + up_to_P).double().sum() / (2 * positives * negatives))


def true(p_NC: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    """[N] the probability of the true label."""
    return p_NC.gather(-1, y_N[:, None])[:, 0]
