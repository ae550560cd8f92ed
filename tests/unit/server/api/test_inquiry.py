"""A request's uncertainty where the head or the logits are extreme, streamed or not; nothing is held afterwards."""

from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters import heads
from motet.server.api.heads import Asking, Heads
from motet.server.engine.types import Plan, SpanResult, TokenLogprobs
from tests.support.heads import random_head
from tests.unit.server.api.rig import CountingRunner, Running, during

HEAD = random_head("diagonal", ("no", "yes"), 4, seed=1)
HUGE = 3e38


class Speaking(CountingRunner):
    """Says features, each another one, and spreads where they are asked for, and counts who asks."""

    def __init__(self, feature: float, logprob: float) -> None:
        super().__init__()
        self.feature, self.logprob = torch.full((4,), feature), logprob
        self.features = self.spreads = 0

    def run(self, plan: Plan) -> Sequence[SpanResult]:
        results = list(super().run(plan))
        for at, span in enumerate(plan.spans):
            if span.feature:
                self.features += 1
                results[at] = replace(results[at], feature=self.feature * self.features)
            if span.sampling.spread:
                self.spreads += 1
                said = TokenLogprobs(results[at].token or 0, self.logprob, (), 0.5, 0.25)
                results[at] = replace(results[at], logprobs=said)
        return results


@pytest.fixture
def headed(adapter: Path) -> Path:
    heads.write(HEAD, adapter)
    return adapter


def play(adapter: Path, scenario: Any, feature: float = 0.1, logprob: float = -1.0) -> Speaking:
    runner = Speaking(feature, logprob)

    async def speaking(rig: Running) -> None:
        rig.service.engine._runner = runner  # the rig's own says nothing
        await scenario(rig)
        await rig.nothing_is_held()

    during(adapter, speaking)
    return runner


def test_nothing_is_computed_that_was_not_asked(headed: Path) -> None:
    async def scenario(rig: Running) -> None:
        assert (await rig.post()).status_code == 200

    runner = play(headed, scenario)
    assert runner.features == runner.spreads == 0


def test_copies_of_a_prompt_share_one_answer(headed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Asking] = []
    ask = Heads.ask

    def counted(self: Heads, asking: Asking) -> Any:
        asked.append(asking)
        return ask(self, asking)

    monkeypatch.setattr(Heads, "ask", counted)

    async def scenario(rig: Running) -> None:
        body = {"prompt": ["ab", "c"], "n": 3, "uncertainty": {"samples": 5}}
        choices = (await rig.post(**body)).json()["choices"]
        said = [choice["uncertainty"]["probabilities"] for choice in choices]
        assert said[0] == said[1] == said[2]
        assert said[3] == said[4] == said[5]

    runner = play(headed, scenario)
    assert len(asked) == 2
    assert runner.spreads == 0, "a head needs no distribution of tokens"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/classify", "/v1/decisions"])
def test_a_head_that_overflows_fails_its_own_request(headed: Path, path: str) -> None:
    async def scenario(rig: Running) -> None:
        given: dict[str, Any] = {"/v1/completions": {"prompt": "a", "uncertainty": True}}.get(path, {"input": "a"})
        if path == "/v1/decisions":
            given["questions"] = [{"type": "predicate", "instructions": ""}]
        failed = await rig.client.post(path, json={"model": "adapted", **given})
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "generation_failed")
        assert "not finite" in failed.json()["error"]["message"]

    play(headed, scenario, feature=HUGE)


def test_a_stream_of_a_head_that_overflows_ends_with_the_error(headed: Path) -> None:
    async def scenario(rig: Running) -> None:
        *chunks, last = (await rig.post(stream=True, uncertainty=True)).text.strip().split("\n\n")
        assert len(chunks) == 3, "the tokens before the end were fine"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"

    play(headed, scenario, feature=HUGE)


def test_a_request_that_ends_early_leaves_no_answer_behind(headed: Path) -> None:
    """The first choice's error ends the stream; asyncio must not report that nobody looked at the second's."""
    reported: list[Any] = []

    async def scenario(rig: Running) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        assert (await rig.post(prompt=["abc", "b"], uncertainty=True, stream=True, max_tokens=2)).status_code == 200

    play(headed, scenario, feature=HUGE)
    gc.collect()
    assert not reported


@pytest.mark.parametrize("logprob", [-math.inf, -1e30, -1e4, 0.0])
@pytest.mark.parametrize("stream", [False, True])
def test_extreme_logprobs_are_finite_numbers(adapter: Path, logprob: float, stream: bool) -> None:
    async def scenario(rig: Running) -> None:
        answer = await rig.post(uncertainty={"level": ["sequence", "token"]}, stream=stream)

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        text = answer.text.split("\n\n")[-3].removeprefix("data: ") if stream else answer.text
        said = json.loads(text, parse_constant=refuse)["choices"][0]["uncertainty"]
        assert said["perplexity"] >= 1
        assert 0 <= said["score"] <= 1
        assert said["mean_token_entropy"] == 0.5
        assert [one["margin"] for one in said["tokens"]] == [0.25] * (1 if stream else 4)

    play(adapter, scenario, logprob=logprob)
