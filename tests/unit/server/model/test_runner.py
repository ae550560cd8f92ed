"""What the runner says of logits that are no numbers; its steps are compared with other implementations in parity."""

from __future__ import annotations

import math

import pytest
import torch

from motet.server.engine.types import BlockId, GenerationId, Sampling, Span
from motet.server.model.runner import _broken

NUMBERS = [1.0, -2.0, 3.0]


def _span(generation: int) -> Span:
    return Span(GenerationId(generation), (), (1,), 0, (BlockId(0),), True, Sampling(max_tokens=1), 0)


@pytest.mark.parametrize(
    "row",
    [[1.0, math.inf, 2.0], [1.0, math.nan, 2.0], [math.nan, math.inf, 2.0], [-math.inf] * 3, [math.nan] * 3],
    ids=str,
)
def test_a_row_that_is_no_number_breaks_its_own_span(row: list[float]) -> None:
    spans = [_span(0), _span(1), _span(2)]
    broken = _broken(spans, torch.tensor([NUMBERS, row, NUMBERS]))
    assert list(broken) == [GenerationId(1)]
    assert "computed NaN or infinity" in broken[GenerationId(1)]


def test_a_token_that_cannot_be_drawn_breaks_nothing() -> None:
    """Minus infinity beside numbers is what a wider vocabulary says of tokens that a row does not have."""
    assert not _broken([_span(0)], torch.tensor([[-math.inf, 1.0, 2.0]]))
