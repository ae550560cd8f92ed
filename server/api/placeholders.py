"""Places in a prompt where items stand instead of tokens: for each a row of the base's input, which the adapter gives.

Must not know: HTTP, how rows are computed beyond asking the gate.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AddedToken

from motet.adapters.errors import GateError
from motet.adapters.gates.instance import InstanceGate
from motet.server.engine.types import GivenInput

STAND_IN = 0
"""Token that stands at an item's place in the history of tokens; the model never sees its embedding."""


class Placeholders:
    """The markers of one adapter, known to a copy of the tokenizer as tokens of their own.

    Note: immutable after construction; any thread may call it.
    """

    def __init__(self, tokenizer: Any, gate: InstanceGate) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self._gate = gate
        self._fields: dict[int, str] = {}
        for field, marker in gate.placeholders.items():
            # Not special: the text of a prompt keeps its markers.
            self.tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False)])
            self._fields[self.tokenizer.convert_tokens_to_ids(marker)] = field

    @property
    def vocabulary(self) -> int:
        """Prompts have ids below it."""
        return max(self._fields) + 1

    def resolve(
        self, prompt: Sequence[int], items: Mapping[str, Sequence[int] | None]
    ) -> tuple[Sequence[int], dict[int, GivenInput]]:
        """The prompt without markers, and what stands in their places.

        Args:
            items: "history" and "candidates" → item ids, in the order of their markers.

        Raises:
            GateError: there are not as many items as markers, or an id is no item's.
        """
        places = {field: [at for at, token in enumerate(prompt) if token == id] for id, field in self._fields.items()}
        given: dict[int, GivenInput] = {}
        for field, found in places.items():
            ids = items.get(field) or ()
            if len(ids) != len(found) and (found or field != "history"):
                raise GateError(
                    f"gate.{field}",
                    f"the prompt has {len(found)} markers {self._gate.placeholders[field]!r}, and gate.{field} has "
                    f"{len(ids)} items; give one item for each marker",
                )
            if found:
                rows_ND = self._gate.item_rows(ids, f"gate.{field}")
                given |= {at: GivenInput(item, row_D) for at, item, row_D in zip(found, ids, rows_ND, strict=True)}
        return [STAND_IN if at in given else token for at, token in enumerate(prompt)], given
