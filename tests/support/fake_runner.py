"""A runner without a model: its "cache" remembers who wrote what where, so that any mixing of blocks shows at once.

The next token is a function of the adapters, their gates, and of all tokens as they stand in the cache's blocks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from motet.adapters.version import AdapterVersion, Digest, Slot
from motet.server.engine.types import (
    Applied,
    BlockId,
    FinishReason,
    GenerationId,
    Plan,
    Sampling,
    Span,
    SpanResult,
    TokenLogprobs,
)

VOCABULARY = 3

Use = tuple[tuple[AdapterVersion, tuple[float, ...] | None], ...]
"""Adapter versions with their gates."""


@dataclass(eq=False)
class FakeLease:
    version: AdapterVersion
    slot: Slot = field(default_factory=lambda: Slot(0))


def version_of(name: str, digest: str = "0") -> AdapterVersion:
    return AdapterVersion(name, Digest(digest))


def applied(use: Use) -> tuple[Applied, ...]:
    """With fresh leases."""
    return tuple(Applied(FakeLease(version), gate) for version, gate in use)


def use_of(span: Span) -> Use:
    return tuple((one.lease.version, one.gate) for one in span.applied)


def next_token(use: Use, tokens: Sequence[int]) -> int:
    return zlib.crc32(repr((use, list(tokens))).encode()) % VOCABULARY


def generate_alone(use: Use, prompt: Sequence[int], sampling: Sampling) -> tuple[list[int], FinishReason]:
    """Drawn tokens and the reason of the end, by the definition and nothing else."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(use, tokens))
        drawn = len(tokens) - len(prompt)
        if tokens[-1] in sampling.stop_token_ids and drawn >= sampling.min_tokens:
            return tokens[len(prompt) :], FinishReason.STOP
        if drawn == sampling.max_tokens:
            return tokens[len(prompt) :], FinishReason.LENGTH


def logprobs_at(token: int, position: int) -> TokenLogprobs:
    """A report that tells which position it is about."""
    return TokenLogprobs(token, -float(position), ())


@dataclass(frozen=True)
class _Cell:
    use: Use
    position: int
    token: int


class FakeRunner:
    """See `motet.server.engine.types.Runner`.

    Args:
        expected: generation → prompt and the tokens it will draw, to compare the cache with; None skips that.
    """

    def __init__(self, block_size: int, expected: Mapping[GenerationId, Sequence[int]] | None = None) -> None:
        self._block_size = block_size
        self._expected = expected
        self._cells: dict[tuple[BlockId, int], _Cell] = {}
        self.rows = 0

    def run(self, plan: Plan) -> Sequence[SpanResult]:
        for span in plan.spans:  # all rows are written before any is read, as in a forward
            for position, token in enumerate(span.tokens, span.start):
                self._cells[self._place(span, position)] = _Cell(use_of(span), position, token)
        self.rows += plan.rows
        return [self._result(span) for span in plan.spans]

    def _place(self, span: Span, position: int) -> tuple[BlockId, int]:
        return span.blocks[position // self._block_size], position % self._block_size

    def _result(self, span: Span) -> SpanResult:
        stop = span.start + len(span.tokens)
        cells = [self._cells[self._place(span, position)] for position in range(stop)]
        assert [cell.use for cell in cells] == [use_of(span)] * stop, "keys and values of another version or gate"
        assert [cell.position for cell in cells] == list(range(stop)), "keys and values of other positions"
        history = [cell.token for cell in cells]
        if self._expected is not None:
            assert history == list(self._expected[span.generation][:stop]), "keys and values of other tokens"
        if span.history:
            assert list(span.history[:stop]) == history
        return SpanResult(
            token=next_token(use_of(span), history) if span.draw else None,
            logprobs=None,
            prompt_logprobs=tuple(
                logprobs_at(token, position) for position, token in enumerate(span.prompt_targets, span.start + 1)
            ),
        )
