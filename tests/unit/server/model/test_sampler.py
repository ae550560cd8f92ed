"""Drawing, against transformers' logits processors and the definition of chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from motet.server.engine.types import Sampling
from motet.server.model.sampler import Draw, draw_tokens, logprobs, reports

V = 12
N = 5_000
HIGHEST = 1 - 2**-53
PROMPT, OUTPUT = (1, 3, 3), (5, 5, 2)

SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15},
    "top_k and top_p": {"top_k": 4, "top_p": 0.75},
    "all": {"temperature": 1.4, "top_k": 7, "top_p": 0.9, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.7},
    "repetition welcome": {"repetition_penalty": 0.6, "top_p": 0.8},
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.2},
    "penalties": {"frequency_penalty": 0.4, "presence_penalty": 0.9, "repetition_penalty": 1.3, "top_k": 6},
    "bias": {"logit_bias": ((0, 3.0), (7, -100.0), (4, 1.5))},
    "not yet": {"min_tokens": 4, "stop_token_ids": frozenset({0, 6})},
    "the end": {"min_tokens": 3, "stop_token_ids": frozenset({0, 6})},
}


def logits_for(seed: int, rows: int = 1, vocabulary: int = V) -> torch.Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def draw(sampling: Sampling, seed: int, drawn: int = len(OUTPUT)) -> Draw:
    return Draw(sampling, drawn, seed, *((PROMPT, OUTPUT) if sampling.needs_history else ()))


def expected_probabilities(logits_1V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """By OpenAI's formula of the penalties, and transformers for the rest, in the order of its generate()."""
    scores = logits_1V.clone()
    for token, bias in sampling.logit_bias:
        scores[0, token] += bias
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(
            torch.tensor([[*PROMPT, *OUTPUT]]), scores
        )
    for token in set(OUTPUT):
        scores[0, token] -= sampling.frequency_penalty * OUTPUT.count(token) + sampling.presence_penalty
    if len(OUTPUT) < sampling.min_tokens:
        scores[0, list(sampling.stop_token_ids)] = float("-inf")
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for warper in warpers:
        scores = warper(torch.zeros(1, 0, dtype=torch.int64), scores)
    return scores.softmax(-1)[0]


def assert_distributed(tokens: Sequence[int], probabilities: torch.Tensor) -> None:
    """Pearson's chi-square below six standard deviations, and nothing outside of the kept set."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0, "a token that was not kept"
    kept = probabilities.double() > 0
    expected = probabilities[kept].double() * len(tokens)
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert statistic <= freedom + 6 * (2 * max(freedom, 1)) ** 0.5, f"{statistic} with {freedom} degrees of freedom"


def fix_uniform(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    class Fixed(random.Random):
        def random(self) -> float:
            return value

    monkeypatch.setattr("motet.server.model.sampler.random.Random", Fixed)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("seed", range(2))
def test_draws_are_distributed_as_transformers_says(name: str, seed: int) -> None:
    sampling = Sampling(max_tokens=9, **SAMPLINGS[name])
    logits_1V = logits_for(seed)
    tokens = draw_tokens(logits_1V.repeat(N, 1), [draw(sampling, i) for i in range(N)]).tolist()
    assert_distributed(tokens, expected_probabilities(logits_1V, sampling))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_greedy_draws_the_most_likely(name: str) -> None:
    asked = SAMPLINGS[name] | {"temperature": 0.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
    logits_nV = logits_for(5, rows=50)
    sampling = Sampling(max_tokens=9, **asked)
    warm = Sampling(max_tokens=9, **{**asked, "temperature": 1.0})
    expected = [int(expected_probabilities(row[None], warm).argmax()) for row in logits_nV]
    assert draw_tokens(logits_nV.clone(), [draw(sampling, 0)] * 50).tolist() == expected


def test_the_kept_set_is_the_same_at_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest uniform number draws the last token that is kept, never one beyond it."""
    compared = 0
    for name, seed in ((name, seed) for name in SAMPLINGS for seed in range(20)):
        sampling = Sampling(max_tokens=9, **SAMPLINGS[name])
        logits_1V = logits_for(seed)
        probabilities = expected_probabilities(logits_1V, sampling)
        least = float(probabilities[probabilities > 0].min())
        for uniform, probability in ((0.0, float(probabilities.max())), (HIGHEST, least)):
            if probability > 1e-5:  # a rarer token may be lost to rounding
                fix_uniform(monkeypatch, uniform)
                drawn = int(draw_tokens(logits_1V.clone(), [draw(sampling, 0)]))
                assert float(probabilities[drawn]) == pytest.approx(probability), (name, seed)
                compared += 1
    assert compared > 500


class TestIndependence:
    rows = 40
    logits_nV = logits_for(9, rows=rows, vocabulary=500)

    def draws(self) -> list[Draw]:
        kinds = [Sampling(max_tokens=9, **{"temperature": 0.9, **SAMPLINGS[name]}) for name in SAMPLINGS]
        kinds.append(Sampling(max_tokens=9, temperature=0))
        return [draw(kinds[i % len(kinds)], seed=i) for i in range(self.rows)]

    def test_a_row_alone_draws_what_it_draws_among_others(self) -> None:
        draws = self.draws()
        together = draw_tokens(self.logits_nV.clone(), draws).tolist()
        alone = [int(draw_tokens(self.logits_nV[i : i + 1].clone(), [one])) for i, one in enumerate(draws)]
        assert alone == together
        order = list(range(self.rows))
        random.Random(0).shuffle(order)
        shuffled = draw_tokens(self.logits_nV[order].clone(), [draws[i] for i in order]).tolist()
        assert shuffled == [together[i] for i in order]

    def test_a_row_changes_no_other_row(self) -> None:
        changed = self.logits_nV.clone()
        draws = [draw(Sampling(max_tokens=9), seed=i) for i in range(self.rows)]
        draws[3] = draw(Sampling(max_tokens=9, logit_bias=((1, 50.0),), presence_penalty=1), seed=3)
        draw_tokens(changed, draws)
        assert not torch.equal(changed[3], self.logits_nV[3])
        others = [i for i in range(self.rows) if i != 3]
        assert torch.equal(changed[others], self.logits_nV[others])

    def test_ties_are_broken_alike_in_every_batch(self) -> None:
        """Half-precision logits have many: an unstable sort would let the batch decide among them."""
        tied = self.logits_nV.round()
        draws = [draw(Sampling(max_tokens=9, temperature=1.5), seed=i) for i in range(self.rows)]
        together = draw_tokens(tied.clone(), draws).tolist()
        assert [int(draw_tokens(tied[i : i + 1].clone(), [one])) for i, one in enumerate(draws)] == together

    def test_the_seed_and_the_number_of_tokens_decide(self) -> None:
        logits_1V = torch.zeros(1, 1000)

        def token(seed: int, drawn: int) -> int:
            return int(draw_tokens(logits_1V.clone(), [Draw(Sampling(max_tokens=99), drawn, seed)]))

        assert [token(7, i) for i in range(20)] == [token(7, i) for i in range(20)]
        assert len({token(7, i) for i in range(20)}) > 15
        assert len({token(i, 0) for i in range(20)}) > 15
        assert token(-1, 0) != token(1, 0)
        assert 0 <= token(10**40, 0) < 1000


class TestExtremes:
    @pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 5e-324])
    def test_no_temperature_is_too_low(self, temperature: float) -> None:
        logits_nV = 20 * logits_for(1, rows=30, vocabulary=300)
        draws = [draw(Sampling(max_tokens=9, temperature=temperature), seed=i) for i in range(30)]
        assert draw_tokens(logits_nV.clone(), draws).tolist() == logits_nV.argmax(-1).tolist()

    @pytest.mark.parametrize("top_k", [V, V + 1, 2**63, 10**30])
    def test_a_top_k_beyond_the_vocabulary_keeps_all(self, top_k: int) -> None:
        logits_nV = logits_for(2, rows=200)
        every = [draw(Sampling(max_tokens=9), seed=i) for i in range(200)]
        asked = [draw(Sampling(max_tokens=9, top_k=top_k), seed=i) for i in range(200)]
        assert draw_tokens(logits_nV.clone(), asked).tolist() == draw_tokens(logits_nV.clone(), every).tolist()

    @pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-30}, {"min_p": 1.0}])
    def test_something_is_always_kept(self, narrow: dict[str, Any]) -> None:
        logits_nV = logits_for(3, rows=100)
        draws = [draw(Sampling(max_tokens=9, **narrow), seed=i) for i in range(100)]
        assert draw_tokens(logits_nV.clone(), draws).tolist() == logits_nV.argmax(-1).tolist()

    def test_a_banned_token_is_never_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither by rounding at the upper end of the distribution, where the sorted banned ones lie."""
        fix_uniform(monkeypatch, HIGHEST)
        banned = frozenset(range(0, V, 2))
        sampling = Sampling(max_tokens=9, min_tokens=9, stop_token_ids=banned)
        tokens = draw_tokens(logits_for(4, rows=200), [draw(sampling, seed=i) for i in range(200)]).tolist()
        assert not banned & set(tokens)


class TestLogprobs:
    logits_nV = logits_for(6, rows=60, vocabulary=400)
    tokens = torch.randint(0, 400, (60,), generator=torch.Generator().manual_seed(1)).tolist()

    def test_values(self) -> None:
        expected_nV = self.logits_nV.double().log_softmax(-1)
        for i, found in enumerate(logprobs(self.logits_nV, self.tokens, [i % 21 for i in range(60)])):
            assert found.token == self.tokens[i]
            assert found.logprob == pytest.approx(float(expected_nV[i, self.tokens[i]]), abs=1e-5)
            values, tokens = expected_nV[i].topk(i % 21)
            assert [token for token, _ in found.top] == tokens.tolist()
            assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)

    def test_the_largest_is_the_tokens_own_bit_for_bit(self) -> None:
        """lm-eval tells a greedy token by exact equality."""
        best = self.logits_nV.argmax(-1).tolist()
        for found in logprobs(self.logits_nV, best, [1] * 60):
            assert found.top == ((found.token, found.logprob),)
        for found, most_likely in zip(logprobs(self.logits_nV, self.tokens, [1] * 60), best, strict=True):
            assert (found.logprob == found.top[0][1]) == (found.token == most_likely)

    def test_nothing_more_than_the_token(self) -> None:
        assert all(found.top == () for found in logprobs(self.logits_nV, self.tokens, [0] * 60))

    def test_reports_are_each_rows_own(self) -> None:
        """Of rows that ask for different things, in one pass; the distribution is torch's own."""
        labels = (7, 399, 0)
        asks = [Sampling(1, top_logprobs=3), Sampling(1, spread=True), Sampling(1, label_tokens=labels)]
        asks = [*asks, Sampling(1, top_logprobs=2, spread=True)] * 15
        plain = logprobs(self.logits_nV, self.tokens, [asked.top_logprobs or 0 for asked in asks])
        entropy_n = torch.distributions.Categorical(logits=self.logits_nV.double()).entropy().tolist()
        p_nV = self.logits_nV.double().softmax(-1)
        for row, (found, asked) in enumerate(zip(reports(self.logits_nV, self.tokens, asks), asks, strict=True)):
            assert (found.token, found.logprob) == (plain[row].token, plain[row].logprob)
            if asked.label_tokens:
                assert found.top == tuple((t, pytest.approx(float(p_nV[row, t].log()), abs=1e-5)) for t in labels)
            else:
                assert found.top == plain[row].top
            if not asked.spread:
                assert found.entropy is found.margin is None
                continue
            first, second = p_nV[row].topk(2).values.tolist()
            assert found.entropy == pytest.approx(entropy_n[row], abs=1e-5)
            assert found.margin == pytest.approx(first - second, abs=1e-6)

    def test_a_spread_of_words_that_cannot_come(self) -> None:
        logits_nV = torch.full((1, 400), -torch.inf)
        logits_nV[0, 3] = 5.0
        (found,) = reports(logits_nV, [3], [Sampling(1, spread=True)])
        assert (found.logprob, found.entropy, found.margin) == (0.0, 0.0, 1.0)
