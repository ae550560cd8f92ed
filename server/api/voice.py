"""What a request speaks with: the base or one version of an adapter, with the tokenizer that belongs to it.

Must not know: HTTP, how tokens are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from motet.adapters.registry import Lease
from motet.server.api.text import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """Resolved once for a request, so that everything it does is of one version.

    Attributes:
        lease: on the version; None for the base.
        model: what people call it, for messages.
        vocabulary: its token ids are below this.
        end_tokens: end a generation unless ignored.
    """

    lease: Lease | None
    model: str
    tokenizer: Tokenizer
    vocabulary: int
    end_tokens: frozenset[int]
