"""Calibration finds what was put in, on examples whose labels are drawn as a known temperature would have it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, reject, settings, strategies as st

from motet.server.heads.calibrating import LEAST_EXAMPLES, Calibrated, calibrate, halves, require_enough
from motet.server.heads.errors import HeadError
from motet.server.heads.predictive import Logits, exact
from motet.server.heads.scores import accuracy, calibration_error, reliability


def over_confident(
    n: int, temperature: float, variance: float | None = None, seed: int = 4, classes: int = 3
) -> tuple[list[Logits], torch.Tensor]:
    """Logits `temperature` times too large for their labels."""
    generator = torch.Generator().manual_seed(seed)
    mean_NC = 1.5 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    right = [Logits(m_C, None if variance is None else torch.full((classes,), variance).double()) for m_C in mean_NC]
    p_NC = torch.stack([answer.p_C for answer in exact(right)])
    y_N = p_NC.multinomial(1, generator=generator)[:, 0]
    return [logits.tempered(1 / temperature) for logits in right], y_N


def answers(logits: list[Logits], temperature: float) -> torch.Tensor:
    return torch.stack([(each.mean_C.double() / temperature).softmax(-1) for each in logits])


@pytest.fixture(scope="module")
def found() -> Calibrated:
    return calibrate(*over_confident(2000, 3.0), temperature=1.0, miss_rate=0.2, seed=0)


def test_the_temperature_is_recovered(found: Calibrated) -> None:
    """Within four standard errors: the Fisher information of log T is the sum of the variances of z under p."""
    logits, _ = over_confident(2000, 3.0)
    fit_M, _ = halves(2000, 0)
    z_MC = torch.stack([logits[index].mean_C / 3.0 for index in fit_M.tolist()])
    p_MC = z_MC.softmax(1)
    information = float(((p_MC * z_MC**2).sum(1) - (p_MC * z_MC).sum(1) ** 2).sum())
    assert abs(math.log(found.after.temperature / 3.0)) < 4 / math.sqrt(information) < 0.25
    assert (found.fitted, found.scored) == (1000, 1000)


def test_the_scores_are_of_the_second_half(found: Calibrated) -> None:
    logits, y_N = over_confident(2000, 3.0)
    _, held_M = halves(2000, 0)
    p_NC = answers(logits, found.after.temperature)
    assert found.after.ece == pytest.approx(calibration_error(p_NC[held_M], y_N[held_M]))
    assert found.after.nll == pytest.approx(float(torch.nn.functional.nll_loss(p_NC[held_M].log(), y_N[held_M])))
    assert found.after.ece < 0.05 < 0.15 < found.before.ece
    assert found.after.nll < found.before.nll
    assert found.after.brier < found.before.brier
    assert found.before.temperature == 1.0
    assert found.before.ece == pytest.approx(calibration_error(answers(logits, 1.0)[held_M], y_N[held_M]))


def test_the_threshold_covers_as_promised(found: Calibrated) -> None:
    """On examples that chose nothing; within four standard errors of both samples."""
    logits, y_N = over_confident(2000, 3.0, seed=9)
    p_NC = answers(logits, found.after.temperature)
    missed = float((1 - p_NC.gather(1, y_N[:, None]) > found.threshold).double().mean())
    assert missed == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 1000))
    assert float((1 - p_NC.max(1).values > found.threshold).double().mean()) <= missed


def test_what_is_abstained_from() -> None:
    found = calibrate(*over_confident(600, 3.0), temperature=1.0, miss_rate=0.6, seed=0)
    logits, y_N = over_confident(600, 3.0)
    _, held_M = halves(600, 0)
    p_MC, y_M = answers(logits, found.after.temperature)[held_M], y_N[held_M]
    kept_M = 1 - p_MC.max(1).values <= found.threshold
    assert 0 < found.abstained < 1
    assert found.abstained == pytest.approx(float((~kept_M).double().mean()))
    assert found.kept_accuracy == pytest.approx(accuracy(p_MC[kept_M], y_M[kept_M]))
    assert found.kept_accuracy is not None
    assert found.kept_accuracy > found.after.accuracy


def test_uncertain_logits_too() -> None:
    found = calibrate(*over_confident(400, 3.0, variance=0.5), temperature=1.0, miss_rate=0.1, seed=0)
    assert math.log(found.after.temperature) == pytest.approx(math.log(3.0), abs=0.4)
    assert found.after.nll < found.before.nll


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), temperature=st.floats(0.4, 6), before=st.floats(0.1, 10), classes=st.integers(2, 6))
def test_a_temperature_moves_no_answer_of_certain_logits(
    seed: int, temperature: float, before: float, classes: int
) -> None:
    logits, y_N = over_confident(LEAST_EXAMPLES, temperature, seed=seed, classes=classes)
    try:
        found = calibrate(logits, y_N, before, 0.1, seed)
    except HeadError:  # the labels of a draw may fit no temperature
        reject()
    assert found.before.accuracy == found.after.accuracy
    assert 0 <= found.threshold <= 1


def test_the_halves_are_drawn_by_the_seed() -> None:
    first, second = halves(101, 5)
    assert (len(first), len(second)) == (50, 51)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(101))
    assert halves(101, 5)[0].tolist() == first.tolist() != halves(101, 6)[0].tolist()
    assert first.tolist() != sorted(first.tolist())


def test_the_temperature_never_sees_the_second_half() -> None:
    logits, y_N = over_confident(200, 2.0)
    found = calibrate(logits, y_N, 1.0, 0.1, seed=3)
    _, held_M = halves(200, 3)
    y_N[held_M] = (y_N[held_M] + 1) % 3
    other = calibrate(logits, y_N, 1.0, 0.1, seed=3)
    assert other.after.temperature == found.after.temperature
    assert other.after.nll != found.after.nll
    assert other.threshold > found.threshold


@pytest.mark.parametrize(
    ("examples", "miss_rate", "needed"),
    [(49, 0.1, 50), (49, 0.9, 50), (197, 0.01, 198), (0, 0.1, 50), (37, 0.05, 50)],
)
def test_too_few(examples: int, miss_rate: float, needed: int) -> None:
    with pytest.raises(HeadError, match=f"there are {examples} labelled rows; .* at least {needed}: give more"):
        require_enough(examples, miss_rate)
    require_enough(needed, miss_rate)


def test_as_few_as_a_rate_allows_promise_something() -> None:
    logits, y_N = over_confident(198, 2.0)
    assert calibrate(logits, y_N, 1.0, 0.01, seed=0).threshold < 1


def test_labels_without_a_temperature() -> None:
    logits, _ = over_confident(100, 2.0)
    right_N = torch.stack([each.mean_C for each in logits]).argmax(1)
    with pytest.raises(HeadError, match="nearly all are answered right"):
        calibrate(logits, right_N, 1.0, 0.1, seed=0)
    with pytest.raises(HeadError, match="nothing to do with the labels"):
        calibrate(logits, (right_N + 1) % 3, 1.0, 0.1, seed=0)


def test_reliability_by_hand() -> None:
    p_NC = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45], [0.0, 1.0]], dtype=torch.float64)
    found = reliability(p_NC, torch.tensor([0, 0, 0, 1]), bins=5)
    assert found.count_B.tolist() == [0, 0, 1, 1, 2]
    assert found.accuracy_B.tolist() == [0, 0, 1, 0, 1]
    assert found.confidence_B.tolist() == pytest.approx([0, 0, 0.55, 0.8, 0.95])
    assert found.error == pytest.approx((0.45 + 0.8 + 2 * 0.05) / 4)
