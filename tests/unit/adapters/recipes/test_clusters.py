"""Clusters of equal size."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from motet.adapters.recipes.clusters import _assigned, clustered_order


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within(points_NI: torch.Tensor, order_N: torch.Tensor, n_clusters: int) -> float:
    """Summed squared distance of the points to the mean of their cluster."""
    groups_KSI = points_NI[order_N].view(n_clusters, -1, points_NI.shape[1])
    return float((groups_KSI - groups_KSI.mean(1, keepdim=True)).square().sum())


@pytest.mark.parametrize(("n_points", "n_clusters"), [(96, 16), (12, 1), (5, 5), (60, 4)])
def test_every_point_comes_once_and_ascending_within_its_cluster(n_points: int, n_clusters: int) -> None:
    points_NI = torch.randn(n_points, 7, generator=seeded(1))
    order_N = clustered_order(points_NI, n_clusters, seeded(0))
    assert order_N.dtype == torch.int64
    assert sorted(order_N.tolist()) == list(range(n_points))
    assert all(cluster == sorted(cluster) for cluster in order_N.view(n_clusters, -1).tolist())


def test_clusters_are_equal_even_where_the_points_are_not() -> None:
    """Nine points on one place and three far away, in two clusters: the crowd is split, the others stay together."""
    points_NI = torch.cat([torch.zeros(9, 2), torch.full((3, 2), 10.0)])
    first, second = clustered_order(points_NI, 2, seeded(0)).view(2, -1).tolist()
    assert {9, 10, 11} <= set(first) or {9, 10, 11} <= set(second)


def test_known_clusters_are_found() -> None:
    random = seeded(3)
    centres_KI = 10 * torch.randn(4, 8, generator=random)
    belongs = torch.randperm(40, generator=random) % 4
    points_NI = centres_KI[belongs] + 0.1 * torch.randn(40, 8, generator=random)
    orders = [clustered_order(points_NI, 4, seeded(seed)) for seed in range(4)]
    found = min(orders, key=lambda order_N: within(points_NI, order_N, 4))
    assert all(len(set(cluster)) == 1 for cluster in belongs[found].view(4, -1).tolist())


def test_the_distance_within_is_far_less_than_by_chance() -> None:
    random = seeded(5)
    centres_NI = torch.randn(16, 6, generator=random).repeat_interleave(12, 0)
    points_NI = centres_NI + torch.randn(192, 6, generator=random) / 2
    by_chance = min(within(points_NI, torch.randperm(192, generator=random), 16) for _ in range(20))
    assert within(points_NI, clustered_order(points_NI, 16, seeded(0)), 16) < 0.5 * by_chance


def test_the_order_depends_on_the_seed_alone() -> None:
    points_NI = torch.randn(64, 5, generator=seeded(2))
    state = torch.get_rng_state()
    orders = [clustered_order(points_NI, 8, seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(state, torch.get_rng_state())


def test_the_assignment_is_the_best_of_all() -> None:
    """The oracle: every split of eight points into two halves."""
    points_NI, centres_KI = torch.randn(8, 3, generator=seeded(7)), torch.randn(2, 3, generator=seeded(8))
    distance_NK = (points_NI[:, None] - centres_KI).square().sum(-1)
    best = min(
        combinations(range(8), 4),
        key=lambda half: sum(float(distance_NK[point, int(point not in half)]) for point in range(8)),
    )
    labels_N = _assigned(points_NI, centres_KI, 4)
    assert (labels_N == 0).nonzero()[:, 0].tolist() == list(best)
    greedy_N = distance_NK.argmin(1)
    assert int((greedy_N == 0).sum()) != 4, "the nearest centre would not be balanced here"
