"""Fits what a head file says beside its weights, from examples that it was not trained on: temperature and threshold.

Must not know: files, training. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from motet.server.heads.predictive import Logits, exact
from motet.server.heads.scores import nll

LARGEST_TEMPERATURE = 32.0
GRID = 11
"""Temperatures 1/32, 1/16, … 32 are tried first."""
PRECISION = 1e-3
"""Of log T."""


def fit_temperature(logits: Sequence[Logits], y_N: torch.Tensor) -> float:
    """The T in [1/32, 32] with the least NLL of the exact answers.

    Semantics: the whole distribution of the logits is scaled, z / T: means m / T and variances v / T². That is what
    `Head` does with the temperature of a head file.

    Note: for certain logits NLL is convex in 1/T. For Gaussian ones it need not be (as T → 0 the answers tend to
    P(z_c is largest), not to certainty), hence the grid first, then golden sections between its neighbours. The end
    of the range is returned where NLL still falls there, as it does when every label is right.
    """
    assert len(logits) == len(y_N) > 0

    def loss(log_t: float) -> float:
        answers = exact([each.tempered(math.exp(log_t)) for each in logits])
        return sum(nll(answer.p_C[None], y[None]) for answer, y in zip(answers, y_N, strict=True))

    most = math.log(LARGEST_TEMPERATURE)
    grid = [most * (2 * place / (GRID - 1) - 1) for place in range(GRID)]
    losses = [loss(log_t) for log_t in grid]
    best = min(range(GRID), key=losses.__getitem__)
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > PRECISION:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = loss(right)
    found = (low + high) / 2
    return math.exp(found if loss(found) < losses[best] else grid[best])


def conformal_threshold(p_true_N: torch.Tensor, miss_rate: float) -> float:
    """Split conformal prediction's threshold q on 1 - p.

    Semantics: the ⌈(N + 1)(1 - miss_rate)⌉-th smallest 1 - p of a true label. For an exchangeable new example the
    true label then has 1 - p > q with probability at most miss_rate. So {c: 1 - p_c ≤ q} misses it that rarely, and
    so rarely is that set empty, which is when a request whose 1 - max p exceeds q is abstained from.

    Args:
        p_true_N: probability given to the true label of examples that neither training nor temperature have seen.
        miss_rate: in (0, 1).

    Returns:
        q in [0, 1]; 1, which abstains from nothing, where N is too small for the rate.

    Source: Vovk et al. 2005; the finite-sample rank as in https://arxiv.org/abs/2107.07511.
    """
    assert 0 < miss_rate < 1
    # Rounding must not lift (N + 1)(1 - miss_rate) above a whole number that it is.
    rank = math.ceil((len(p_true_N) + 1) * (1 - miss_rate) - 1e-9)
    if rank > len(p_true_N):
        return 1.0
    return float((1 - p_true_N.double()).sort().values[rank - 1])


def prediction_set(p_C: torch.Tensor, threshold: float) -> list[int]:
    """The labels with 1 - p ≤ threshold, likeliest first; empty is to abstain."""
    order_C = p_C.argsort(descending=True, stable=True)
    return [int(label) for label in order_C if 1 - float(p_C[label]) <= threshold]
