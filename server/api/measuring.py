"""Log-probabilities of a few fixed texts under one adapter: what a lossy form's error is measured by.

Must not know: lossy forms, HTTP. Plain English of several kinds, written for this purpose; no model's training data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from motet.adapters.errors import UnmeasuredError
from motet.adapters.lease import Lease
from motet.adapters.publishing import Score
from motet.server.api.scoring import Scorer, ScoringError

TEXTS = (
    "The harbour was quiet before dawn. Two fishermen mended a net under the only lamp that still burned, and "
    "neither of them spoke until the first gulls came in from the sea and settled on the wall beside the empty "
    "crates.",
    "To make bread, mix five hundred grams of flour with ten grams of salt and seven grams of dry yeast. Add warm "
    "water, knead the dough for ten minutes, let it rest until it has doubled, then bake it for half an hour.",
    "Question: A train leaves at nine and travels two hundred and forty kilometres at eighty kilometres an hour. "
    "When does it arrive? Answer: It needs three hours, so it arrives at twelve.",
    "Water expands when it freezes, because its molecules form an open lattice held together by hydrogen bonds. "
    "This is why ice floats on lakes and why pipes burst in a cold winter when nobody has drained them.",
    "Dear Mrs Allen, thank you for your letter of the third of May. We are sorry that your order arrived late, "
    "and we have sent the missing parts today by express post. Please write to us again if anything is not as it "
    "should be.",
)
"""225 tokens of SmolLM2's vocabulary."""


def text_score(scorer: Scorer, loop: asyncio.AbstractEventLoop, tokenizer: Any) -> Score:
    """The score for a registry whose loads run in other threads than the loop's."""

    def score(lease: Callable[[], Lease]) -> list[list[float]]:
        prompts = [tokenizer(text)["input_ids"][: scorer.most_tokens] for text in TEXTS]
        try:
            return asyncio.run_coroutine_threadsafe(scorer.logprobs(prompts, lease), loop).result()
        except ScoringError as error:
            raise UnmeasuredError(f"the error of the lossy form cannot be measured: {error}") from error

    return score


def no_score(_: Callable[[], Lease]) -> Sequence[Sequence[float]]:
    """Of a base that takes no texts."""
    raise UnmeasuredError(
        "the error of a lossy form is measured on texts, and the base model takes images; load the exact form"
    )
