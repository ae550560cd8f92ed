"""Keys and values are shared between equal uses only: same versions, same gates, same given inputs."""

from __future__ import annotations

import pytest

from motet.server.engine.types import FinishReason, GivenInput, SpanResult
from tests.unit.server.engine.steps import commit, generation, scheduler, step


@pytest.mark.parametrize("other", [("fr", "1"), ("de", "0"), (None, "0")])
def test_another_version_shares_nothing(other: tuple[str | None, str]) -> None:
    s, prompt = scheduler(), list(range(10))
    s.add(generation(0, prompt, max_tokens=1, adapter="fr", digest="0"))
    step(s)
    s.add(generation(1, prompt, adapter=other[0], digest=other[1]))
    assert step(s) == [(1, 0, 10)]


@pytest.mark.parametrize(("gate", "rows"), [((0.25, 0.75), (1, 8, 2)), ((0.75, 0.25), (1, 0, 10)), (None, (1, 0, 10))])
def test_only_the_same_gate_shares(gate: tuple[float, ...] | None, rows: tuple[int, int, int]) -> None:
    s, prompt = scheduler(), list(range(10))
    s.add(generation(0, prompt, max_tokens=1, adapter="fr", gate=(0.25, 0.75)))
    step(s)
    s.add(generation(1, prompt, adapter="fr", gate=gate))
    assert step(s) == [rows]


@pytest.mark.parametrize(("key", "rows"), [("a", (1, 8, 2)), ("b", (1, 0, 10))])
def test_only_the_same_given_inputs_share(key: str, rows: tuple[int, int, int]) -> None:
    s, prompt = scheduler(), list(range(10))
    for id, name in enumerate(["a", key]):
        one = generation(id, prompt, max_tokens=1)
        one.given = {3: GivenInput(name, None)}
        s.add(one)
        made = step(s)
    assert made == [rows]


def test_given_inputs_reach_the_rows_they_stand_for() -> None:
    s = scheduler(rows=3)
    one = generation(0, list(range(7)), max_tokens=1)
    one.given = {0: GivenInput("a", 1), 4: GivenInput("b", 2)}
    s.add(one)
    rows = []
    for _ in range(3):
        plan = s.plan()
        rows.append({row: given.values for row, given in plan.spans[0].given.items()})
        commit(s, plan)
    assert rows == [{0: 1}, {1: 2}, {}]


def test_a_feature_is_asked_for_at_the_last_token_of_the_prompt_only() -> None:
    s = scheduler(rows=3)
    s.add(generation(0, list(range(5)), feature=True))
    asked = []
    for _ in range(4):
        plan = s.plan()
        asked.append(plan.spans[0].feature)
        commit(s, plan)
    assert asked == [False, True, False, False]


def test_a_feature_alone_ends_its_generation() -> None:
    """Nothing is drawn for it, so nothing is computed by the head."""
    s = scheduler(rows=3)
    s.add(generation(0, list(range(5)), feature=True, max_tokens=0))
    first = s.plan()
    assert s.commit(first, [SpanResult(None)]) == ([], [])
    last = s.plan()
    assert [(span.draw, span.feature) for plan in (first, last) for span in plan.spans] == [
        (False, False),
        (False, True),
    ]
    (event,), (ended,) = s.commit(last, [SpanResult(None, feature="read")])
    assert (event.token, event.feature, event.finish, ended.id) == (None, "read", FinishReason.LENGTH, 0)
    assert s.running == s.waiting == 0
    assert s.blocks.spare == s.blocks.size
