"""Heads are asked together, answer each for itself, and go with their adapters."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from motet.adapters.heads import HeadFile
from motet.server.api import heads as module
from motet.server.api.heads import Asking, Heads
from motet.server.heads.batch import Head, Row, predict
from motet.server.heads.errors import HeadError
from motet.server.heads.gaussian import GaussianHead
from motet.server.heads.predictive import Predictive
from tests.support.heads import random_head

WIDTH = 6
FILES = [random_head(kind, "abc", WIDTH, seed) for seed, kind in enumerate(["dense", "lowrank", "diagonal", "softmax"])]
X_ND = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))


def asking(number: int, **more: Any) -> Asking:
    return Asking(FILES[number % len(FILES)], X_ND[number], **more)


def alone(one: Asking) -> Predictive:
    return predict([Row(Head.of(one.head, torch.device("cpu")), one.x_D, one.samples, one.seed)])[0]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each batch has."""
    found: list[int] = []

    def counted(rows: Sequence[Row]) -> list[Predictive]:
        found.append(len(rows))
        return predict(rows)

    monkeypatch.setattr(module, "predict", counted)
    return found


def play(scenario: Callable[[Heads], Awaitable[None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(20):
            await scenario(Heads())

    asyncio.run(timed())


def test_one_turn_of_the_loop_is_one_batch(batches: list[int]) -> None:
    """Whoever is woken by the same step asks in the same turn."""

    async def scenario(heads: Heads) -> None:
        step = asyncio.Event()

        async def request(one: Asking) -> Predictive:
            await step.wait()
            return await heads.ask(one)

        askings = [asking(number, samples=50 if number % 5 == 0 else None, seed=number) for number in range(12)]
        waiting = [asyncio.create_task(request(one)) for one in askings]
        await asyncio.sleep(0)
        step.set()
        for one, answer in zip(askings, await asyncio.gather(*waiting), strict=True):
            expected = alone(one)
            assert answer.p_C.tolist() == pytest.approx(expected.p_C.tolist(), abs=1e-6)
            assert answer.epistemic == pytest.approx(expected.epistemic, abs=1e-6)
        await heads.ask(asking(0))

    play(scenario)
    assert batches == [12, 1]


def test_a_head_that_cannot_answer_harms_no_other(batches: list[int]) -> None:
    async def scenario(heads: Heads) -> None:
        broken = Asking(FILES[0], torch.full((WIDTH,), torch.inf))
        found = await asyncio.gather(*map(heads.ask, [asking(1), broken, asking(2)]), return_exceptions=True)
        assert [type(one) for one in found] == [Predictive, HeadError, Predictive]

    play(scenario)
    assert batches == [3, 1, 1, 1]


def test_whoever_is_gone_harms_no_other() -> None:
    async def scenario(heads: Heads) -> None:
        gone, stays = heads.ask(asking(0)), heads.ask(asking(1))
        gone.cancel()
        assert (await stays).p_C.tolist() == pytest.approx(alone(asking(1)).p_C.tolist(), abs=1e-6)

    play(scenario)


def test_a_bug_reaches_everyone_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rows: Sequence[Row]) -> list[Predictive]:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "predict", fails)

    async def scenario(heads: Heads) -> None:
        found = await asyncio.gather(*map(heads.ask, [asking(1), asking(2)]), return_exceptions=True)
        assert [type(one) for one in found] == [ZeroDivisionError] * 2

    play(scenario)


def test_a_head_is_made_ready_once_and_kept_as_long_as_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Counted(Head):
        @classmethod
        def of(cls, file: HeadFile, device: torch.device) -> Head:
            head = Head.of(file, device)
            assert isinstance(head.layer, GaussianHead)
            made.append(weakref.ref(head.layer.noise_C))
            return head

    monkeypatch.setattr(module, "Head", Counted)

    async def scenario(heads: Heads) -> None:
        file = random_head("dense", "abc", WIDTH, seed=9)
        for _ in range(3):
            await heads.ask(Asking(file, X_ND[0]))
        assert [one() is not None for one in made] == [True]
        del file
        gc.collect()
        assert made[0]() is None

    play(scenario)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e6, 1e15])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parameterization.value)
def test_extreme_features_have_finite_answers(file: HeadFile, size: float) -> None:
    async def scenario(heads: Heads) -> None:
        answer = await heads.ask(Asking(file, size * X_ND[0]))
        assert float(answer.p_C.sum()) == pytest.approx(1)
        assert 0 <= answer.aleatoric <= answer.total <= 1.0986123
        assert answer.epistemic >= 0

    play(scenario)
