"""What a request asks to know of its answer's uncertainty, whether its model can say that, and in which words.

A head says of the prompt's last token what it knows of its labels; the logits say of each generated token how sure the
next-token distribution was. Only a head is ever called calibrated.

Must not know: requests beyond these fields, how heads or tokens are computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from motet.adapters import calibration
from motet.adapters.heads import HeadFile, Parameterization
from motet.server.api.errors import ApiError, bad_request
from motet.server.api.schemas import UncertaintyBody
from motet.server.engine.types import TokenLogprobs
from motet.server.heads.predictive import Predictive
from motet.server.heads.token_uncertainty import of_logprobs

HEADER, SCORE_HEADER = "x-uncertainty", "x-uncertainty-score"
CODE = "uncertainty_unsupported"
LOGPROB = "logprob"
LEVELS = {LOGPROB: ("sequence", "token"), "vbll": ("sequence",), "softmax": ("sequence",)}
"""Of every method."""
MOST_DRAWS = 1 << 27
"""Of one request, over its prompts, samples and labels: about a second."""
LARGEST = sys.float_info.max
"""What stands for infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What is to be said.

    Attributes:
        head: that answers for the sequence; None where the logits do.
        samples: draws of a Monte Carlo answer; None is the exact one.
    """

    head: HeadFile | None
    sequence: bool
    tokens: bool
    samples: int | None = None

    @property
    def spread(self) -> bool:
        """Whether the distributions of the tokens are needed."""
        return self.tokens or (self.sequence and self.head is None)


class _UnsupportedError(ApiError):
    def __init__(self, message: str, param: str = "uncertainty") -> None:
        super().__init__(400, message, code=CODE, param=param)


def method_of(head: HeadFile) -> str:
    """What a head is called."""
    return "softmax" if head.parameterization is Parameterization.SOFTMAX else "vbll"


def offered(head: HeadFile | None) -> dict[str, Any]:
    """What a model can say, its own method first."""
    methods = [LOGPROB] if head is None else [method_of(head), LOGPROB]
    said: dict[str, Any] = {
        "methods": methods,
        "levels": {method: list(LEVELS[method]) for method in methods},
        "calibrated": head is not None and head.calibration is not None,
    }
    return said if head is None else {**said, "version": head.digest, "labels": list(head.labels), "bytes": head.bytes}


def resolve(
    given: bool | UncertaintyBody | None,
    header: str | None,
    head: HeadFile | None,
    model: str,
    *,
    prompts: int = 1,
    draws: bool = True,
) -> Asked | None:
    """What is asked of a model; None where nothing is, or where it may be left out and is not possible.

    Args:
        given: the request's field, which goes before the header.
        head: of the adapter that the request speaks with, as it is.
        model: for messages.
        prompts: how many are asked of.
        draws: whether the request generates tokens.

    Raises:
        ApiError: 400, it is not possible.
    """
    body = _body(given, header)
    if body is None:
        return None
    try:
        return _resolved(body, head, model, prompts, draws)
    except _UnsupportedError:
        if body.on_unsupported == "omit":
            return None
        raise


def _body(given: bool | UncertaintyBody | None, header: str | None) -> UncertaintyBody | None:
    if given is None and header is not None:
        if header.lower() not in ("0", "1", "false", "true"):
            raise bad_request(f"the header {HEADER} is {header!r}; it must be 1 or 0", HEADER)
        given = header.lower() in ("1", "true")
    return UncertaintyBody() if given is True else given or None


def _resolved(body: UncertaintyBody, head: HeadFile | None, model: str, prompts: int, draws: bool) -> Asked:
    sequence, tokens = "sequence" in body.level, "token" in body.level
    if body.method not in ("auto", LOGPROB):
        own = "no head" if head is None else f"a {method_of(head)} head"
        if head is None or method_of(head) != body.method:
            raise _UnsupportedError(f"method {body.method!r} needs a {body.method} head; {model} has {own}: use auto")
        if tokens:
            raise _UnsupportedError(
                f"level 'token' is not known to method {body.method!r}, which reads the prompt's last token alone; "
                "use auto or logprob",
                "uncertainty.level",
            )
    if body.method == LOGPROB or not sequence:
        head = None
    if body.samples:
        if head is None or method_of(head) != "vbll":
            raise _UnsupportedError(
                f"samples is {body.samples}, and draws are made from a vbll head's logits alone; leave it at 0",
                "uncertainty.samples",
            )
        if (drawn := body.samples * len(head.labels) * prompts) > MOST_DRAWS:
            raise bad_request(
                f"{body.samples} samples of {len(head.labels)} labels for {prompts} prompts are {drawn:,} draws; at "
                f"most {MOST_DRAWS:,} are possible: use samples 0, which is exact",
                "uncertainty.samples",
            )
    asked = Asked(head, sequence, tokens, body.samples or None)
    if asked.spread and not draws:
        raise _UnsupportedError("no token is generated, so the logits say nothing; ask a model with a head")
    return asked


def of_head(head: HeadFile, answer: Predictive) -> dict[str, Any]:
    """What a head says; entropies in nats."""
    probabilities = answer.p_C.tolist()
    confidence = max(probabilities)
    said: dict[str, Any] = {
        "method": method_of(head),
        "version": head.digest,
        "score": 1 - confidence,
        "confidence": confidence,
        "calibrated": head.calibration is not None,
        "total": answer.total,
        "epistemic": answer.epistemic,
        "aleatoric": answer.aleatoric,
        "label": head.labels[probabilities.index(confidence)],
        "probabilities": dict(zip(head.labels, probabilities, strict=True)),
    }
    if head.calibration is not None:
        said["calibration"] = calibration.dumped(head.calibration)
    if head.threshold is not None:
        said |= {"abstain": 1 - confidence > head.threshold, "threshold": head.threshold}
    return said


def of_generation(positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """What the logits say of the generated tokens together."""
    entropies = [position.entropy for position in positions if position.entropy is not None]
    found = of_logprobs([position.logprob for position in positions], sum(entropies) / len(positions))
    return {
        "method": LOGPROB,
        "score": found.score,
        "confidence": 1 - found.score,
        "calibrated": found.calibrated,
        "perplexity": min(found.perplexity, LARGEST),
        "mean_token_entropy": found.mean_token_entropy,
        "min_token_logprob": max(found.min_token_logprob, -LARGEST),
    }


def add(
    choice: dict[str, Any],
    asked: Asked | None,
    sequence: dict[str, Any] | None,
    positions: Sequence[TokenLogprobs],
    text: Callable[[int], str],
) -> dict[str, Any]:
    """A choice of a response with what was asked for: beside its log-probabilities where it has some.

    Args:
        choice: with `logprobs` of either endpoint; changed.
        sequence: known once the choice is complete.
        positions: the tokens that the choice's body is of.
        text: of a token.
    """
    if asked is None:
        return choice
    said = {} if sequence is None else dict(sequence)
    logprobs: dict[str, Any] | None = choice["logprobs"]
    values = [_of_token(position) for position in positions] if asked.tokens else []
    if logprobs is None and values:
        said = {"method": LOGPROB, "calibrated": False, **said}
        said["tokens"] = [
            {"token": text(position.token), "logprob": max(position.logprob, -LARGEST), **value}
            for position, value in zip(positions, values, strict=True)
        ]
    if logprobs is not None:
        if sequence is not None:
            logprobs["uncertainty"] = sequence
        if "content" in logprobs:
            for entry, value in zip(logprobs["content"], values, strict=False):
                entry["uncertainty"] = value
        elif values:
            logprobs["token_uncertainty"] = [None] * (len(logprobs["tokens"]) - len(values)) + values
    return {**choice, "uncertainty": said} if said else choice


def _of_token(position: TokenLogprobs) -> dict[str, Any]:
    return {"entropy": position.entropy, "margin": position.margin, "calibrated": False}
