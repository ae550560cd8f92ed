"""Adapters whose vocabulary is larger than the base's, alone, among each other and beside those that add nothing."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.harness import GREEDY, Generated, Harness
from tests.support.layout import Layout
from tests.support.layouts import make
from tests.support.layouts_added import ADDED_LAYOUTS, NEEDS_TIES, WIDER
from tests.support.models import FAMILIES, VOCABULARY, reference_copy
from tests.support.tokenizer import word_tokenizer
from tests.support.tolerances import TOLERANCES

BESIDE = ("lora-all", "lora-ends", "trained-tokens", "saved-embedding-and-head", "dora-ends")
"""Layouts without added tokens in the same batches."""
BANNED = {"llama": (), "qwen2": NEEDS_TIES, "gemma3": ()}


@dataclass
class Wider:
    harness: Harness
    reference: Any
    layouts: dict[str, Layout]

    def oracle(self, name: str | None) -> Any:
        return self.reference if name is None else self.layouts[name].oracle

    def vocabulary(self, name: str | None) -> int:
        return WIDER if name in ADDED_LAYOUTS else VOCABULARY

    def requests(self, seed: int) -> list[tuple[list[int], str | None]]:
        """Each once and the base twice; an adapter's prompts have tokens it adds."""
        chance = random.Random(seed)
        names = [None, None, *self.layouts]
        chance.shuffle(names)
        requests = []
        for name in names:
            prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(2, 30))]
            for at in chance.sample(range(len(prompt)), min(len(prompt), 4)) if name in ADDED_LAYOUTS else ():
                prompt[at] = chance.randrange(VOCABULARY, WIDER)
            requests.append((prompt, name))
        return requests

    @torch.no_grad()
    def expected(self, prompt: list[int], name: str | None) -> torch.Tensor:
        """[T, N] logits."""
        return self.oracle(name)(input_ids=torch.tensor([prompt])).logits[0].float()


@pytest.fixture(scope="module", params=list(FAMILIES))
def wider(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wider]:
    model = FAMILIES[request.param]()
    reference = reference_copy(model)
    root: Path = tmp_path_factory.mktemp(request.param)
    layouts: dict[str, Layout] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, (name, write) in enumerate(ADDED_LAYOUTS.items()):
            if name not in BANNED[request.param]:
                layouts[name] = write(reference, root / name, seed)
    for name in BESIDE:
        layouts[f"beside-{name}"] = make(name, reference, root / f"beside-{name}")
    harness = Harness(model, word_tokenizer(VOCABULARY), blocks=1024)
    for name, layout in layouts.items():
        harness.load(name, layout.folder, layout.declared)
    yield Wider(harness, reference, layouts)
    assert harness.pool.spare == harness.pool.size


def test_prompts_and_answers_are_the_oracles(wider: Wider) -> None:
    """Logits of every drawn token, log-probabilities of every prompt token, of all in one batch."""
    requests = wider.requests(1)
    sampling = replace(GREEDY, max_tokens=5, prompt_logprobs=0, top_logprobs=3)
    made = wider.harness.run(requests, sampling)
    drawn: set[int] = set()
    for (prompt, name), result in zip(requests, made, strict=True):
        logits_TN = wider.expected([*prompt, *result.tokens], name)[:-1]
        assert logits_TN.shape[1] == wider.vocabulary(name)
        TOLERANCES["logits", torch.float32].assert_close(torch.stack(result.logits), logits_TN[len(prompt) - 1 :])
        reported = [position for event in result.events for position in event.prompt_logprobs]
        expected = logits_TN.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]]
        found = torch.tensor([position.logprob for position in reported])
        TOLERANCES["log-probabilities", torch.float32].assert_close(found, expected)
        drawn |= set(result.tokens) if name in ADDED_LAYOUTS else set()
        assert name in ADDED_LAYOUTS or max(result.tokens) < VOCABULARY
    assert any(token >= VOCABULARY for token in drawn), "no added token was drawn: the test says little"


def test_alone_equals_mixed(wider: Wider) -> None:
    requests = wider.requests(2)
    for request, together in zip(requests, wider.harness.run(requests), strict=True):
        (alone,) = wider.harness.run([request])
        assert alone.tokens == together.tokens
        TOLERANCES["logits", torch.float32].assert_close(alone.logits[0], together.logits[0])


def test_greedy_tokens_equal_generate(wider: Wider) -> None:
    requests = wider.requests(3)
    for (prompt, name), result in zip(requests, wider.harness.run(requests), strict=True):
        tokens = torch.tensor([prompt])
        expected = wider.oracle(name).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=-1,
        )
        assert result.tokens == expected[0, len(prompt) :].tolist(), name


def test_neighbours_with_more_tokens_change_no_bit_of_the_base(wider: Wider) -> None:
    """Also what is drawn at random and what is reported: a row never sees how many logits another has."""
    chance = random.Random(4)
    prompts = [[chance.randrange(3, VOCABULARY) for _ in range(9)] for _ in range(3)]
    sampling = replace(GREEDY, max_tokens=8, temperature=1.0, seed=7, top_logprobs=5, prompt_logprobs=2)

    def of_base(others: list[tuple[list[int], str | None]]) -> list[Generated]:
        made = wider.harness.run([*((prompt, None) for prompt in prompts), *others], sampling)
        return made[: len(prompts)]

    beside_base = [([7, 8, 9], None), ([9, 9, 9, 9], None)]
    beside_wider = [([7, VOCABULARY, 9], "saved-layers"), ([9, 9, VOCABULARY + 1, 9], "model")]
    for one, other in zip(of_base(beside_base), of_base(beside_wider), strict=True):
        assert one.tokens == other.tokens
        assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
        assert [event.logprobs for event in one.events] == [event.logprobs for event in other.events]
        assert [event.prompt_logprobs for event in one.events] == [event.prompt_logprobs for event in other.events]


def test_sampling_rules_reach_added_tokens(wider: Wider) -> None:
    """Biases, bans and penalties on ids that only this row has."""
    prompt = [5, VOCABULARY, 7]
    biased = replace(GREEDY, max_tokens=3, logit_bias=((WIDER - 1, 100.0),))
    stopping = replace(biased, stop_token_ids=frozenset({WIDER - 1}), min_tokens=2)
    penalised = replace(biased, repetition_penalty=2.0, frequency_penalty=1.0)
    samplings = [biased, stopping, penalised, replace(GREEDY, max_tokens=3)]
    requests = [(prompt, "saved-layers")] * 3 + [([5, 6, 7], None)]
    made = wider.harness.run(requests, samplings=samplings)
    assert made[0].tokens == [WIDER - 1] * 3
    assert made[1].tokens[0] != WIDER - 1
    assert made[1].tokens[-1] == WIDER - 1
    assert made[2].tokens[0] == WIDER - 1


def test_what_is_resident_is_said(wider: Wider) -> None:
    residency = wider.harness.registry.residency
    for name in wider.layouts:
        lease = wider.harness.registry.acquire(name)
        assert residency.vocabulary(lease.slot) == (WIDER if name in ADDED_LAYOUTS else None), name
        wider.harness.registry.release(lease)
