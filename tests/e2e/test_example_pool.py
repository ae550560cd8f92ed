"""The example pool, served as `make serve` serves it: merged by examples, it classifies what it has not seen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.process import Server

POOL = "subjects-amt"
PATH = f"/v1/adapters/{POOL}/merges"
SUPPORT = {
    "physics": ["How fast does a stone fall?", "What force holds the planets?", "Why does a magnet attract iron?"],
    "history": ["Who was the first emperor of Rome?", "When did the war in Korea end?", "Who wrote Magna Carta?"],
    "cooking": ["How long should rice boil?", "Which flour is best for bread?", "At what heat do I roast a chicken?"],
}
QUESTIONS = {
    "Which force keeps the moon in its orbit?": "physics",
    "Who was the last king of France?": "history",
    "How long do I bake a cake?": "cooking",
}


@pytest.fixture(scope="module")
def merge(server: Server) -> dict[str, Any]:
    support = [{"text": text, "label": label} for label, texts in SUPPORT.items() for text in texts]
    answer = server.post(PATH, {"support": support})
    assert answer.status_code == 200, answer.text
    card: dict[str, Any] = answer.json()
    return card


def test_the_two_best_members_are_merged(merge: dict[str, Any]) -> None:
    scores = [member["score"] for member in merge["members"]]
    chosen = sorted(range(4), key=lambda member: -scores[member])[:2]
    assert [member for member, alpha in enumerate(merge["alpha"]) if alpha] == sorted(chosen)
    assert sum(merge["alpha"]) == pytest.approx(1, abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 4, "members that are trained apart"


def test_the_merge_tells_subjects_apart(server: Server, merge: dict[str, Any]) -> None:
    answer = server.post("/v1/classify", {"model": merge["id"], "input": list(QUESTIONS)}).json()
    assert [one["label"] for one in answer["data"]] == list(QUESTIONS.values())


def test_a_pool_without_weights_is_refused(server: Server) -> None:
    answer = server.post("/v1/completions", {"model": POOL, "prompt": "a", "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "gate")


def test_the_page_of_the_examples_says_what_is_asked_here() -> None:
    page = (Path(__file__).parents[2] / "examples" / "adapters" / "README.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert f"`POST {PATH}`" in page
    for text in (*QUESTIONS, *(text for texts in SUPPORT.values() for text in texts)):
        assert text in block, text
