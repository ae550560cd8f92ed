"""What a request speaks with: the base or versions of adapters, with the tokenizer that belongs to them.

Must not know: HTTP, how tokens are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from motet.adapters.heads import HeadFile
from motet.server.api.placeholders import Placeholders
from motet.server.api.text import Tokenizer
from motet.server.engine.types import Applied, GivenInput


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """Resolved once for a request, so that everything it does is of one version.

    Attributes:
        applied: adapters on leases of the voice; none for the base.
        model: what people call it, for messages.
        vocabulary: its token ids are below this.
        end_tokens: end a generation unless ignored.
        placeholders: places in prompts where items may stand; None where they may not.
        items: item ids by the names of the request's fields.
        head: of the one adapter, where the request uses it as it is: a head is not trained on mixtures and merges.
        merge: id of the merge that the request brought along.
        names: of the published adapters that it is made of, or the base's: their quotas count.
    """

    applied: Sequence[Applied]
    model: str
    tokenizer: Tokenizer
    vocabulary: int
    end_tokens: frozenset[int]
    placeholders: Placeholders | None = None
    items: Mapping[str, Sequence[int] | None] = field(default_factory=dict)
    head: HeadFile | None = None
    merge: str | None = None
    names: tuple[str, ...] = ()

    @property
    def prompt_vocabulary(self) -> int:
        """Ids of prompts are below this: markers of items are among them."""
        return self.vocabulary if self.placeholders is None else max(self.vocabulary, self.placeholders.vocabulary)

    def placed(self, prompt: Sequence[int]) -> tuple[Sequence[int], Mapping[int, GivenInput]]:
        """The prompt without markers, and what stands in their places.

        Raises:
            GateError: markers and items do not fit together.
        """
        return (prompt, {}) if self.placeholders is None else self.placeholders.resolve(prompt, self.items)
