"""Scores and fits where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from motet.server.heads.calibration import conformal_threshold, fit_temperature, prediction_set
from motet.server.heads.predictive import Logits, exact
from motet.server.heads.scores import accuracy, auroc, brier, calibration_error, nll, true

P_NC = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.25, 0.25, 0.5], [0.1, 0.8, 0.1]], dtype=torch.float64)
Y_N = torch.tensor([0, 2, 2, 1])


def test_scores_by_hand() -> None:
    assert true(P_NC, Y_N).tolist() == [0.7, 0.4, 0.5, 0.8]
    assert nll(P_NC, Y_N) == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(0.5) + math.log(0.8)) / 4)
    squares = [0.09 + 0.04 + 0.01, 0.01 + 0.25 + 0.36, 0.0625 * 2 + 0.25, 0.01 + 0.04 + 0.01]
    assert brier(P_NC, Y_N) == pytest.approx(sum(squares) / 4)
    assert accuracy(P_NC, Y_N) == 0.75
    # 0.5 and 0.5 share a bin of 15, one of them right; the others stand alone, right.
    assert calibration_error(P_NC, Y_N) == pytest.approx((0.3 + 0.0 + 0.2) / 4)
    assert calibration_error(P_NC, Y_N, bins=1) == pytest.approx(abs(0.75 - 2.5 / 4))


def test_what_was_called_impossible() -> None:
    assert nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


def test_a_bin_ends_where_it_says() -> None:
    """0.6 = 9/15 belongs to the bin below; two bins whose gaps would cancel in one do not."""
    p_NC = torch.tensor([[0.6, 0.4], [0.61, 0.39]], dtype=torch.float64)
    assert calibration_error(p_NC, torch.tensor([0, 1])) == pytest.approx((0.4 + 0.61) / 2)


def test_a_calibrated_forecast_has_no_error() -> None:
    p_NC = torch.tensor([[0.8, 0.2]] * 10, dtype=torch.float64)
    assert calibration_error(p_NC, torch.tensor([0] * 8 + [1] * 2)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("score", "positive", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 3.5 / 4),
        ([3, 1, 2], [0, 0, 1], 0.5),
    ],
)
def test_auroc_counts_pairs(score: list[float], positive: list[int], expected: float) -> None:
    assert auroc(torch.tensor(score), torch.tensor(positive)) == expected


def test_auroc_of_one_kind_is_none() -> None:
    with pytest.raises(ValueError, match="3 positive and 0 negative"):
        auroc(torch.ones(3), torch.ones(3))


def examples(temperature: float, variance: float | None, n: int = 200) -> tuple[list[Logits], torch.Tensor]:
    """Logits `temperature` times too large, and labels drawn as the right ones would have it."""
    generator = torch.Generator().manual_seed(4)
    mean_NC = 1.5 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    right = [Logits(mean_C, None if variance is None else torch.full((3,), variance).double()) for mean_C in mean_NC]
    p_NC = torch.stack([answer.p_C for answer in exact(right)])
    y_N = p_NC.multinomial(1, generator=generator)[:, 0]
    return [logits.tempered(1 / temperature) for logits in right], y_N


@pytest.mark.parametrize(("temperature", "variance"), [(0.4, None), (3.0, None), (3.0, 0.5)])
def test_the_temperature_that_was_applied_is_found(temperature: float, variance: float | None) -> None:
    logits, y_N = examples(temperature, variance)
    found = fit_temperature(logits, y_N)
    # 200 examples know T to a tenth or two, and are off by the same factor for every temperature.
    assert found == pytest.approx(temperature, rel=0.4)
    assert found / temperature == pytest.approx(fit_temperature(*examples(1.0, variance)), rel=2e-3)

    def loss(t: float) -> float:
        return nll(torch.stack([answer.p_C for answer in exact([each.tempered(t) for each in logits])]), y_N)

    assert loss(found) < min(loss(found * 1.01), loss(found / 1.01))


def test_the_ends_of_the_range() -> None:
    logits = [Logits(torch.tensor([1.0, 0.0])), Logits(torch.tensor([0.0, 1.0]))]
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(1 / 32, rel=2e-3)
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(32, rel=2e-3)


def test_the_rank_is_corrected_for_the_sample() -> None:
    p_N = 1 - torch.arange(1, 10, dtype=torch.float64) / 10  # 1 - p is 0.1 … 0.9
    assert conformal_threshold(p_N, 0.1) == pytest.approx(0.9)  # the ⌈10 · 0.9⌉ = 9th of 9
    assert conformal_threshold(p_N, 0.11) == pytest.approx(0.9)
    assert conformal_threshold(p_N, 0.2) == pytest.approx(0.8)
    assert conformal_threshold(p_N, 0.5) == pytest.approx(0.5)
    assert conformal_threshold(p_N, 0.7) == pytest.approx(0.3)  # 10 · (1 - 0.7) is 3.0000000000000004 in float64
    assert conformal_threshold(p_N, 0.05) == 1.0  # nine examples cannot promise that


def test_the_promise_is_kept() -> None:
    """Over many draws of both sets, the true label is missed as often as promised, within five standard errors."""
    generator = torch.Generator().manual_seed(7)
    n, miss_rate, rounds = 19, 0.25, 4000
    missed = 0
    for _ in range(rounds):
        p_N = torch.rand(n + 1, generator=generator, dtype=torch.float64)
        missed += bool(1 - p_N[-1] > conformal_threshold(p_N[:-1], miss_rate))
    error = math.sqrt(miss_rate * (1 - miss_rate) / rounds)
    assert abs(missed / rounds - miss_rate) < 5 * error  # exactly 5 of 20 ranks


def test_the_set_is_what_conforms() -> None:
    p_C = torch.tensor([0.2, 0.5, 0.3])
    assert prediction_set(p_C, 0.75) == [1, 2]
    assert prediction_set(p_C, 0.5) == [1]
    assert prediction_set(p_C, 0.4) == []
    assert prediction_set(p_C, 1.0) == [1, 2, 0]
