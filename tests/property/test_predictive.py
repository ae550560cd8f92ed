"""Whatever the logits: probabilities sum to one, entropies are in their order, labels may be renamed."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings, strategies as st

from motet.server.heads.predictive import Logits, Predictive, exact
from motet.server.heads.sampling import monte_carlo
from tests.support.tolerances import TOLERANCES

means = st.floats(-1e4, 1e4) | st.floats(-5, 5)
deviations = st.just(0.0) | st.floats(1e-6, 1.0) | st.floats(0.4, 0.6) | st.floats(1.0, 1e4)


@st.composite
def logits(draw: st.DrawFn, most: int = 12) -> Logits:
    classes = draw(st.integers(2, most))
    mean_C = draw(st.lists(means, min_size=classes, max_size=classes))
    deviation_C = draw(st.lists(deviations, min_size=classes, max_size=classes))
    return Logits(torch.tensor(mean_C, dtype=torch.float64), torch.tensor(deviation_C, dtype=torch.float64).square())


def require_sane(answer: Predictive, classes: int) -> None:
    assert (answer.p_C >= 0).all()
    assert abs(float(answer.p_C.sum()) - 1) < 1e-12
    assert 0 <= answer.aleatoric <= answer.total <= math.log(classes) + 1e-12
    assert answer.epistemic >= 0
    assert answer.epistemic == answer.total - answer.aleatoric


@settings(max_examples=100, deadline=None)
@given(st.lists(logits(), min_size=1, max_size=4))
def test_probabilities_and_entropies(requests: list[Logits]) -> None:
    for request, answer in zip(requests, exact(requests), strict=True):
        require_sane(answer, len(request.mean_C))


@settings(max_examples=50, deadline=None)
@given(logits(), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_sampled_probabilities_and_entropies(request: Logits, samples: int, seed: int) -> None:
    require_sane(monte_carlo(request, samples, seed), len(request.mean_C))


@settings(max_examples=60, deadline=None)
@given(logits(), st.randoms(use_true_random=False), st.floats(-100, 100))
def test_labels_may_be_renamed_and_logits_shifted(request: Logits, random: object, shift: float) -> None:
    order = list(range(len(request.mean_C)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert request.variance_C is not None
    renamed = Logits(request.mean_C[order] + shift, request.variance_C[order])
    answer, other = exact([request, renamed])
    TOLERANCES["predictive", torch.float64].assert_close(other.p_C, answer.p_C[order])
    assert abs(answer.total - other.total) < 1e-9
    assert abs(answer.aleatoric - other.aleatoric) < 1e-9


@settings(max_examples=60, deadline=None)
@given(logits(), st.floats(0.0, 10.0))
def test_raising_a_mean_raises_its_probability(request: Logits, by: float) -> None:
    raised_C = request.mean_C.clone()
    raised_C[0] += by
    answer, raised = exact([request, Logits(raised_C, request.variance_C)])
    assert raised.p_C[0] >= answer.p_C[0] - 1e-10
    assert (raised.p_C[1:] <= answer.p_C[1:] + 1e-10).all()
