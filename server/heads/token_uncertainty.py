"""What the next-token distribution alone says of a generation: for adapters without a head, and never calibrated.

Must not know: heads, tokenizers, requests. Shapes: T generated tokens, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from motet.server.heads.errors import HeadError


@dataclass(frozen=True, slots=True, eq=False)
class TokenUncertainty:
    """Per generated token.

    Attributes:
        logprob_T: natural log-probability of the token that was taken.
        entropy_T: nats, of the whole distribution.
        margin_T: probability of the likeliest word less that of the second.
    """

    logprob_T: torch.Tensor
    entropy_T: torch.Tensor
    margin_T: torch.Tensor
    calibrated: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class SequenceUncertainty:
    """Of a whole generation.

    Attributes:
        perplexity: exp of the mean negative log-probability, at least 1; infinite where a token was impossible.
        score: 1 - 1 / perplexity, in [0, 1]; higher is less sure.
        min_token_logprob: of its least likely token.
        mean_token_entropy: nats; None where only log-probabilities are known.
    """

    perplexity: float
    score: float
    min_token_logprob: float
    mean_token_entropy: float | None
    calibrated: ClassVar[bool] = False


def of_tokens(logits_TV: torch.Tensor, token_T: torch.Tensor) -> TokenUncertainty:
    """From logits, or from log-probabilities of the whole vocabulary; -inf is a word that cannot come.

    Raises:
        HeadError: a logit is NaN or +inf, or all of a token's are -inf.
    """
    logprob_TV = logits_TV.detach().double().log_softmax(-1)
    if logprob_TV.isnan().any():
        raise HeadError("the logits of a token are no distribution: NaN, +inf, or -inf for every word")
    p_TV = logprob_TV.exp()
    first_T2 = p_TV.topk(2, -1).values
    return TokenUncertainty(
        logprob_T=logprob_TV.gather(-1, token_T[:, None])[:, 0],
        entropy_T=torch.special.entr(p_TV).sum(-1),
        margin_T=first_T2[:, 0] - first_T2[:, 1],
    )


def of_sequence(tokens: TokenUncertainty) -> SequenceUncertainty:
    """The generation of these tokens."""
    return of_logprobs(tokens.logprob_T.tolist(), float(tokens.entropy_T.mean()))


def of_logprobs(logprobs: Sequence[float], mean_token_entropy: float | None = None) -> SequenceUncertainty:
    """From the log-probabilities of the generated tokens alone.

    Raises:
        HeadError: there are none, or one is NaN or above 0 by more than rounding.
    """
    if not logprobs or not all(logprob <= 1e-6 for logprob in logprobs):
        raise HeadError("a sequence's uncertainty needs log-probabilities, of at least one token and none above 0")
    mean = min(math.fsum(logprobs) / len(logprobs), 0.0)
    perplexity = math.exp(-mean) if mean > -700 else math.inf
    return SequenceUncertainty(perplexity, 1 - math.exp(mean), min(logprobs), mean_token_entropy)
