"""The uncertainty that one request asks for, while it is computed: heads are asked as soon as a prompt is read.

Must not know: the shape of any response.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from motet.server.api import uncertainty
from motet.server.api.errors import ApiError
from motet.server.api.heads import Asking, Heads
from motet.server.api.schemas import MOST_SEED
from motet.server.engine.types import TokenLogprobs
from motet.server.heads.errors import HeadError
from motet.server.heads.predictive import Predictive


class Inquiry:
    """Of one request.

    Args:
        asked: None asks nothing.
        seed: the request's, for samples; None draws one.
    """

    def __init__(self, asked: uncertainty.Asked | None, heads: Heads, seed: int | None) -> None:
        self.asked = asked
        self._heads = heads
        self._seed = random.getrandbits(63) if seed is None else seed % MOST_SEED
        self._answers: dict[int, asyncio.Future[Predictive]] = {}

    def hear(self, prompt: int, feature: Any) -> None:
        """What the output head read at the end of a prompt; the first of a prompt's copies stands for all."""
        asked = self.asked
        if feature is not None and asked is not None and asked.head is not None and prompt not in self._answers:
            self._answers[prompt] = self._heads.ask(Asking(asked.head, feature, asked.samples, self._seed))

    async def found(self, prompt: int, positions: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """What is said of a generation that is complete; None where nothing was asked of it as a whole.

        Raises:
            ApiError: the head's logits are no distribution.
        """
        if self.asked is None or not self.asked.sequence:
            return None
        if self.asked.head is None:
            return uncertainty.of_generation(positions)
        try:
            return uncertainty.of_head(self.asked.head, await self._answers[prompt])
        except HeadError as error:
            raise ApiError(500, str(error), code="generation_failed") from error

    def close(self) -> None:
        """Nobody waits any more."""
        for answer in self._answers.values():
            answer.cancel()
