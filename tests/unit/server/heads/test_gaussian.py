"""m and v are vbll's own, for every parameterization; so is its Monte Carlo answer."""

from __future__ import annotations

import math

import pytest
import torch

from motet.adapters.heads import HeadFile, Parameterization
from motet.server.heads import gaussian
from motet.server.heads.batch import Head, Row, logits, predict
from motet.server.heads.errors import HeadError
from motet.server.heads.gaussian import GaussianHead
from motet.server.heads.plain import SoftmaxHead
from motet.server.heads.predictive import Logits, exact
from motet.server.heads.sampling import monte_carlo
from tests.support.tolerances import TOLERANCES
from tests.unit.server.heads.oracles import KINDS, layer

FEATURES = 7


def features(seed: int, width: int = 12) -> torch.Tensor:
    return torch.randn(FEATURES, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(kind: str, seed: int) -> GaussianHead:
    return GaussianHead.of(Parameterization(kind), layer(kind, seed).state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_variance_are_those_of_vbll(kind: str, dtype: torch.dtype) -> None:
    reference, x_ND = layer(kind, seed=1), features(2)
    with torch.no_grad():
        expected = reference.logit_predictive(x_ND)
    state = {name: tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    mean_NC, variance_NC = GaussianHead.of(Parameterization(kind), state).logits(x_ND)
    assert mean_NC.dtype == variance_NC.dtype == dtype
    tolerance = TOLERANCES["head logits", dtype]
    tolerance.assert_close(mean_NC, expected.mean, x_ND.abs() @ reference.W_mean.abs().T + 1)
    tolerance.assert_close(variance_NC, expected.variance)


def test_the_floor_is_that_of_vbll() -> None:
    reference = layer("diagonal", seed=1)
    reference.noise_logdiag.data.fill_(-40.0)
    with torch.no_grad():
        expected = reference.logit_predictive(features(1) * 0).variance
    _, variance_NC = GaussianHead.of(Parameterization.DIAGONAL, reference.state_dict()).logits(features(1) * 0)
    TOLERANCES["head logits", torch.float64].assert_close(variance_NC, expected)


def test_classes_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x_ND = head_of("dense", 3), features(4)
    whole = head.logits(x_ND)
    monkeypatch.setattr(gaussian, "MOST_CELLS", 2 * FEATURES * 12)
    for part, expected in zip(head.logits(x_ND), whole, strict=True):
        TOLERANCES["head logits", torch.float64].assert_close(part, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_that_of_vbll(kind: str) -> None:
    """vbll's own answer is an average of draws: these are five standard errors, of p(1 - p) at most."""
    reference, x_ND, samples = layer(kind, seed=5, spread=0.5), features(6), 100_000
    torch.manual_seed(0)
    with torch.no_grad():
        expected_NC = reference.predictive(x_ND, n_samples=samples)
    head = Head(GaussianHead.of(Parameterization(kind), reference.state_dict()))
    answers = predict([Row(head, x_D) for x_D in x_ND])
    p_NC = torch.stack([answer.p_C for answer in answers])
    assert ((p_NC - expected_NC).abs() <= 5 * (p_NC * (1 - p_NC) / samples).sqrt()).all()


def test_the_draws_are_those_of_vbll() -> None:
    reference, x_1D = layer("dense", seed=5), features(6)[:1]
    torch.manual_seed(11)
    with torch.no_grad():
        expected_1C = reference.predictive(x_1D, n_samples=20)
    head = Head(GaussianHead.of(Parameterization.DENSE, reference.state_dict()))
    answer = predict([Row(head, x_1D[0], samples=20, seed=11)])[0]
    TOLERANCES["predictive", torch.float64].assert_close(answer.p_C, expected_1C[0])


def test_a_seed_is_an_answer() -> None:
    logits = Logits(torch.zeros(3), torch.ones(3))
    first, again, other = (monte_carlo(logits, 50, seed) for seed in (1, 1, 2))
    assert first.p_C.equal(again.p_C)
    assert first.aleatoric == again.aleatoric
    assert not first.p_C.equal(other.p_C)


def test_drawing_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Logits(torch.zeros(3), torch.ones(3))
    whole = monte_carlo(logits, 4000, 1)
    monkeypatch.setattr("motet.server.heads.sampling.MOST_CELLS", 3 * 1024)
    parts = monte_carlo(logits, 4000, 1)
    TOLERANCES["predictive", torch.float64].assert_close(parts.p_C, whole.p_C)
    assert parts.aleatoric == pytest.approx(whole.aleatoric)


def test_rows_of_many_heads_are_their_own() -> None:
    heads = [Head(head_of(kind, seed), temperature=1 + seed / 2) for seed, kind in enumerate(KINDS)]
    generator = torch.Generator().manual_seed(9)
    weight_CD, bias_C = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 12), (3,)))
    heads.append(Head(SoftmaxHead(weight_CD, bias_C), temperature=2.0))
    x_ND = features(8)
    rows = [
        Row(heads[index * 3 % 4], x_D, samples=None if index % 3 else 10, seed=index) for index, x_D in enumerate(x_ND)
    ]
    for row, answer in zip(rows, predict(rows), strict=True):
        mean_1C, variance_1C = row.head.layer.logits(row.x_D[None])
        alone = Logits(
            mean_1C[0] / row.head.temperature,
            None if variance_1C is None else variance_1C[0] / row.head.temperature**2,
        )
        expected = exact([alone])[0] if row.samples is None else monte_carlo(alone, row.samples, row.seed)
        TOLERANCES["predictive", torch.float64].assert_close(answer.p_C, expected.p_C)
        assert answer.aleatoric == pytest.approx(expected.aleatoric, abs=1e-9)
    plain = predict([Row(heads[3], x_ND[0])])[0]
    TOLERANCES["predictive", torch.float64].assert_close(plain.p_C, ((weight_CD @ x_ND[0] + bias_C) / 2).softmax(-1))
    assert plain.epistemic == 0


@pytest.mark.parametrize("kind", [*KINDS, "softmax"])
def test_a_head_of_a_file(kind: str) -> None:
    tensors = (
        layer(kind, 1).float().state_dict()
        if kind != "softmax"
        else {"weight": torch.ones(5, 12), "bias": torch.arange(5.0)}
    )
    file = HeadFile(parameterization=Parameterization(kind), labels=tuple("ABCDE"), tensors=tensors, temperature=2.0)
    head, x_D = Head.of(file, torch.device("cpu")), features(1)[0].to(torch.bfloat16)
    found = logits([Row(head, x_D)])[0]
    assert found.mean_C.dtype == torch.float32
    if kind == "softmax":
        assert found.variance_C is None
        expected_C = (x_D.float().sum() + torch.arange(5.0)) / 2
        TOLERANCES["head logits", torch.float32].assert_close(found.mean_C, expected_C, torch.full((5,), 20.0))
    else:
        assert found.variance_C is not None
        with torch.no_grad():
            expected = layer(kind, 1).float().logit_predictive(x_D.float()[None])
        TOLERANCES["head logits", torch.float32].assert_close(found.variance_C, expected.variance[0] / 4)


def test_a_hidden_state_that_overflowed_is_refused() -> None:
    with pytest.raises(HeadError, match="not finite"):
        predict([Row(Head(head_of("dense", 1)), torch.full((12,), math.inf, dtype=torch.float64))])
