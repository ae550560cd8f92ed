"""The tokenizer that an adapter brings: whether it knows more than the base's, and agrees with it on all else.

Must not know: how text becomes tokens, methods, memory.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.adapters.bounded import read_file
from motet.adapters.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"
LIMITS: Mapping[str, int] = {
    TOKENIZER_FILE: 64 << 20,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
    "generation_config.json": 1 << 20,
}
"""File that `save_pretrained` writes → most bytes; the tokenizer of 262,144 tokens of Gemma 3 has 33 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnTokenizer:
    """An adapter's own tokenizer.

    Attributes:
        tokenizer: a transformers tokenizer.
        ids: token → id.
        end_tokens: tokens that end a generation unless ignored.
    """

    tokenizer: Any
    ids: Mapping[str, int]
    end_tokens: frozenset[int]

    @property
    def size(self) -> int:
        """One past its largest id."""
        return max(self.ids.values()) + 1


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizers:
    """What a base says of tokenizers.

    Attributes:
        ids: token → id of the base's own.
        open: the files of a folder → the tokenizer they are. Raises ConfigError.
    """

    ids: Callable[[], Mapping[str, int]]
    open: Callable[[Mapping[str, bytes]], OwnTokenizer]


def read(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files of an adapter's folder, by name; empty without tokenizer.json.

    Raises:
        SourceError: a file leaves the folder or is too large.
    """
    if not os.path.lexists(folder / TOKENIZER_FILE):
        return {}
    return {name: read_file(folder, name, most) for name, most in LIMITS.items() if os.path.lexists(folder / name)}


def own_tokenizer(files: Mapping[str, bytes], tokenizers: Tokenizers | None) -> OwnTokenizer | None:
    """The tokenizer of a folder; None where it has none, or one that knows what the base's knows.

    Raises:
        ConfigError: the tokenizer cannot be opened, or gives a token of the base another id.
    """
    if not files or tokenizers is None:
        return None
    own, base_ids = tokenizers.open(files), tokenizers.ids()
    if own.ids.keys() <= base_ids.keys() and all(base_ids[token] == id for token, id in own.ids.items()):
        return None
    for token, id in sorted(base_ids.items(), key=operator.itemgetter(1)):
        if own.ids.get(token) != id:
            found = f"gives it id {own.ids[token]}" if token in own.ids else "does not know it"
            raise ConfigError(
                f"{TOKENIZER_FILE} of the adapter disagrees with the base's tokenizer: the base's token {token!r} has "
                f"id {id}, the adapter's tokenizer {found}; it may only add tokens: train with the base's tokenizer, "
                f"or remove {TOKENIZER_FILE} to use the base's"
            )
    return own
