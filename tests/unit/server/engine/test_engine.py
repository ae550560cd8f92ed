"""The step loop with a runner of our own: whatever happens, each generation ends once and so does its lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from motet.server.engine.types import (
    FinishReason,
    GenerationId,
    Sampling,
)
from tests.support.fake_runner import generate_alone, version_of
from tests.unit.server.engine.rig import BLOCK, PATIENCE_S, SHORT, Rig, run_until_idle


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def running() -> Iterator[Rig]:
    rig = Rig(blocks=16, generations=3)
    rig.engine.start()
    yield rig
    rig.runner.go_on.set()
    rig.engine.stop(PATIENCE_S)
    assert not rig.engine.alive


# ------------------------------------------------------------------------------------------------------------- threads


def test_submissions_from_many_threads_all_get_their_answer(running: Rig) -> None:
    jobs: dict[GenerationId, tuple[list[int], str | None]] = {}

    def client(number: int) -> None:
        for i in range(6):
            prompt, adapter = [number % 3, i % 2, 1, 2, 0, 1][: 3 + i % 4], [None, "fr", "de"][i % 3]
            jobs[running.submit(prompt, adapter)] = prompt, adapter

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.wait(list(jobs))
    for id, (prompt, adapter) in jobs.items():
        use = ((version_of(adapter), None),) if adapter else ()
        assert (running.tokens(id), running.ends(id)[0]) == generate_alone(use, prompt, SHORT)
    running.engine.stop(PATIENCE_S)
    running.assert_everything_ended_once()


def test_cancelling_from_many_threads_ends_each_generation_once(running: Rig) -> None:
    long = Sampling(max_tokens=30)
    ids: list[GenerationId] = []

    def client(number: int) -> None:
        for i in range(6):
            id = running.submit([number, i], "fr", long)
            ids.append(id)
            running.engine.cancel(id)
            running.engine.cancel(id)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.wait(ids)
    running.engine.stop(PATIENCE_S)
    running.assert_everything_ended_once()
    assert {running.ends(id)[0] for id in ids} <= {FinishReason.CANCELLED, FinishReason.LENGTH}


def test_cancel_while_the_step_runs(running: Rig) -> None:
    running.runner.go_on.clear()
    id = running.submit([1, 2], "fr", Sampling(max_tokens=20))
    assert running.runner.held.wait(PATIENCE_S)
    running.engine.cancel(id)
    running.runner.go_on.set()
    running.wait([id])
    assert running.ends(id) == [FinishReason.CANCELLED]
    assert len(running.tokens(id)) <= 1
    running.engine.stop(PATIENCE_S)
    running.assert_everything_ended_once()


def test_idle_engine_wakes_for_a_submission(running: Rig) -> None:
    for _ in range(2):
        id = running.submit([1])
        running.wait([id])
    assert running.engine.alive


def test_stop_cancels_what_runs_what_waits_and_what_was_just_submitted() -> None:
    rig = Rig(generations=1)
    rig.runner.go_on.clear()
    rig.engine.start()
    runs = rig.submit([1], "fr", Sampling(max_tokens=20))
    assert rig.runner.held.wait(PATIENCE_S)
    late = [rig.submit([2], "de"), rig.submit([3], None)]
    stopping = threading.Thread(target=rig.engine.stop, args=(PATIENCE_S,))
    stopping.start()
    while not rig.engine._stopping:
        time.sleep(0.001)
    rig.runner.go_on.set()
    stopping.join(PATIENCE_S)
    assert not rig.engine.alive
    assert [rig.ends(id) for id in (runs, *late)] == [[FinishReason.CANCELLED]] * 3
    rig.assert_everything_ended_once()


def test_stop_of_an_idle_engine() -> None:
    rig = Rig()
    rig.engine.start()
    rig.engine.stop(PATIENCE_S)
    assert not rig.engine.alive
    rig.assert_everything_ended_once()


# -------------------------------------------------------------------------------------------------------- step by step


def test_one_publication_per_step(rig: Rig) -> None:
    ids = [rig.submit([i], "fr", Sampling(max_tokens=2)) for i in range(3)]
    rig.engine.step()
    rig.engine.step()
    assert [[event.generation for event in events] for events in rig.published] == [ids, ids]
    rig.assert_everything_ended_once()


def test_lease_has_ended_when_the_end_is_published(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has its answer may unload the adapter at once."""
    seen = []
    id = rig.submit([1], "fr", Sampling(max_tokens=1))
    monkeypatch.setattr(rig.engine, "_publish", lambda events: seen.append(rig.ended[rig.leases[id]]))
    rig.engine.step()
    assert seen == [1]


def test_cancel_of_what_waits_runs_or_has_ended(rig: Rig) -> None:
    runs, ended = rig.submit([1], "fr", Sampling(max_tokens=9)), rig.submit([2], "fr", Sampling(max_tokens=1))
    rig.engine.step()
    waits = rig.submit([3])
    for id in (runs, ended, waits, GenerationId(99)):
        rig.engine.cancel(id)
    run_until_idle(rig)
    assert [rig.ends(id) for id in (runs, ended, waits)] == [
        [FinishReason.CANCELLED],
        [FinishReason.LENGTH],
        [FinishReason.CANCELLED],
    ]
    assert rig.tokens(waits) == []
    rig.assert_everything_ended_once()


def test_failed_step_ends_its_generations_and_no_others() -> None:
    rig = Rig(generations=2)
    rig.runner.fails = lambda plan: True
    failing, waiting = [rig.submit([1]), rig.submit([2], None)], rig.submit([0, 1, 2], "de")
    rig.engine.step()
    for id in failing:
        assert [(event.token, event.finish) for event in rig.events[id]] == [(None, FinishReason.ERROR)]
        assert rig.events[id][0].error
        assert "fire" not in str(rig.events[id][0].error), "the cause goes to the log, not to clients"
    assert rig.events[waiting] == []
    rig.runner.fails = lambda plan: False
    run_until_idle(rig)
    assert rig.tokens(waiting) == generate_alone(((version_of("de"), None),), [0, 1, 2], SHORT)[0]
    rig.assert_everything_ended_once()


def test_failed_span_ends_its_generation_and_no_other(rig: Rig) -> None:
    good, bad = rig.submit([0, 1]), rig.submit([0, 2])
    rig.runner.errors = {bad}
    run_until_idle(rig)
    assert [(event.token, event.finish, event.error) for event in rig.events[bad]] == [
        (None, FinishReason.ERROR, "not finite")
    ]
    assert rig.tokens(good) == generate_alone(((version_of("fr"), None),), [0, 1], SHORT)[0]
    assert rig.engine.state.failures == 0
    rig.assert_everything_ended_once()


def test_failed_step_leaves_nothing_wrong_in_the_prefix_cache() -> None:
    rig, prompt = Rig(rows=6), [0, 1, 2, 0, 1, 2, 2, 1, 0, 1]
    rig.runner.fails = lambda plan: plan.spans[0].start > 0
    rig.submit(prompt)
    rig.engine.step()
    rig.engine.step()
    rig.runner.fails = lambda plan: False
    again = rig.submit(prompt)
    run_until_idle(rig)
    assert rig.tokens(again) == generate_alone(((version_of("fr"), None),), prompt, SHORT)[0]
    assert rig.events[again][0].cached_tokens == BLOCK
    rig.assert_everything_ended_once()


def test_thread_goes_on_after_a_failed_step(running: Rig) -> None:
    running.runner.fails = lambda plan: True
    first = running.submit([1])
    running.wait([first])
    running.runner.fails = lambda plan: False
    second = running.submit([1])
    running.wait([second])
    assert (running.ends(first), running.ends(second)) == ([FinishReason.ERROR], [FinishReason.LENGTH])


def test_empty_prompt_is_a_bug_of_the_caller(rig: Rig) -> None:
    with pytest.raises(AssertionError, match="at least one token"):
        rig.submit([])


# ------------------------------------------------------------------------------------------- adapters not on the device


def test_a_loop_with_nothing_but_absent_adapters_sleeps_until_woken(running: Rig) -> None:
    running.memory.absent.add(version_of("fr"))
    id = running.submit([1, 2])
    eventually(lambda: running.memory.wanted == [version_of("fr")])
    wants = running.memory.wants
    time.sleep(0.1)
    assert running.memory.wants == wants, "the loop spins"
    running.memory.absent.clear()
    running.engine.wake()
    running.wait([id])
    assert running.tokens(id) == generate_alone(((version_of("fr"), None),), [1, 2], SHORT)[0]


def test_one_whose_adapter_cannot_be_brought_ends_with_the_reason(rig: Rig) -> None:
    rig.memory.absent.add(version_of("fr"))
    rig.memory.failures[version_of("fr")] = "its source changed"
    id = rig.submit([1])
    rig.engine.step()
    assert [(event.finish, event.error) for event in rig.events[id]] == [(FinishReason.ERROR, "its source changed")]
    rig.assert_everything_ended_once()


def eventually(look: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
