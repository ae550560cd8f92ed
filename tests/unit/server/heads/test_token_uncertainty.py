"""Entropy, margin and perplexity by hand, and what is no distribution."""

from __future__ import annotations

import math

import pytest
import torch

from motet.server.heads.errors import HeadError
from motet.server.heads.token_uncertainty import SequenceUncertainty, of_logprobs, of_sequence, of_tokens

P_TV = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.0, 700.0])
def test_tokens_by_hand(shift: float) -> None:
    tokens = of_tokens(P_TV.log() + shift, torch.tensor([1, 3]))
    assert tokens.logprob_T.tolist() == pytest.approx([math.log(0.25), math.log(0.4)])
    second = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    assert tokens.entropy_T.tolist() == pytest.approx([1.5 * math.log(2), second])
    assert tokens.margin_T.tolist() == pytest.approx([0.25, 0.1])
    assert tokens.calibrated is False


def test_a_sequence_by_hand() -> None:
    tokens = of_tokens(P_TV.log(), torch.tensor([1, 3]))
    sequence = of_sequence(tokens)
    assert sequence.perplexity == pytest.approx(1 / math.sqrt(0.25 * 0.4))
    assert sequence.score == pytest.approx(1 - math.sqrt(0.25 * 0.4))
    assert sequence.min_token_logprob == pytest.approx(math.log(0.25))
    assert sequence.mean_token_entropy == pytest.approx(float(tokens.entropy_T.mean()))
    assert sequence.calibrated is False
    alone = of_logprobs(tokens.logprob_T.tolist())
    assert (alone.perplexity, alone.mean_token_entropy) == (sequence.perplexity, None)


def test_ends() -> None:
    assert of_logprobs([0.0, 0.0]) == SequenceUncertainty(1.0, 0.0, 0.0, None)
    assert of_logprobs([1e-7]).score == 0
    assert of_logprobs([-math.inf, -1.0]) == SequenceUncertainty(math.inf, 1.0, -math.inf, None)
    assert of_logprobs([-1e6]).perplexity == math.inf


@pytest.mark.parametrize("logprobs", [[], [0.1], [math.nan], [-1.0, math.nan], [math.nan, -1.0]])
def test_what_are_no_logprobs(logprobs: list[float]) -> None:
    with pytest.raises(HeadError, match="log-probabilities"):
        of_logprobs(logprobs)


@pytest.mark.parametrize("wrong", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_what_is_no_distribution(wrong: list[float]) -> None:
    with pytest.raises(HeadError, match="no distribution"):
        of_tokens(torch.tensor([[0.0, 0.0], wrong]), torch.tensor([0, 0]))
