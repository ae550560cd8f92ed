"""Merges of a pool over HTTP: made from a support set, asked as models, listed, deleted, and classified with."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from tests.e2e.gated import Gated
from tests.e2e.process import ADMIN_KEY, eventually
from tests.support.tolerances import TOLERANCES

POOL, PATH = "tenant/pool", "/v1/adapters/tenant/pool/merges"
SUPPORT = [
    {"text": text, "label": label}
    for text, label in [
        ("the quick brown fox", "animal"),
        ("one two three", "number"),
        ("the lazy dog", "animal"),
        ("1, 2, 3!", "number"),
        ("jumps over", "verb"),
    ]
]
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
TEXTS = ["the other fox", "two, three", "over and over"]


def made(gated: Gated, **body: Any) -> dict[str, Any]:
    answer = gated.server.post(PATH, {"support": SUPPORT, **body})
    assert answer.status_code == 200, answer.text
    card: dict[str, Any] = answer.json()
    return card


@torch.no_grad()
def features(model: Any, gated: Gated, texts: Sequence[str]) -> torch.Tensor:
    """[N, D] float64, after the last norm at the last token."""
    rows = [model.model(input_ids=torch.tensor([gated.ids(text)])).last_hidden_state[0, -1] for text in texts]
    return torch.stack(rows).double()


def means(rows_SD: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = list(dict.fromkeys(one["label"] for one in SUPPORT))
    found = {}
    for label in labels:
        found[label] = torch.stack(
            [row for row, one in zip(rows_SD, SUPPORT, strict=True) if one["label"] == label]
        ).mean(0)
    return found


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def test_scores_are_those_of_dense_members(gated: Gated) -> None:
    card = made(gated, top_k=3, beta=4, gamma=0.3)
    assert card["object"] == "adapter.merge"
    assert card["pool"] == POOL
    assert card["version"] == gated.server.models[POOL]["adapter"]["version"]
    assert card["id"].startswith(f"{POOL}@merge-")
    assert card["labels"] == ["animal", "number", "verb"]
    assert card["expires_at"] - card["created"] == 3600
    assert abs(card["created"] - time.time()) < 60
    scores = []
    for member, found in enumerate(card["members"]):
        dense = gated.pool.oracle([float(member == other) for other in range(4)])
        rows_SD = features(dense, gated, [one["text"] for one in SUPPORT])
        centre = means(rows_SD)
        intra = inter = 0.0
        for label in centre:
            of_label = [row for row, one in zip(rows_SD, SUPPORT, strict=True) if one["label"] == label]
            for row in of_label:
                intra += cosine(row, centre[label]) / (3 * len(of_label))
                others = [cosine(row, centre[other]) for other in centre if other != label]
                inter += sum(others) / (2 * 3 * len(of_label))
        scores.append(0.3 * intra - 0.7 * inter)
        expected = torch.tensor([intra, inter, scores[-1]])
        values = torch.tensor([found["intra"], found["inter"], found["score"]])
        TOLERANCES["scores of served features", torch.float32].assert_close(values, expected)
        assert (found["member"], found["alpha"]) == (member, card["alpha"][member])
    best = sorted(range(4), key=lambda member: -scores[member])[:3]
    exponentials = {member: torch.exp(torch.tensor(4 * scores[member]).double()) for member in best}
    alpha = torch.tensor([float(exponentials.get(m, 0) / sum(exponentials.values())) for m in range(4)])
    TOLERANCES["scores of served features", torch.float32].assert_close(torch.tensor(card["alpha"]), alpha)


def test_a_merge_is_a_model_at_once(gated: Gated) -> None:
    card = made(gated)
    assert sorted(alpha > 0 for alpha in card["alpha"]) == [False, False, True, True]
    oracle = gated.pool.oracle(card["alpha"])
    answer = gated.check(oracle, model=card["id"])
    assert answer["model"] == card["id"]
    assert answer["system_fingerprint"].endswith(card["version"][:12])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "temperature": 0}
    client = gated.server.openai()
    chat = client.chat.completions.create(model=card["id"], **body)
    stream = client.chat.completions.create(model=card["id"], **body, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chat.choices[0].message.content
    assert card["id"] not in gated.server.models


def test_a_request_brings_its_merge_along(gated: Gated) -> None:
    merge = {"support": SUPPORT, "gamma": 0.9, "seed": 4}
    card = made(gated, gamma=0.9, seed=4)
    answer = gated.check(gated.pool.oracle(card["alpha"]), model=POOL, merge=merge)
    assert (answer["model"], answer["merge"]) == (POOL, card["id"])
    body: dict[str, Any] = {
        "model": POOL,
        "max_tokens": 2,
        "merge": merge,
        "messages": [{"role": "user", "content": "a"}],
    }
    assert gated.server.post("/v1/chat/completions", body).json()["merge"] == card["id"]
    with gated.server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert {event["merge"] for event in events} == {card["id"]}
    assert "merge" not in gated.server.complete(model=card["id"], prompt="a", max_tokens=1)


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.4], "uniform"])
def test_given_weights(gated: Gated, weights: list[float] | str) -> None:
    card = made(gated, weights=weights)
    expected = torch.tensor([0.25] * 4 if isinstance(weights, str) else weights)
    torch.testing.assert_close(torch.tensor(card["alpha"]), expected)
    assert {member["score"] for member in card["members"]} == {None}
    gated.check(gated.pool.oracle(expected.tolist()), model=card["id"])


def test_equal_asks_are_one_merge(gated: Gated) -> None:
    with ThreadPoolExecutor(4) as threads:
        cards = list(threads.map(lambda _: made(gated, seed=9, beta=2, expires_s=60), range(4)))
    assert len({card["id"] for card in cards}) == len({card["created"] for card in cards}) == 1
    again = made(gated, seed=9, beta=2.0, expires_s=7200)
    assert again["id"] == cards[0]["id"]
    assert again["expires_at"] > cards[0]["expires_at"]
    assert made(gated, seed=10, beta=2)["id"] != again["id"]
    assert made(gated, seed=9, beta=2, support=SUPPORT[::-1])["id"] != again["id"]


def test_listed_found_and_deleted(gated: Gated) -> None:
    card = made(gated, gamma=0.77)
    listed = gated.server.http.get(PATH, headers=ADMIN).json()
    assert listed["object"] == "list"
    assert card in listed["data"]
    place = f"{PATH}/{card['id']}"
    assert gated.server.http.get(place).json() == card
    assert gated.server.http.get(f"/v1/adapters/users/merges/{card['id']}").status_code == 404
    assert gated.server.http.delete(place, headers=ADMIN).status_code == 204
    for answer in (
        gated.server.http.get(place),
        gated.server.http.delete(place, headers=ADMIN),
        gated.server.post("/v1/completions", {"model": card["id"], "prompt": "a"}),
        gated.server.post("/v1/classify", {"model": card["id"], "input": "a"}),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert card not in gated.server.http.get(PATH, headers=ADMIN).json()["data"]


def test_it_expires(gated: Gated) -> None:
    card = made(gated, gamma=0.78, expires_s=1)
    eventually(lambda: gated.server.http.get(f"{PATH}/{card['id']}").status_code == 404)
    with pytest.raises(openai.NotFoundError, match="expired") as error:
        gated.server.openai().completions.create(model=card["id"], prompt="a")
    assert error.value.param == "model"


def test_a_replaced_pool_takes_its_merges_along(gated: Gated) -> None:
    assert gated.server.load("second", gated.folders[POOL]).status_code == 200
    card = gated.server.post("/v1/adapters/second/merges", {"support": SUPPORT}).json()
    assert gated.server.post("/v1/classify", {"model": card["id"], "input": "a"}).status_code == 200
    assert gated.server.unload("second").status_code == 200
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/classify", {"input": "a"})):
        answer = gated.server.post(path, {"model": card["id"], **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert gated.server.http.get("/v1/adapters/second/merges", headers=ADMIN).status_code == 404


def test_classes_by_nearness_to_class_means(gated: Gated) -> None:
    card = made(gated)
    answer = gated.server.post("/v1/classify", {"model": card["id"], "input": TEXTS}).json()
    dense = gated.pool.oracle(card["alpha"])
    centre = means(features(dense, gated, [one["text"] for one in SUPPORT]))
    for index, (row, found) in enumerate(zip(features(dense, gated, TEXTS), answer["data"], strict=True)):
        expected = torch.tensor([cosine(row, one) for one in centre.values()]).softmax(0)
        probs = torch.tensor([found["probs"][label] for label in centre])
        TOLERANCES["scores of served features", torch.float32].assert_close(probs, expected)
        assert (found["index"], found["num_classes"]) == (index, 3)
        assert found["label"] == list(centre)[int(expected.argmax())]
    tokens = sum(len(gated.ids(text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    alone = gated.server.post("/v1/classify", {"model": card["id"], "input": TEXTS[1]}).json()
    assert [one["label"] for one in alone["data"]] == [answer["data"][1]["label"]]


LONG = {"text": "z" * 5000, "label": "x"}
MERGES: list[tuple[dict[str, Any], str]] = [
    ({"support": None}, "support"),
    ({"support": []}, "support"),
    ({"support": SUPPORT[:1]}, "support"),
    ({"support": [SUPPORT[0], SUPPORT[2]]}, "support"),
    ({"support": SUPPORT * 103}, "support"),
    ({"support": [{"text": "a", "label": str(label)} for label in range(129)]}, "support"),
    ({"support": [*SUPPORT, {"text": "", "label": "x"}]}, "support.5.text"),
    ({"support": [*SUPPORT, {"text": "a", "label": ""}]}, "support.5.label"),
    ({"support": [*SUPPORT, {"text": "a"}]}, "support.5.label"),
    ({"support": [*SUPPORT, {"text": "a", "label": "x" * 257}]}, "support.5.label"),
    ({"support": [*SUPPORT, {"text": "a", "label": "\ud800"}]}, "support.5.label"),
    ({"support": [*SUPPORT, LONG]}, "support.5.text"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 5}, "top_k"),
    ({"beta": -1}, "beta"),
    ({"beta": float("inf")}, "beta"),
    ({"beta": float("nan")}, "beta"),
    ({"gamma": 1.1}, "gamma"),
    ({"gamma": float("nan")}, "gamma"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"expires_s": 0}, "expires_s"),
    ({"expires_s": 10**6}, "expires_s"),
    ({"weights": [0.5, 0.5]}, "weights"),
    ({"weights": [0.5, 0.5, 0.5, 0.5]}, "weights"),
    ({"weights": [float("nan")] * 4}, "weights"),
    ({"weights": "equal"}, "weights"),
    ({"weights": "uniform", "top_k": 2}, "top_k"),
    ({"invented": 1}, "invented"),
]


@pytest.mark.parametrize(("change", "field"), MERGES)
def test_impossible_merges(gated: Gated, change: dict[str, Any], field: str) -> None:
    body = {"support": SUPPORT, **change}
    inline = {"model": POOL, "prompt": "a", "max_tokens": 1, "merge": body}
    for path, asked, expected in ((PATH, body, field), ("/v1/completions", inline, f"merge.{field}")):
        refused(gated, path, asked, 400, expected)


def test_who_cannot_be_merged(gated: Gated) -> None:
    merge = {"support": SUPPORT}
    gate = {"weights": [0.25] * 4}
    refused(gated, "/v1/adapters/left/merges", merge, 400, "model")
    refused(gated, "/v1/adapters/tiny/merges", merge, 404, None)
    refused(gated, "/v1/adapters/nobody/merges", merge, 404, None)
    asks: list[tuple[dict[str, Any], int, str | None]] = [
        ({"model": "left"}, 400, "model"),
        ({"model": "tiny"}, 400, "merge"),
        ({"model": "nobody"}, 404, "model"),
        ({"model": made(gated)["id"]}, 404, "model"),
        ({"model": POOL, "gate": gate}, 400, "gate"),
        ({"model": "tiny", "adapters": [{"name": "left", "weight": 1}]}, 400, "adapters"),
    ]
    for change, status, field in asks:
        refused(gated, "/v1/completions", {"prompt": "a", "merge": merge, **change}, status, field)
    refused(gated, "/v1/completions", {"prompt": "a", "model": made(gated)["id"], "gate": gate}, 400, "gate")


def test_impossible_classifications(gated: Gated) -> None:
    name = made(gated)["id"]
    asks: list[tuple[dict[str, Any], int, str]] = [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input.0"),
        ({"input": ["a", ""]}, 400, "input.1"),
        ({"input": ["a", "z" * 5000]}, 400, "input.1"),
        ({"input": ["a"] * 513}, 400, "input"),
        ({"input": 3}, 400, "input"),
        ({"input": "a", "model": POOL}, 404, "model"),
        ({"input": "a", "model": "tiny"}, 404, "model"),
        ({"input": "a", "invented": 1}, 400, "invented"),
    ]
    for change, status, field in asks:
        refused(gated, "/v1/classify", {"model": name, **change}, status, field)


def refused(gated: Gated, path: str, body: dict[str, Any], status: int, field: str | None) -> None:
    """With NaN as Python's json writes it, which httpx refuses to."""
    answer = gated.server.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == field, answer.text
