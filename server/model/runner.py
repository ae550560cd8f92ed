"""Runs a plan: one forward for all rows of all adapters, then one draw for all rows that need a token.

Must not know: queues, requests, HTTP, methods. It decides nothing: every choice is in the plan.

Shapes: T rows, n rows whose logits are needed, V vocabulary.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from motet.adapters.version import Slot
from motet.server.engine.types import GenerationId, Plan, Span, SpanResult, TokenLogprobs
from motet.server.model.attention import AttentionBatch
from motet.server.model.batch import EffectsBuilder, StepChanges, logit_rows, token_tensors
from motet.server.model.loader import LoadedModel
from motet.server.model.native import NativeDecoder
from motet.server.model.sampler import Draw, draw_tokens, largest, logprobs, reports

NATIVE = "native"


class ModelRunner:
    """See `motet.server.engine.types.Runner`.

    Note: used by the step thread only. The model's weights, the arena and the cache are read here and nowhere else
    while a step runs.
    """

    def __init__(self, loaded: LoadedModel, effects: EffectsBuilder) -> None:
        assert loaded.attention.cache is not None
        self._loaded = loaded
        self._cache = loaded.attention.cache
        self._effects = effects
        self.rows: Counter[str] = Counter()
        """How many were computed natively, and others by what kept them from it: the base or a kind of effect."""

    @torch.inference_mode()
    def run(self, plan: Plan) -> Sequence[SpanResult]:
        """One forward for all rows of the plan; results in the order of its spans.

        Note: a second forward for those rows whose adapters a native step does not know, so that the others need not
        wait for them.
        """
        native: list[int] = []
        others: list[int] = []
        for index, span in enumerate(plan.spans):
            why_not = "base" if self._loaded.native is None else self._effects.division.modules_only(span)
            self.rows[why_not or NATIVE] += len(span.tokens)
            (others if why_not else native).append(index)
        results: dict[int, SpanResult] = {}
        for part, decoder in ((native, self._loaded.native), (others, None)):
            if part:
                results |= zip(part, self._run([plan.spans[index] for index in part], decoder), strict=True)
        return [results[index] for index in range(len(plan.spans))]

    def _run(self, spans: Sequence[Span], native: NativeDecoder | None) -> Sequence[SpanResult]:
        """One forward for all rows of the spans, by the modules where it is not native."""
        loaded = self._loaded
        needed, drawing = _logit_rows(spans)
        featured = _featured(spans)
        kept = sorted({*needed, *featured.values()})
        place = {row: index for index, row in enumerate(kept)}
        changes = self._effects.build(spans)
        self._take(changes, _given(spans))
        unread = len(kept) - len(needed)
        read = torch.tensor([place[row] for row in needed], device=loaded.device, dtype=torch.int64) if unread else None
        loaded.head_input.listen(bool(featured), read)
        try:
            tokens_1T, positions_1T = token_tensors(spans, loaded.device)
            rows_n = torch.tensor(kept, dtype=torch.int64, device=loaded.device)
            if native is not None:
                logits_nV = native.forward(
                    spans, self._cache, tokens_1T, positions_1T, rows_n, changes, features=bool(featured)
                )
            else:
                loaded.attention.batch = AttentionBatch(spans, self._cache, loaded.device)
                logits_nV = loaded.forward(tokens_1T, positions_1T, rows_n)
        finally:
            loaded.attention.batch = None
            self._take(StepChanges(), [])
        if changes.vocabularies:
            results = self._results_by_vocabulary(spans, logits_nV.float(), changes.vocabularies)
        else:
            results = self._results(spans, logits_nV.float(), drawing)
        if not featured:
            return results
        return [
            _with_feature(span, result, loaded.head_input.row(place[featured[span.generation]]))
            if span.feature
            else result
            for span, result in zip(spans, results, strict=True)
        ]

    def _results_by_vocabulary(
        self, spans: Sequence[Span], logits_nN: torch.Tensor, vocabularies: Mapping[Slot, int]
    ) -> list[SpanResult]:
        """Every row with the logits of its own vocabulary, as if it had been computed without wider ones.

        Args:
            logits_nN: as many logits as the largest vocabulary has.
        """
        stop_of = list(itertools.accumulate(logit_rows(span) for span in spans))
        groups: dict[int, list[int]] = {}
        for index, span in enumerate(spans):
            size = vocabularies.get(span.applied[0].lease.slot) if span.applied else None
            groups.setdefault(size or self._loaded.vocabulary, []).append(index)
        results: dict[int, SpanResult] = {}
        for vocabulary, indices in groups.items():
            of_group = [spans[index] for index in indices]
            rows = [row for i in indices for row in range(stop_of[i] - logit_rows(spans[i]), stop_of[i])]
            rows_n = torch.tensor(rows, dtype=torch.int64, device=logits_nN.device)
            logits_nV = logits_nN.index_select(0, rows_n)[:, :vocabulary].contiguous()
            results |= zip(indices, self._results(of_group, logits_nV, _logit_rows(of_group)[1]), strict=True)
        return [results[index] for index in range(len(spans))]

    def _take(self, changes: StepChanges, given: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Put a step's changes where the modules find them."""
        loaded = self._loaded
        loaded.step.effects, loaded.head_step.effects = changes.body, changes.head
        loaded.embedding.runs, loaded.embedding.given = changes.embedding, given
        if changes.embedding or given:
            loaded.embedding.install()
        if loaded.step.overlays is not None:
            loaded.overlaid.install()

    def _results(self, spans: Sequence[Span], logits_nV: torch.Tensor, drawing: list[int]) -> list[SpanResult]:
        """Report first (from the model's own logits), then adjust and draw.

        Args:
            drawing: per span, the index among the n rows of the one to draw from; only for spans that draw.
        """
        broken = _broken(spans, logits_nV)
        prompts = self._prompt_logprobs(spans, logits_nV)
        draws = [span for span in spans if span.draw]
        if not draws:
            return [SpanResult(None, None, prompts[s.generation], broken.get(s.generation)) for s in spans]
        rows = torch.tensor(drawing, device=logits_nV.device)
        drawn_nV = logits_nV if len(drawing) == len(logits_nV) else logits_nV.index_select(0, rows)
        reporting = [i for i, span in enumerate(draws) if span.sampling.reports]
        raw_nV = drawn_nV[reporting].clone() if reporting else drawn_nV[:0]
        tokens = draw_tokens(drawn_nV, [self._draw(span) for span in draws]).tolist()
        said: dict[GenerationId, TokenLogprobs] = {}
        if reporting:
            reported = reports(raw_nV, [tokens[i] for i in reporting], [draws[i].sampling for i in reporting])
            said = {draws[i].generation: report for i, report in zip(reporting, reported, strict=True)}
        chosen = {span.generation: token for span, token in zip(draws, tokens, strict=True)}
        return [
            SpanResult(
                chosen.get(s.generation),
                said.get(s.generation),
                prompts[s.generation],
                broken.get(s.generation),
            )
            for s in spans
        ]

    def _prompt_logprobs(
        self, spans: Sequence[Span], logits_nV: torch.Tensor
    ) -> dict[GenerationId, tuple[TokenLogprobs, ...]]:
        found: dict[GenerationId, tuple[TokenLogprobs, ...]] = {}
        row = 0
        for span in spans:
            count = len(span.prompt_targets)
            found[span.generation] = ()
            if count:
                top = span.sampling.prompt_logprobs or 0
                reported = logprobs(logits_nV[row : row + count], span.prompt_targets, [top] * count)
                found[span.generation] = tuple(reported)
            row += count + span.draw
        return found

    def _draw(self, span: Span) -> Draw:
        sampling = span.sampling
        seed = sampling.seed
        if seed is None:
            seed = 0 if sampling.temperature == 0 else random.getrandbits(63)
        return Draw(
            sampling=sampling,
            drawn=span.drawn,
            seed=seed,
            prompt=span.history[: span.prompt_length],
            output=span.history[span.prompt_length :],
        )


def _broken(spans: Sequence[Span], logits_nV: torch.Tensor) -> dict[GenerationId, str]:
    """Spans with a row of logits that holds NaN or infinity: the weights overflowed, and any token would be a lie."""
    if len(logits_nV) == 0:
        return {}
    finite_n = logits_nV.gather(1, largest(logits_nV)[:, None])[:, 0].isfinite()
    if bool(finite_n.all()):
        return {}
    finite = finite_n.tolist()
    broken: dict[GenerationId, str] = {}
    row = 0
    for span in spans:
        stop = row + logit_rows(span)
        if not all(finite[row:stop]):
            broken[span.generation] = _overflow(span)
        row = stop
    return broken


def _overflow(span: Span) -> str:
    model = f"adapter {span.adapters!r}" if span.adapters else "the base model"
    return f"{model} computed NaN or infinity for this prompt; its weights overflow"


def _with_feature(span: Span, result: SpanResult, feature_D: torch.Tensor) -> SpanResult:
    error = result.error or (None if bool(feature_D.isfinite().all()) else _overflow(span))
    return replace(result, feature=feature_D, error=error)


def _featured(spans: Sequence[Span]) -> dict[GenerationId, int]:
    """Generations whose feature was asked for, with the row of the batch that it is of: the span's last."""
    stops = itertools.accumulate(len(span.tokens) for span in spans)
    return {span.generation: stop - 1 for span, stop in zip(spans, stops, strict=True) if span.feature}


def _given(spans: Sequence[Span]) -> list[tuple[int, torch.Tensor]]:
    """Row of the batch and the vector that stands there instead of a token's."""
    found: list[tuple[int, torch.Tensor]] = []
    first = 0
    for span in spans:
        found += [(first + row, one.values) for row, one in span.given.items()]
        first += len(span.tokens)
    return found


def _logit_rows(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Rows of the batch whose logits are needed, and which of those are drawn from.

    A span needs its rows with prompt targets and, when it draws, its last row; those never overlap.
    """
    needed: list[int] = []
    drawing: list[int] = []
    row = 0
    for span in spans:
        needed += range(row, row + len(span.prompt_targets))
        row += len(span.tokens)
        if span.draw:
            drawing.append(len(needed))
            needed.append(row - 1)
    return needed, drawing
