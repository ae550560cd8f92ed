"""Entropy, margin and perplexity by hand, and what are no log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from motet.server.heads.errors import HeadError
from motet.server.heads.token_uncertainty import PIECE, SequenceUncertainty, of_logprobs, spread

P_TV = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_by_hand(dtype: torch.dtype) -> None:
    entropy_T, margin_T = spread(P_TV.to(dtype).log())
    second = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    assert entropy_T.tolist() == pytest.approx([1.5 * math.log(2), second, 0.0])
    assert margin_T.tolist() == pytest.approx([0.25, 0.1, 1.0])


def test_a_large_vocabulary_is_one_distribution() -> None:
    """Larger than the pieces it is computed in, and no multiple of them."""
    logits_TV = 3 * torch.randn(3, 2 * PIECE + 77, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropy_T, _ = spread(logits_TV.log_softmax(-1))
    assert entropy_T.tolist() == pytest.approx(torch.distributions.Categorical(logits=logits_TV).entropy().tolist())


def test_a_sequence_by_hand() -> None:
    sequence = of_logprobs([math.log(0.25), math.log(0.4)], 0.7)
    assert sequence.perplexity == pytest.approx(1 / math.sqrt(0.25 * 0.4))
    assert sequence.score == pytest.approx(1 - math.sqrt(0.25 * 0.4))
    assert sequence.min_token_logprob == pytest.approx(math.log(0.25))
    assert sequence.mean_token_entropy == 0.7
    assert sequence.calibrated is False


def test_ends() -> None:
    assert of_logprobs([0.0, 0.0]) == SequenceUncertainty(1.0, 0.0, 0.0, None)
    assert of_logprobs([1e-7]).score == 0
    assert of_logprobs([-math.inf, -1.0]) == SequenceUncertainty(math.inf, 1.0, -math.inf, None)
    assert of_logprobs([-1e6]).perplexity == math.inf


@pytest.mark.parametrize("logprobs", [[], [0.1], [math.nan], [-1.0, math.nan], [math.nan, -1.0]])
def test_what_are_no_logprobs(logprobs: list[float]) -> None:
    with pytest.raises(HeadError, match="log-probabilities"):
        of_logprobs(logprobs)
