"""The quadrature against the formula on a plain grid, against Monte Carlo, and where the answer is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from motet.server.heads import quadrature
from motet.server.heads.errors import HeadError
from motet.server.heads.predictive import Logits, Predictive, exact, softmax
from motet.server.heads.sampling import monte_carlo
from tests.support.tolerances import TOLERANCES
from tests.unit.server.heads.oracles import draw, plain_grid, sigmoid_mean

PROBABILITY = TOLERANCES["predictive", torch.float64]
ENTROPY = TOLERANCES["predictive entropy", torch.float64]
FINER = TOLERANCES["predictive on a finer grid", torch.float64]
LIMIT = TOLERANCES["predictive at a limit", torch.float64]
VARIANCES = [1e-4, 0.01, 0.2, 0.3, 1.0, 4.0, 25.0]


def one(mean: list[float], variance: list[float]) -> Predictive:
    return exact([Logits(torch.tensor(mean).double(), torch.tensor(variance).double())])[0]


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def entropies(answer: Predictive) -> torch.Tensor:
    return torch.tensor([answer.total, answer.aleatoric, answer.epistemic], dtype=torch.float64)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_equals_the_formula_on_a_plain_grid(classes: int, variance: float) -> None:
    logits = draw(classes, seed=classes, variance=variance)
    assert logits.variance_C is not None
    p, aleatoric = plain_grid(logits.mean_C.numpy(), logits.variance_C.numpy())
    answer = exact([logits])[0]
    PROBABILITY.assert_close(answer.p_C, torch.from_numpy(p))
    ENTROPY.assert_close(scalar(answer.aleatoric), scalar(aleatoric))
    ENTROPY.assert_close(scalar(answer.total), scalar(-float((p * np.log(p)).sum())))


MIXED = [
    Logits(torch.tensor([0.0, -2.0, 1.0, 3.0]).double(), torch.tensor([0.0, 9.0, 100.0, 1e-6]).double()),
    Logits(torch.tensor([50.0, -2000.0, 0.0]).double(), torch.tensor([1.0, 1e6, 900.0]).double()),
    draw(100, 9, mean=0.0, variance=1e4),
    *(draw(classes, 9, variance=variance) for classes in (2, 16) for variance in (0.01, 1.0, 400.0)),
]


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_equals_a_grid_four_times_as_fine(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = exact([MIXED[index]])[0]
    for name in ("STEP", "GAUSSIAN_STEP", "GUMBEL_STEP"):
        monkeypatch.setattr(quadrature, name, getattr(quadrature, name) / 4)
    monkeypatch.setattr(quadrature, "BEND", quadrature.BEND * 1.5)
    monkeypatch.setattr(quadrature, "TAIL_SD", quadrature.TAIL_SD + 1)
    fine = exact([MIXED[index]])[0]
    FINER.assert_close(coarse.p_C, fine.p_C)
    FINER.assert_close(entropies(coarse), entropies(fine))


@pytest.mark.parametrize("deviation", [0.4, 0.45, 0.55, 0.8])
def test_the_two_inner_averages_agree(deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Logits(torch.tensor([0.0, 1.0, -1.5]).double(), torch.full((3,), deviation**2).double())
    answers = []
    for narrow in (0.0, 1.0):
        monkeypatch.setattr(quadrature, "NARROW", narrow)
        answers.append(exact([logits])[0])
    # Each average was made for its own side of 0.5, and is nearly as good a little beyond.
    FINER.assert_close(answers[0].p_C, answers[1].p_C)
    FINER.assert_close(entropies(answers[0]), entropies(answers[1]))


@pytest.mark.parametrize("variance", [0.5, 4.0, 49.0])
def test_equals_monte_carlo(variance: float) -> None:
    logits = draw(4, seed=3, variance=variance)
    assert logits.variance_C is not None
    samples = 50_000
    epsilon_SC = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p_SC = (logits.mean_C + logits.variance_C.sqrt() * epsilon_SC).softmax(-1)
    entropy_S = torch.special.entr(p_SC).sum(-1)
    answer, sampled = exact([logits])[0], monte_carlo(logits, samples, seed=0)
    five = 5 / math.sqrt(samples)  # standard errors
    assert ((answer.p_C - p_SC.mean(0)).abs() <= five * p_SC.std(0)).all()
    assert abs(answer.aleatoric - entropy_S.mean()) <= five * entropy_S.std()
    PROBABILITY.assert_close(sampled.p_C, p_SC.mean(0))
    PROBABILITY.assert_close(scalar(sampled.aleatoric), entropy_S.mean())
    assert sampled.total == pytest.approx(sampled.aleatoric + sampled.epistemic)


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (1.5, 0.2), (-3.0, 4.0), (2.0, 25.0), (5.0, 900.0)])
def test_two_classes_are_a_sigmoid(mean: float, variance: float) -> None:
    expected = sigmoid_mean(mean, variance)
    for share in (0.0, 0.3, 1.0):  # only the variance of the difference counts
        answer = one([0.0, mean], [(1 - share) * variance, share * variance])
        PROBABILITY.assert_close(answer.p_C, torch.tensor([1 - expected, expected], dtype=torch.float64))


@pytest.mark.parametrize("classes", [2, 7, 300])
@pytest.mark.parametrize("variance", [0.0, 1e-30])
def test_without_variance_it_is_the_softmax(classes: int, variance: float) -> None:
    logits = draw(classes, seed=1, mean=5.0, variance=variance)
    answer, expected = exact([logits])[0], softmax(logits.mean_C)
    LIMIT.assert_close(answer.p_C, logits.mean_C.softmax(-1))
    LIMIT.assert_close(entropies(answer), entropies(expected))
    assert expected.epistemic == 0
    assert expected.total == pytest.approx(torch.distributions.Categorical(logits=logits.mean_C).entropy().item())


def test_certain_logits_are_the_softmax_itself() -> None:
    mean_C = torch.tensor([1.0, -2.0])
    certain, uncertain = Logits(mean_C), Logits(mean_C, torch.ones(2))
    answers = exact([certain, uncertain, certain])
    assert answers[0].p_C.equal(mean_C.double().softmax(-1))
    assert answers[0].p_C.equal(answers[2].p_C)
    assert answers[0].epistemic == 0 < answers[1].epistemic
    assert monte_carlo(certain, 5, 1).p_C.equal(answers[0].p_C)


@pytest.mark.parametrize("classes", [2, 5, 300])
def test_huge_variance_is_uniform_and_all_of_it_doubt(classes: int) -> None:
    generator = torch.Generator().manual_seed(2)
    mean_C = 3 * torch.randn(classes, generator=generator, dtype=torch.float64)
    gaps = []
    for variance in (1e2, 1e6, 1e12, 1e38):
        answer = exact([Logits(mean_C, torch.full_like(mean_C, variance))])[0]
        gaps.append((float((answer.p_C * classes - 1).abs().max()), answer.aleatoric, math.log(classes) - answer.total))
    for before, after in pairwise(gaps):
        assert all(b < a for b, a in zip(after[:2], before[:2], strict=True))
    assert max(gaps[2]) < 1e-4
    assert max(gaps[3]) < 1e-8


@pytest.mark.parametrize("variance", [0.0, 0.25, 30.0])
def test_identical_logits_share_evenly(variance: float) -> None:
    answer = one([7.0] * 5, [variance] * 5)
    LIMIT.assert_close(answer.p_C, torch.full((5,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("mean", "variance"),
    [
        ([0.0, 1e6], [0.0, 0.0]),
        ([1e30, -1e30, 0.0], [1e38, 0.0, 1e30]),
        ([1e308, -1e308], [0.0, 1e300]),
        ([1e308, -1e308], [1e300, 0.0]),
        ([0.0, 0.0, 0.0], [1e300, 1e300, 1e-300]),
        ([-5.0] * 999 + [5.0], [1e-20] * 999 + [1e10]),
        ([800.0, 0.0, -800.0], [1.0, 1e-3, 0.0]),
    ],
)
def test_extremes_are_finite_and_sane(mean: list[float], variance: list[float]) -> None:
    answer = exact([Logits(torch.tensor(mean, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64))])[0]
    assert answer.p_C.isfinite().all()
    assert (answer.p_C >= 0).all()
    assert float(answer.p_C.sum()) == pytest.approx(1)
    assert 0 <= answer.aleatoric <= answer.total <= math.log(len(mean)) + 1e-9
    assert answer.epistemic >= 0


def test_a_batch_equals_its_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [draw(classes, classes, variance=variance) for classes in (2, 31, 4) for variance in (0.0, 1.0, 1e4)]
    requests.insert(3, Logits(torch.tensor([1.0, 2.0])))
    whole = exact(requests)
    monkeypatch.setattr("motet.server.heads.predictive.MOST_CELLS", 1)
    monkeypatch.setattr(quadrature, "INNER_CELLS", 1)
    for request, answer, chunked in zip(requests, whole, exact(requests), strict=True):
        alone = exact([request])[0]
        for other in (alone, chunked):
            PROBABILITY.assert_close(answer.p_C, other.p_C)
            ENTROPY.assert_close(entropies(answer), entropies(other))
    assert exact([]) == []


def test_a_temperature_divides_the_logits() -> None:
    logits = draw(4, 5).tempered(2.5)
    assert logits.variance_C is not None
    original = draw(4, 5)
    epsilon_SC = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert original.variance_C is not None
    PROBABILITY.assert_close(
        logits.mean_C + logits.variance_C.sqrt() * epsilon_SC,
        (original.mean_C + original.variance_C.sqrt() * epsilon_SC) / 2.5,
    )
    assert Logits(torch.ones(2)).tempered(4).mean_C.tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("mean", "variance", "said"),
    [
        ([math.nan, 0.0], [1.0, 1.0], "logits are not finite"),
        ([math.inf, 0.0], None, "logits are not finite"),
        ([0.0, 0.0], [1.0, math.inf], "variances"),
        ([0.0, 0.0], [1.0, math.nan], "variances"),
        ([0.0, 0.0], [1.0, -1e-9], "variances"),
    ],
)
def test_what_is_no_distribution_is_refused(mean: list[float], variance: list[float] | None, said: str) -> None:
    logits = Logits(torch.tensor(mean), None if variance is None else torch.tensor(variance))
    with pytest.raises(HeadError, match=said):
        exact([draw(2, 1), logits])
    with pytest.raises(HeadError, match=said):
        monte_carlo(logits, 3, 1)
