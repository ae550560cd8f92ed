"""Log-probabilities of given tokens go through the engine like requests, and take nothing with them."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from motet.adapters.errors import AdapterNotFoundError
from motet.server.api.scoring import ScoringError
from tests.unit.server.api.rig import TOKENIZER, Running, during, logprob_of

PROMPTS = [[5, 9, 7], [40, 41], list(range(3, 203)), [8, 8]]
FITTING = {"tolerance": 0.01, "prompts": [{"tokens": p, "logprobs": [logprob_of(t) for t in p[1:]]} for p in PROMPTS]}


@pytest.fixture
def vouched(adapter: Path) -> Path:
    """The adapter again, beside golden values that are right."""
    folder = shutil.copytree(adapter, adapter.parent / "vouched")
    (folder / "golden.json").write_text(json.dumps(FITTING))
    return folder


async def load(running: Running, **body: Any) -> dict[str, Any]:
    response = await running.administer(
        "POST", "/v1/load_lora_adapter", **{"lora_name": "vouched", "lora_path": "vouched", **body}
    )
    return {"status": response.status_code} | (response.json()["error"] if response.is_error else {})


@pytest.mark.parametrize("model", ["adapted", "base"])
def test_values_of_several_prompts_at_once(adapter: Path, model: str) -> None:
    async def scenario(running: Running) -> None:
        registry = running.registry
        lease = (lambda: None) if model == "base" else (lambda: registry.acquire("adapted"))
        found = await running.scorer.logprobs(PROMPTS, lease)
        assert found == [[logprob_of(token) for token in prompt[1:]] for prompt in PROMPTS]
        assert running.runner.versions == {None if model == "base" else registry.get(model).version}
        await running.nothing_is_held()

    during(adapter, scenario)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([3] * 256, "prompt 1 has 256 tokens; the base model takes 255"),
        ([3, len(TOKENIZER)], f"prompt 1 has token {len(TOKENIZER)}"),
    ],
)
def test_a_prompt_that_does_not_fit(adapter: Path, prompt: list[int], said: str) -> None:
    async def scenario(running: Running) -> None:
        with pytest.raises(ScoringError, match=said):
            await running.scorer.logprobs([[3, 4], prompt], lambda: running.registry.acquire("adapted"))
        await running.nothing_is_held()

    during(adapter, scenario)


def test_the_longest_prompt_fits(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        assert len((await running.scorer.logprobs([[3] * 255], lambda: None))[0]) == 254

    during(adapter, scenario)


def test_a_step_that_fails_gives_everything_back(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        running.runner.failing_steps = 1
        with pytest.raises(ScoringError, match="the step that computed this request failed"):
            await running.scorer.logprobs(PROMPTS, lambda: running.registry.acquire("adapted"))
        await running.nothing_is_held()

    during(adapter, scenario)


def test_a_lease_that_cannot_be_had_gives_the_others_back(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        names = iter(["adapted", "adapted", "nobody"])
        with pytest.raises(AdapterNotFoundError):
            await running.scorer.logprobs(PROMPTS, lambda: running.registry.acquire(next(names)))
        await running.nothing_is_held()

    during(adapter, scenario)


def test_an_engine_that_does_not_run_is_said(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        running.service.engine.stop()
        with pytest.raises(ScoringError, match="engine does not run"):
            await running.scorer.logprobs([[3, 4]], lambda: None)

    during(adapter, scenario)


def test_golden_values_that_fit_are_no_obstacle(adapter: Path, vouched: Path) -> None:
    async def scenario(running: Running) -> None:
        assert await load(running) == {"status": 200}
        assert (await running.post(model="vouched")).status_code == 200

    during(adapter, scenario)


@pytest.mark.parametrize("fault", ["another value", "another tokenizer", "a failed step"])
def test_golden_values_that_do_not_fit_refuse_the_adapter(adapter: Path, vouched: Path, fault: str) -> None:
    content = json.loads((vouched / "golden.json").read_text())
    if fault == "another value":
        content["prompts"][2]["logprobs"][100] -= 0.5
    if fault == "another tokenizer":
        content["prompts"][0]["tokens"][1] = 10**6
    (vouched / "golden.json").write_text(json.dumps(content))

    async def scenario(running: Running) -> None:
        used = running.registry.residency.used_bytes
        running.runner.failing_steps = fault == "a failed step"
        refusal = await load(running)
        assert (refusal["status"], refusal["code"]) == (400, "adapter_golden_mismatch")
        said = {
            "another value": "prompt 2 of golden.json, position 101",
            "another tokenizer": "prompt 0 has token 1000000",
            "a failed step": "golden.json cannot be checked",
        }
        assert said[fault] in refusal["message"]
        assert str(adapter.parent) not in refusal["message"]
        assert (await running.post(model="vouched")).status_code == 404
        assert (await running.post()).status_code == 200, "the others are served"
        await running.eventually(lambda: running.registry.residency.used_bytes == used)
        await running.nothing_is_held()

    during(adapter, scenario)


def test_other_requests_go_on_during_a_check(adapter: Path, vouched: Path) -> None:
    """The check waits for the engine in a thread of its own, and shares its steps."""

    async def scenario(running: Running) -> None:
        check = asyncio.create_task(load(running))
        answers = await asyncio.gather(*(running.post() for _ in range(5)))
        assert {answer.status_code for answer in answers} == {200}
        assert await check == {"status": 200}

    during(adapter, scenario)
