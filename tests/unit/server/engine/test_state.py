"""What the engine says of itself, for metrics and probes."""

from __future__ import annotations

import pytest

from motet.server.engine.types import GenerationId, Sampling
from tests.unit.server.engine.rig import Rig, run_until_idle


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize("fails", [False, True])
def test_the_state_has_the_step_when_it_is_published(rig: Rig, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Whoever hears of a failed request may ask at once whether the server is healthy."""
    seen = []
    rig.runner.fails = lambda plan: fails
    rig.submit([1], None, Sampling(max_tokens=1))
    monkeypatch.setattr(rig.engine, "_publish", lambda events: seen.append(rig.engine.state))
    rig.engine.step()
    assert [(state.running, state.steps, state.failures) for state in seen] == [(0, 1, int(fails))]


def test_failures_count_steps_in_a_row(rig: Rig) -> None:
    rig.runner.fails = lambda plan: True
    for failures in (1, 2, 3):
        rig.submit([1])
        rig.engine.step()
        assert rig.engine.state.failures == failures
        rig.engine.cancel(GenerationId(0))
        rig.engine.step()
        assert rig.engine.state.failures == failures, "a turn without rows proves nothing about the runner"
    rig.runner.fails = lambda plan: False
    rig.submit([1])
    rig.engine.step()
    assert rig.engine.state.failures == 0


def test_state_is_a_picture_of_the_latest_step() -> None:
    rig = Rig(blocks=10, generations=2)
    assert rig.engine.state.blocks == 10
    rig.submit([1, 2, 0, 1, 2], "fr", Sampling(max_tokens=3))
    rig.submit([1], None, Sampling(max_tokens=3))
    rig.submit([1], "de", Sampling(max_tokens=3))
    rig.submit([2], "fr", Sampling(max_tokens=3))
    rig.engine.step()
    state = rig.engine.state
    assert (state.running, state.waiting, state.blocks_held) == (2, 2, 3)
    assert state.waiting_adapters == {"de", "fr"}
    assert (state.steps, state.rows, state.preemptions, state.failures) == (1, 6, 0, 0)
    assert state.step_s > 0
    run_until_idle(rig)
    state = rig.engine.state
    assert (state.running, state.waiting, state.blocks_held) == (0, 0, 0)
    assert state.waiting_adapters == frozenset()
    assert (state.steps, state.rows) == (6, 6 + 2 * 2 + 2 + 2 * 2)
    rig.assert_everything_ended_once()


def test_empty_turn_counts_no_step(rig: Rig) -> None:
    rig.engine.step()
    assert (rig.engine.state.steps, rig.engine.state.rows, rig.published) == (0, 0, [])
