"""The engine's vocabulary as plain data. Shared by the scheduler, the runner and the streams.

Must not know: torch, HTTP, JSON, text. Tokens are integers, adapters are versions.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType, Protocol

from motet.adapters.version import AdapterVersion, Slot

GenerationId = NewType("GenerationId", int)
BlockId = NewType("BlockId", int)


class FinishReason(enum.StrEnum):
    """Why a generation ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 draws the most likely token.
        top_k: keep this many tokens; None keeps all.
        top_p, min_p: nucleus mass, and smallest probability relative to the largest.
        seed: makes the draws repeatable; None draws a fresh seed.
        min_tokens, max_tokens: bounds on the number of tokens drawn; at most 0 needs `feature`, and ends with it.
        stop_token_ids: tokens that end the generation, the model's own end tokens included unless they are ignored.
        logit_bias: (token, added logit).
        top_logprobs: report the log-probability of the drawn token and of this many most likely; None reports none.
        prompt_logprobs: the same for every token of the prompt.
        spread: report the entropy and the margin of each drawn token's distribution, before temperature.
        label_tokens: report the log-probabilities of these tokens, in place of the most likely ones.
        feature: report what the head reads at the last token of the prompt.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    spread: bool = False
    label_tokens: tuple[int, ...] = ()
    feature: bool = False

    @property
    def reports(self) -> bool:
        """Whether anything is said of a drawn token beside the token."""
        return self.top_logprobs is not None or self.spread or bool(self.label_tokens)

    @property
    def needs_history(self) -> bool:
        """Whether earlier tokens change the next distribution."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class Lease(Protocol):
    """What the engine keeps of an adapter while a generation runs."""

    @property
    def version(self) -> AdapterVersion:
        """The version the request resolved to."""

    @property
    def slot(self) -> Slot:
        """Where that version is on the device; valid only while it is held, see `Memory`."""


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """One adapter as one request uses it.

    Attributes:
        gate: a factor for each group of the adapter's rank rows, the same for the whole request; None leaves all at 1.
    """

    lease: Lease
    gate: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GivenInput:
    """An input row that is not a token's embedding.

    Attributes:
        key: equal keys mean equal values.
        values: what the runner puts in the embedding's place; the engine never looks at it.
    """

    key: Hashable
    values: Any


@dataclass(slots=True, eq=False)
class Generation:
    """One sequence being generated: state of the scheduler, read by nobody else.

    Attributes:
        tokens: prompt, then drawn tokens.
        applied: the adapters whose changes add up; none for the base model.
        given: position in the prompt → what stands there instead of the token's embedding.
        computed: tokens whose keys and values are in the cache.
        blocks: cache blocks, in order of position.
        cached_tokens: prompt tokens that were found in the prefix cache at first admission.
        prompt_reported: positions of the prompt whose log-probabilities were published.
        counted_to: whom its service is counted to; None counts it to its first adapter.
        arrival: its number in the order of arrival; given by the scheduler.
        submitted_s: when it was submitted, by the scheduler's clock.
        queue_s: from there to its first admission.
    """

    id: GenerationId
    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    applied: tuple[Applied, ...] = ()
    given: Mapping[int, GivenInput] = field(default_factory=dict)
    computed: int = 0
    blocks: list[BlockId] = field(default_factory=list)
    cached_tokens: int | None = None
    prompt_reported: int = 0
    counted_to: str | None = None
    arrival: int = 0
    submitted_s: float = 0.0
    queue_s: float = 0.0

    @property
    def party(self) -> str:
        """Whom its service is counted to; empty for the base."""
        if self.counted_to is not None:
            return self.counted_to
        return self.applied[0].lease.version.name if self.applied else ""

    @property
    def namespace(self) -> Hashable:
        """What keys and values depend on beside the tokens before them."""
        adapters = tuple((one.lease.version, one.gate) for one in self.applied)
        return adapters, tuple(sorted((position, one.key) for position, one in self.given.items()))

    @property
    def drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Consecutive rows of one generation in one step.

    Attributes:
        tokens: the rows' input tokens.
        start: position of the first of them.
        blocks: the generation's cache blocks, enough for every position up to the last row.
        draw: whether the last row's logits give the next token.
        history: all tokens so far, only where penalties need them.
        drawn: tokens drawn before this step.
        prompt_targets: the prompt tokens that follow the first rows, where their log-probabilities were asked for.
        given: row of the span → what stands there instead of the token's embedding.
        feature: whether the last row is the prompt's last and its feature was asked for.
    """

    generation: GenerationId
    applied: tuple[Applied, ...]
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[BlockId, ...]
    draw: bool
    sampling: Sampling
    drawn: int
    history: tuple[int, ...] = ()
    prompt_length: int = 0
    prompt_targets: tuple[int, ...] = ()
    given: Mapping[int, GivenInput] = field(default_factory=dict)
    feature: bool = False

    @property
    def adapters(self) -> str:
        """Names of the adapters, for people; empty for the base model."""
        return " + ".join(one.lease.version.name for one in self.applied)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step: spans ordered so that those of one adapter version are neighbours."""

    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        return sum(len(span.tokens) for span in self.spans)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, before temperature.

    Attributes:
        logprob: of the token that stands there.
        top: (token, log-probability), most likely first, or in the order of `Sampling.label_tokens`.
        entropy: of the distribution, in nats, where asked for.
        margin: probability of its most likely token less that of the second, where asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    entropy: float | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SpanResult:
    """What the runner found for one span.

    Attributes:
        token: the drawn token; None when the span draws none.
        logprobs: of the drawn token, where asked for.
        prompt_logprobs: one entry per prompt target.
        error: why the span has no result; its generation ends.
        feature: [D] what the head read at the last row, where asked for.
        class_logits: [C] with the feature, of a base that is a classifier.
    """

    token: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    feature: Any = None
    class_logits: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenEvent:
    """News of one generation: a token, a piece of the prompt's log-probabilities, or its end.

    Attributes:
        token: drawn token; None when only the prompt advanced or the generation ended without one.
        feature, class_logits: with the first token, where asked for.
        cached_tokens: prompt tokens the prefix cache spared.
        queue_s: how long it waited before it first ran.
    """

    generation: GenerationId
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    cached_tokens: int = 0
    feature: Any = None
    error: str | None = None
    class_logits: Any = None
    queue_s: float = 0.0


class Memory(Protocol):
    """Which versions are on the device. Implemented by motet.adapters.tiers; a fake in the engine's unit tests.

    Note: called by the step thread; no method blocks. Whatever happens later is told by `Engine.wake`.
    """

    def hold(self, leases: Sequence[Lease]) -> bool:
        """Keep all of these versions on the device until let_go; False, and nothing held, while one is not there."""

    def let_go(self, leases: Sequence[Lease]) -> None:
        """End what one successful `hold` of the same leases began."""

    def want(self, leases: Sequence[Lease]) -> None:
        """What queued generations need next, most urgent first, at most MOST_WANTED; replaces the last such list."""

    def failure(self, lease: Lease) -> str | None:
        """Why a version cannot be brought to the device; its generations end with this error."""


MOST_WANTED = 32


class Runner(Protocol):
    """Computes a step. Implemented by motet.server.model; replaced by a fake in the engine's unit tests."""

    def run(self, plan: Plan) -> Sequence[SpanResult]:
        """One forward for all rows of the plan; results in the order of its spans."""
