"""What a request gives to be read, as the engine takes it: texts as tokens; images are in `image_inputs`.

Must not know: HTTP, adapters, what is asked of the base.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from motet.server.api.base_info import Modality
from motet.server.engine.types import GivenInput

DROPPED = 0.1
"""Share of its tokens that the augmented view of a text loses."""


class InputError(Exception):
    """What a request gives cannot be read; the message names field, value and limit.

    Args:
        field: where it stands in the request.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One input, read.

    Attributes:
        given: position → what stands there instead of the token's embedding.
    """

    tokens: Sequence[int]
    given: Mapping[int, GivenInput] = field(default_factory=dict)


class Inputs(Protocol):
    """How a base's inputs are read."""

    @property
    def modality(self) -> Modality:
        """What they are."""

    async def read(self, given: Mapping[str, str]) -> list[Prompt]:
        """One prompt for each entry.

        Args:
            given: field of the request, for error messages → its value.

        Raises:
            InputError: one of them cannot be read.
        """

    async def augmented(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """A changed view of each; a function of the seed and the prompt alone."""


class TextInputs:
    """Texts, as /v1/completions encodes them; pools have the base's tokenizer."""

    modality: Modality = "text"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    async def read(self, given: Mapping[str, str]) -> list[Prompt]:
        """Token ids of each text."""
        return [Prompt(list(self._tokenizer(text, add_special_tokens=True)["input_ids"])) for text in given.values()]

    async def augmented(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
        """Each text without a tenth of its tokens, at least one kept."""
        views = []
        for prompt in prompts:
            chance = random.Random(f"{seed} {list(prompt.tokens)}")
            views.append(Prompt([token for token in prompt.tokens if chance.random() >= DROPPED] or prompt.tokens[:1]))
        return views
