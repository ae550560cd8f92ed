"""AMT's scores against loops that spell the formulas out, and what is known of α whatever the features are."""

from __future__ import annotations

import math

import pytest
import torch

from motet.adapters.errors import GateError
from motet.adapters.gates.merge import (
    Merge,
    classify,
    explicit,
    merged,
    prototypes,
    separation,
    similarities,
    uniform,
)
from tests.support.tolerances import TOLERANCES

CLOSE = TOLERANCES["merge scores", torch.float32]
CLASSES, WIDTH, MEMBERS = 4, 9, 4
COUNTS = (3, 1, 2, 5)
LABELS_S = torch.tensor([label for label, count in enumerate(COUNTS) for _ in range(count)])


def features(seed: int, noise: float = 1.0, views: int = 1) -> torch.Tensor:
    """[views · S, D]: a direction per class and noise around it."""
    generator = torch.Generator().manual_seed(seed)
    centres_CD = torch.randn(CLASSES, WIDTH, generator=generator)
    of_rows_SD = centres_CD[LABELS_S].repeat(views, 1)
    return of_rows_SD + noise * torch.randn(of_rows_SD.shape, generator=generator)


def cosines(seed: int, noise: float = 1.0) -> torch.Tensor:
    """[S, C] of one member: a clean support and an augmented one."""
    clean_SD = features(seed, noise)
    generator = torch.Generator().manual_seed(100 + seed)
    augmented_SD = clean_SD + 0.3 * noise * torch.randn(clean_SD.shape, generator=generator)
    return similarities(augmented_SD, prototypes(clean_SD, LABELS_S, CLASSES))


def looped_cosines(rows: list[list[float]], clean: list[list[float]], labels: list[int]) -> list[list[float]]:
    """cos(row, mean of the clean rows of each class), in Python's float64."""

    def norm(values: list[float]) -> float:
        return math.sqrt(sum(value * value for value in values))

    means = []
    for label in range(max(labels) + 1):
        own = [row for row, of_row in zip(clean, labels, strict=True) if of_row == label]
        means.append([sum(row[place] for row in own) / len(own) for place in range(len(own[0]))])
    return [
        [sum(one * other for one, other in zip(row, mean, strict=True)) / (norm(row) * norm(mean)) for mean in means]
        for row in rows
    ]


def looped_separation(table: list[list[float]], labels: list[int]) -> tuple[float, float]:
    classes = len(table[0])
    intra = inter = 0.0
    for label in range(classes):
        own = [row for row, of_row in zip(table, labels, strict=True) if of_row == label]
        intra += sum(row[label] for row in own) / len(own) / classes
        for row in own:
            apart = 0.0
            for other in range(classes):
                if other != label:
                    apart += row[other] / (classes - 1)
            inter += apart / len(own) / classes
    return intra, inter


def test_scores_and_weights_are_those_of_explicit_loops() -> None:
    gamma, beta, top_k = 0.7, 3.0, 2
    tables, scores = [], []
    for seed in range(MEMBERS):
        clean_SD, augmented_SD = features(seed), features(seed, noise=2.0)
        tables.append(similarities(augmented_SD, prototypes(clean_SD, LABELS_S, CLASSES)))
        loops = looped_cosines(augmented_SD.tolist(), clean_SD.tolist(), LABELS_S.tolist())
        CLOSE.assert_close(tables[-1], torch.tensor(loops))
        intra, inter = looped_separation(loops, LABELS_S.tolist())
        scores.append((gamma * intra - (1 - gamma) * inter, intra, inter))
    found = merged(tables, LABELS_S, gamma=gamma, beta=beta, top_k=top_k)
    best = sorted(range(MEMBERS), key=lambda member: -scores[member][0])[:top_k]
    powers = {member: math.exp(-beta + beta * scores[member][0]) for member in best}
    alpha = [powers.get(member, 0.0) / sum(powers.values()) for member in range(MEMBERS)]
    for actual, expected in (
        (found.intra_P, [each[1] for each in scores]),
        (found.inter_P, [each[2] for each in scores]),
        (found.score_P, [each[0] for each in scores]),
        (found.alpha_P, alpha),
    ):
        assert actual.dtype == torch.float32
        CLOSE.assert_close(actual, torch.tensor(expected))


def test_prototypes_are_means_of_the_classes() -> None:
    rows_SD = torch.tensor([[1.0, 2.0], [5.0, 0.0], [3.0, 4.0]])
    assert prototypes(rows_SD, torch.tensor([1, 0, 1]), 2).tolist() == [[5.0, 0.0], [2.0, 3.0]]


def test_several_augmented_views_are_more_rows_of_the_same_classes() -> None:
    """Labels belong to the rows that are compared, not to the clean support."""
    clean_SD, views_SD = features(1), features(2, views=3)
    table = similarities(views_SD, prototypes(clean_SD, LABELS_S, CLASSES))
    found = separation(table, LABELS_S.repeat(3))
    each = [separation(table[start : start + len(LABELS_S)], LABELS_S) for start in range(0, len(table), len(LABELS_S))]
    CLOSE.assert_close(torch.tensor(found), torch.tensor(each).mean(0))


def test_a_class_with_more_examples_does_not_count_more() -> None:
    """Repeating the examples of one class changes nothing."""
    table = cosines(3)
    again = LABELS_S == 1
    repeated = separation(
        torch.cat([table, table[again], table[again]]), torch.cat([LABELS_S, LABELS_S[again], LABELS_S[again]])
    )
    CLOSE.assert_close(torch.tensor(repeated), torch.tensor(separation(table, LABELS_S)))


def ranked() -> list[torch.Tensor]:
    """Members from the best to the worst, not in that order."""
    return [cosines(7, noise) for noise in (1.5, 0.1, 3.0, 0.8)]


def test_a_large_beta_leaves_the_best_alone() -> None:
    for beta in (1e4, 1e300):
        assert merged(ranked(), LABELS_S, beta=beta, top_k=3).alpha_P.tolist() == [0, 1, 0, 0]


def test_no_beta_weights_the_best_alike() -> None:
    CLOSE.assert_close(merged(ranked(), LABELS_S, beta=0.0, top_k=2).alpha_P, torch.tensor([0, 0.5, 0, 0.5]))


def test_top_k_of_all_is_a_softmax_over_all() -> None:
    found = merged(ranked(), LABELS_S, beta=2.0, top_k=4)
    CLOSE.assert_close(found.alpha_P, torch.softmax(2.0 * found.score_P, 0))


@pytest.mark.parametrize(("gamma", "sign", "part"), [(1.0, 1, "intra_P"), (0.0, -1, "inter_P")])
def test_gamma_chooses_between_near_and_apart(gamma: float, sign: int, part: str) -> None:
    found = merged(ranked(), LABELS_S, gamma=gamma)
    CLOSE.assert_close(found.score_P, sign * getattr(found, part))
    assert found.alpha_P.argmax() == (sign * getattr(found, part)).argmax()


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_identical_members_share_alike(top_k: int) -> None:
    alpha_P = merged([cosines(5)] * MEMBERS, LABELS_S, beta=50.0, top_k=top_k).alpha_P
    CLOSE.assert_close(alpha_P, torch.tensor([1 / top_k] * top_k + [0.0] * (MEMBERS - top_k)))


def test_the_order_of_the_support_does_not_matter() -> None:
    order = torch.randperm(len(LABELS_S), generator=torch.Generator().manual_seed(0))
    assert order.tolist() != list(range(len(LABELS_S)))
    before, after = (
        merged(
            [similarities(features(s)[o], prototypes(features(s)[o], LABELS_S[o], CLASSES)) for s in range(MEMBERS)],
            LABELS_S[o],
        )
        for o in (torch.arange(len(LABELS_S)), order)
    )
    for part in Merge.__dataclass_fields__:
        CLOSE.assert_close(getattr(after, part), getattr(before, part))


def test_one_unaugmented_example_a_class_says_nothing_of_nearness() -> None:
    """The class mean is the example itself: intra is 1 for every member, and only inter decides."""
    labels_S = torch.tensor([2, 0, 1])
    tables = []
    for seed in range(MEMBERS):
        clean_SD = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
        tables.append(similarities(clean_SD, prototypes(clean_SD, labels_S, 3)))
    found = merged(tables, labels_S)
    CLOSE.assert_close(found.intra_P, torch.ones(MEMBERS))
    assert found.alpha_P.argmax() == found.inter_P.argmin()


def test_probabilities_are_a_softmax_of_scaled_cosines() -> None:
    queries_ND, means_CD = features(1)[:5], prototypes(features(2), LABELS_S, CLASSES)
    table = torch.tensor(looped_cosines(queries_ND.tolist(), means_CD.tolist(), list(range(CLASSES))))
    expected = [[math.exp(10 * (cosine - 0.25)) for cosine in row] for row in table.tolist()]
    probabilities_NC = classify(queries_ND, means_CD, scale=10.0, bias=-0.25)
    CLOSE.assert_close(probabilities_NC, torch.tensor([[each / sum(row) for each in row] for row in expected]))
    assert torch.equal(classify(queries_ND, means_CD, 10.0).argmax(1), table.argmax(1))


def test_a_zero_feature_is_as_near_to_every_class() -> None:
    CLOSE.assert_close(classify(torch.zeros(1, 3), torch.eye(3), 10.0), torch.full((1, 3), 1 / 3))


def test_uniform_and_given_weights() -> None:
    CLOSE.assert_close(uniform(5), torch.full((5,), 0.2))
    CLOSE.assert_close(explicit([0.3333, 0.3333, 0.3333], 3), torch.full((3,), 1 / 3))
    assert explicit([0, 1, 0, 0], 4).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ([0.5, 0.5], "alpha has 2 numbers; the pool has 4 members"),
        ([0.5, 0.5, 0.2, -0.2], r"alpha\[3\]=-0.2"),
        ([0.0, 1.5, 0.0, 0.0], r"alpha\[1\]=1.5"),
        ([0.0, math.nan, 1.0, 0.0], r"alpha\[1\]=nan"),
        ([0.0, math.inf, 0.0, 0.0], r"alpha\[1\]=inf"),
        ([0.25, 0.25, 0.25, 0.248], "sums to 0.998, not to 1 within 0.001"),
        ([0.0, 0.0, 0.0, 0.0], "sums to 0"),
    ],
)
def test_given_weights_that_are_no_mixture_are_refused(alpha: list[float], message: str) -> None:
    with pytest.raises(GateError, match=message) as caught:
        explicit(alpha, 4)
    assert caught.value.field == "alpha"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("gamma", {"gamma": -0.1}),
        ("gamma", {"gamma": 1.1}),
        ("gamma", {"gamma": math.nan}),
        ("beta", {"beta": -1.0}),
        ("beta", {"beta": math.inf}),
        ("beta", {"beta": math.nan}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 5}),
    ],
)
def test_parameters_out_of_range_are_named(field: str, changes: dict[str, float]) -> None:
    with pytest.raises(GateError, match=f"^{field}=") as caught:
        merged(ranked(), LABELS_S, **changes)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "labels", "classes", "message"),
    [
        ("classes", [0, 0], 1, "at least 2"),
        ("support", [0, 1], 3, "2 examples of 3 classes"),
        ("labels", [0, 1, 1, 3], 4, "class 2 has no example"),
        ("labels", [0, 1, 2], 2, "labels run from 0 to 2"),
        ("labels", [0, -1, 1], 2, "labels run from -1 to 1"),
        ("labels", [0.0, 1.0], 2, "float32"),
        ("labels", [[0, 1]], 2, r"\[1, 2\]"),
    ],
)
def test_a_support_that_cannot_be_scored_is_named(field: str, labels: list[float], classes: int, message: str) -> None:
    labels_S = torch.tensor(labels)
    with pytest.raises(GateError, match=message) as caught:
        prototypes(torch.ones(labels_S.shape[0], 3), labels_S, classes)
    assert caught.value.field == field
    with pytest.raises(GateError, match=message):
        separation(torch.ones(labels_S.shape[0], classes), labels_S)


def test_one_label_too_few_is_named() -> None:
    with pytest.raises(GateError, match="the support has 3 examples"):
        prototypes(torch.ones(3, 2), torch.tensor([0, 1]), 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_named(value: float) -> None:
    bad_SD = features(1)
    bad_SD[2, 3] = value
    with pytest.raises(GateError, match=r"support\[2\] hold NaN or infinity"):
        prototypes(bad_SD, LABELS_S, CLASSES)
    with pytest.raises(GateError, match=r"features\[2\]"):
        similarities(bad_SD, torch.ones(CLASSES, WIDTH))
    with pytest.raises(GateError, match=r"prototypes\[2\]"):
        similarities(torch.ones(CLASSES, WIDTH), bad_SD)
    with pytest.raises(GateError, match=r"similarities\[2\]"):
        separation(bad_SD[:, :CLASSES], LABELS_S)


def test_features_of_another_shape_are_named() -> None:
    with pytest.raises(GateError, match="features are 3 wide, prototypes 4"):
        similarities(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(GateError, match=r"support have shape \[3\]"):
        prototypes(torch.ones(3), torch.tensor([0, 1, 1]), 2)
    with pytest.raises(GateError, match="int64"):
        similarities(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3))


def test_a_pool_has_members_and_a_classifier_finite_numbers() -> None:
    with pytest.raises(GateError, match="no members"):
        merged([], LABELS_S)
    with pytest.raises(GateError, match="members=0"):
        uniform(0)
    for field, numbers in (("scale", (math.nan, 0.0)), ("bias", (10.0, math.inf))):
        with pytest.raises(GateError, match=f"^{field}=") as caught:
            classify(torch.ones(1, 2), torch.eye(2), *numbers)
        assert caught.value.field == field
