"""Merges with trimmed weights over HTTP: what they answer and classify is the dense trimmed model's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.gated import MEMORY, Gated
from tests.e2e.process import ADMIN_KEY, eventually
from tests.e2e.test_merges import PATH, POOL, SUPPORT, TEXTS, cosine, features, made, means, refused
from tests.support.tolerances import TOLERANCES

WEIGHTS = [0.1, 0.2, 0.3, 0.4]


def delete(gated: Gated, name: str) -> httpx.Response:
    return gated.server.http.delete(f"{PATH}/{name}", headers={"Authorization": f"Bearer {ADMIN_KEY}"})


@pytest.fixture
def trimmed(gated: Gated) -> Iterator[dict[str, Any]]:
    card = made(gated, weights=WEIGHTS, trim=0.5)
    yield card
    assert delete(gated, card["id"]).status_code in (204, 404)


def test_it_answers_as_the_dense_trimmed_model(gated: Gated, trimmed: dict[str, Any]) -> None:
    oracle, errors = gated.pool.trimmed(WEIGHTS, 0.5)
    widths = [min(oracle.get_submodule(target).weight.shape) for target in errors]
    assert trimmed["trim"]["share"] == 0.5
    assert trimmed["trim"]["ranks"] == {"smallest": min(widths) // 2, "largest": max(widths) // 2}
    assert trimmed["trim"]["error"]["largest"] == pytest.approx(max(errors.values()), abs=1e-6)
    assert trimmed["trim"]["error"]["mean"] == pytest.approx(statistics.mean(errors.values()), abs=1e-6)
    answer = gated.check(oracle, model=trimmed["id"])
    assert answer["model"] == trimmed["id"]
    assert gated.server.http.get(f"{PATH}/{trimmed['id']}").json() == trimmed
    assert made(gated, weights=WEIGHTS)["trim"] is None


def test_among_others(gated: Gated, trimmed: dict[str, Any]) -> None:
    """One batch of the trimmed merge, the same one whole, another adapter and the base."""
    asks: list[tuple[Any, dict[str, Any]]] = [
        (gated.pool.trimmed(WEIGHTS, 0.5)[0], {"model": trimmed["id"]}),
        (gated.pool.oracle(WEIGHTS), {"model": POOL, "gate": {"weights": WEIGHTS}}),
        (gated.users.oracle(WEIGHTS), {"model": "users", "gate": {"weights": WEIGHTS}}),
        (gated.dense, {"model": "tiny"}),
    ]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda ask: gated.check(ask[0], **ask[1]), asks * 2))


def test_its_class_means_are_the_trimmed_models(gated: Gated, trimmed: dict[str, Any]) -> None:
    dense, _ = gated.pool.trimmed(WEIGHTS, 0.5)
    centre = means(features(dense, gated, [one["text"] for one in SUPPORT]))
    answer = gated.server.post("/v1/classify", {"model": trimmed["id"], "input": TEXTS}).json()
    for row, found in zip(features(dense, gated, TEXTS), answer["data"], strict=True):
        expected = torch.tensor([cosine(row, one) for one in centre.values()]).softmax(0)
        probs = torch.tensor([found["probs"][label] for label in centre])
        TOLERANCES["scores of served features", torch.float32].assert_close(probs, expected)


def test_scored_members_are_whole(gated: Gated) -> None:
    """As in the paper: α is found first, and then the merged weights are trimmed."""
    whole, trimmed = made(gated, gamma=0.4), made(gated, gamma=0.4, trim=0.7)
    try:
        assert trimmed["id"] != whole["id"]
        assert (trimmed["alpha"], trimmed["members"]) == (whole["alpha"], whole["members"])
    finally:
        assert delete(gated, trimmed["id"]).status_code == 204


def test_materialised_once_and_freed_when_deleted(gated: Gated) -> None:
    before = gated.server.metrics[MEMORY]
    with ThreadPoolExecutor(4) as threads:
        lives = range(60, 64)
        cards = list(threads.map(lambda s: made(gated, weights=WEIGHTS, trim=0.6, expires_s=s), lives))
    other = made(gated, weights=WEIGHTS, trim=0.6, support=SUPPORT[::-1])
    assert cards[0]["id"] != other["id"]
    assert cards[0]["trim"] == other["trim"]
    weights = [gated.users.base.get_submodule(target).weight for target in gated.pool.members]
    assert gated.server.metrics[MEMORY] - before == 4 * sum(weight.numel() for weight in weights)
    assert delete(gated, cards[0]["id"]).status_code == 204
    eventually(lambda: gated.server.metrics[MEMORY] == before)
    gated.check(gated.pool.trimmed(WEIGHTS, 0.6)[0], model=other["id"])
    assert delete(gated, other["id"]).status_code == 204
    eventually(lambda: gated.server.metrics[MEMORY] == before)


def test_inline(gated: Gated) -> None:
    merge = {"support": SUPPORT, "weights": WEIGHTS, "trim": 0.25}
    oracle, _ = gated.pool.trimmed(WEIGHTS, 0.25)
    answer = gated.check(oracle, model=POOL, merge=merge)
    assert made(gated, weights=WEIGHTS, trim=0.25)["id"] == answer["merge"]
    assert delete(gated, answer["merge"]).status_code == 204


@pytest.mark.parametrize("trim", [0, -0.1, 1.1, float("nan"), float("inf"), 0.001, "half"])
def test_impossible_shares(gated: Gated, trim: Any) -> None:
    merge = {"support": SUPPORT, "trim": trim}
    refused(gated, PATH, merge, 400, "trim")
    inline = {"model": POOL, "prompt": "a", "max_tokens": 1, "merge": merge}
    refused(gated, "/v1/completions", inline, 400, "merge.trim")


def test_who_cannot_be_trimmed(gated: Gated) -> None:
    for name, status in (("left", 400), ("users", 400), ("tiny", 404)):
        answer = gated.server.post(f"/v1/adapters/{name}/merges", {"support": SUPPORT, "trim": 0.5})
        assert answer.status_code == status, answer.text
