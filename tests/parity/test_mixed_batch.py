"""One mixed batch of base and every layout gives each request what its oracle and generate() give it alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from motet.server.engine.types import FinishReason
from tests.parity.conftest import Served
from tests.support.harness import GREEDY
from tests.support.models import ALL_LINEARS, VOCABULARY, save_peft
from tests.support.tolerances import TOLERANCES


def _requests(served: Served, seed: int) -> list[tuple[list[int], str | None]]:
    """Every adapter once and the base twice, prompts of 1 to 40 tokens, in random order."""
    chance = random.Random(seed)
    adapters = [None, None, *served.layouts]
    chance.shuffle(adapters)
    return [([chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 40))], name) for name in adapters]


def test_logits_are_the_oracles_in_one_mixed_batch(served: Served) -> None:
    requests = _requests(served, seed=1)
    assert len({name for _, name in requests}) > 40
    actual = served.harness.logits(requests)
    expected = torch.stack([served.expected_logits(prompt, name) for prompt, name in requests])
    TOLERANCES["logits", torch.float32].assert_close(actual, expected)


@pytest.mark.parametrize("rows", [13, 512])
def test_prompt_log_probabilities_are_the_oracles(served: Served, rows: int) -> None:
    """Many rows of logits for each request, among requests that need one: which rows are whose at the output head."""
    requests = [(prompt, name) for prompt, name in _requests(served, seed=12) if len(prompt) > 1]
    samplings = [replace(GREEDY, max_tokens=1, prompt_logprobs=None if i % 3 == 0 else 0) for i in range(len(requests))]
    limits = served.harness.scheduler.limits
    served.harness.scheduler.limits = replace(limits, rows=rows)
    try:
        made = served.harness.run(requests, samplings=samplings)
    finally:
        served.harness.scheduler.limits = limits
    for (prompt, name), sampling, result in zip(requests, samplings, made, strict=True):
        reported = [position for event in result.events for position in event.prompt_logprobs]
        assert [position.token for position in reported] == (prompt[1:] if sampling.prompt_logprobs == 0 else [])
        with torch.no_grad():
            expected_TV = served.oracle(name)(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        expected = expected_TV[torch.arange(len(reported)), [position.token for position in reported]]
        found = torch.tensor([position.logprob for position in reported])
        TOLERANCES["log-probabilities", torch.float32].assert_close(found, expected)
        TOLERANCES["logits", torch.float32].assert_close(result.logits[0], served.expected_logits(prompt, name))


def test_mixed_batch_equals_each_request_alone(served: Served) -> None:
    requests = _requests(served, seed=2)
    together = served.harness.logits(requests)
    alone = torch.cat([served.harness.logits([request]) for request in requests])
    TOLERANCES["logits", torch.float32].assert_close(together, alone)


def test_greedy_tokens_equal_generate(served: Served) -> None:
    requests = _requests(served, seed=3)
    made = served.harness.run(requests, replace(GREEDY, max_tokens=10))
    for (prompt, name), result in zip(requests, made, strict=True):
        tokens = torch.tensor([prompt])
        expected = served.oracle(name).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=-1,
        )
        assert result.tokens == expected[0, len(prompt) :].tolist(), name


def test_decode_logits_equal_a_full_forward(served: Served) -> None:
    """Every step of a generation, not only the first: cache, positions and adapters across steps."""
    requests = _requests(served, seed=4)
    for (prompt, name), result in zip(requests, served.harness.run(requests), strict=True):
        whole = torch.tensor([[*prompt, *result.tokens]])
        with torch.no_grad():
            expected = served.oracle(name)(input_ids=whole).logits[0, len(prompt) - 1 : -1].float()
        TOLERANCES["logits", torch.float32].assert_close(torch.stack(result.logits), expected)


def test_prefix_cache_is_not_shared_between_adapters(served: Served) -> None:
    """The same prompt through every adapter, twice: the second time from the cache, with the same answers."""
    prompt = [(11 * i) % VOCABULARY for i in range(3, 40)]
    requests = [(prompt, name) for name in [None, *served.layouts]]
    first = served.harness.run(requests)
    second = served.harness.run(requests)
    assert all(result.events[0].cached_tokens >= len(prompt) - 4 for result in second)
    for before, after, (_, name) in zip(first, second, requests, strict=True):
        assert before.tokens == after.tokens, name
        TOLERANCES["logits", torch.float32].assert_close(torch.stack(after.logits), torch.stack(before.logits))


def test_preemption_changes_no_answer(served: Served) -> None:
    """With too few blocks for all, requests are preempted and computed again, and still answer the same."""
    requests = _requests(served, seed=5)
    sampling = replace(GREEDY, max_tokens=12)
    expected = [result.tokens for result in served.harness.run(requests, sampling)]
    scheduler, spare = served.harness.scheduler, 16
    held = served.harness.pool.allocate(served.harness.pool.size - spare)
    assert held is not None
    before = scheduler.preemptions
    try:
        actual = [result.tokens for result in served.harness.run(requests, sampling)]
    finally:
        served.harness.pool.release(held)
    assert scheduler.preemptions > before
    assert actual == expected


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_chunk_size_changes_no_answer(served: Served, rows: int) -> None:
    requests = _requests(served, seed=6)[:5]
    limits = served.harness.scheduler.limits
    served.harness.scheduler.limits = replace(limits, rows=rows)
    try:
        actual = served.harness.logits(requests)
    finally:
        served.harness.scheduler.limits = limits
    expected = torch.stack([served.expected_logits(prompt, name) for prompt, name in requests])
    TOLERANCES["logits", torch.float32].assert_close(actual, expected)


def test_reloading_a_name_changes_its_answers_at_once(served: Served) -> None:
    """A name that moves to other content: no stale prefix cache, no stale step effects."""
    prompt = [(7 * i) % VOCABULARY for i in range(3, 30)]
    harness = served.harness
    served.load("moving", "lora-all")
    before = harness.logits([(prompt, "moving")])[0]
    served.load("moving", "pissa-residual", replace=True)
    after = harness.logits([(prompt, "moving")])[0]
    harness.registry.unload("moving")
    served.load("moving", "patterns")  # into the slot that was just freed
    reloaded = harness.logits([(prompt, "moving")])[0]
    harness.registry.unload("moving")
    tolerance = TOLERANCES["logits", torch.float32]
    tolerance.assert_close(before, served.expected_logits(prompt, "lora-all"))
    tolerance.assert_close(after, served.expected_logits(prompt, "pissa-residual"))
    tolerance.assert_close(reloaded, served.expected_logits(prompt, "patterns"))


def test_an_adapter_that_overflows_disturbs_nobody(served: Served, tmp_path: Path) -> None:
    """Finite weights whose products are not: its own request fails, its neighbours and successors do not notice."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ALL_LINEARS)
    harness = served.harness
    harness.load("overflow", save_peft(served.reference, tmp_path, config, seed=3, strength=1e25))
    requests = _requests(served, seed=7)
    expected = [result.tokens for result in harness.run(requests)]
    prompt = list(range(3, 30))
    together = harness.run([*requests, (prompt, "overflow")])
    harness.registry.unload("overflow")
    (event,) = together[-1].events
    assert event.finish is FinishReason.ERROR
    assert event.error is not None
    assert "'overflow'" in event.error
    assert [result.tokens for result in together[:-1]] == expected
    for seed in range(8, 14):  # blocks it has written are used again
        after = _requests(served, seed)
        logits = harness.logits(after)
        expected_logits = torch.stack([served.expected_logits(prompt, name) for prompt, name in after])
        TOLERANCES["logits", torch.float32].assert_close(logits, expected_logits)
