"""What the next-token distribution alone says of a generation: for adapters without a head, and never calibrated.

Must not know: heads, tokenizers, requests. Shapes: T tokens, V words of the vocabulary, P of a piece of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from motet.server.heads.errors import HeadError

PIECE = 3 << 13
"""Words of one token that torch computes without waking other threads: waiting for them took longer than the work, on a
busy machine a millisecond."""


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


def spread(logprob_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies in nats, and how much more probable the likeliest word is than the second.

    Args:
        logprob_TV: log-probabilities of the whole vocabulary, of at least two words; -inf is a word that cannot come,
            NaN there is none.

    Returns:
        [T] and [T] in the same dtype.
    """
    entropy_T = logprob_TV.new_zeros(len(logprob_TV))
    for piece_TP in torch.split(logprob_TV, PIECE, -1):
        entropy_T -= piece_TP.exp().mul_(piece_TP).nansum(-1)  # a word that cannot come is 0 times -inf: nothing
    first_T2 = logprob_TV.topk(2, -1).values.exp()
    return entropy_T.clamp_min(0), first_T2[:, 0] - first_T2[:, 1]


def of_logprobs(logprobs: Sequence[float], mean_token_entropy: float | None = None) -> SequenceUncertainty:
    """From the log-probabilities of the generated tokens.

    Raises:
        HeadError: there are none, or one is NaN or above 0 by more than rounding.
    """
    if not logprobs or not all(logprob <= 1e-6 for logprob in logprobs):
        raise HeadError("a sequence's uncertainty needs log-probabilities, of at least one token and none above 0")
    mean = min(math.fsum(logprobs) / len(logprobs), 0.0)
    perplexity = math.exp(-mean) if mean > -700 else math.inf
    return SequenceUncertainty(perplexity, 1 - math.exp(mean), min(logprobs), mean_token_entropy)
