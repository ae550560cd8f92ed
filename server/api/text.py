"""Tokens to text, piece by piece, and the search for stop strings in it.

Must not know: HTTP, the engine, adapters.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 6
"""Prompt tokens the decoder sees first, so that a leading space survives in vocabularies that mark word starts."""


class Tokenizer(Protocol):
    """What the API needs of a transformers tokenizer."""

    backend_tokenizer: Any
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """Encode; the result has `input_ids`."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """The vocabulary's own spelling of a token."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        """Render and encode a conversation."""


class TextPiece:
    """Text that became final with one token, and whether a stop string ended it."""

    __slots__ = ("stopped", "text")

    def __init__(self, text: str, stopped: bool) -> None:
        self.text, self.stopped = text, stopped


class Detokenizer:
    """The growing text of one generation.

    Text that may still become part of a stop string, and bytes that are not yet a whole character, are held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str],
        *,
        skip_special_tokens: bool,
        include_stop: bool,
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        context = list(prompt[-CONTEXT_TOKENS:])
        self._decoder = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        shown: str = self._backend.decode(context, skip_special_tokens=skip_special_tokens)
        # A context that ends within a character is not taken for context: the first text begins with it.
        self._repeated = shown if shown.endswith("\ufffd") else ""
        self._stops = stops
        self._include_stop = include_stop
        self._held = ""

    def add(self, token: int, *, may_stop: bool = True) -> TextPiece:
        """Text that is final after this token; stop strings count only once the generation may stop."""
        text = self._decoder.step(self._backend, token) or ""
        if text and self._repeated:
            text = text[_same(text, self._repeated) :]
            self._repeated = ""
        self._held += text
        if not may_stop:
            return TextPiece(self.flush(), stopped=False)
        for at, stop in sorted((self._held.find(stop), stop) for stop in self._stops):
            if at >= 0:
                return TextPiece(self._held[: at + len(stop) * self._include_stop], stopped=True)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        final = self._held[: len(self._held) - keep]
        self._held = self._held[len(final) :]
        return TextPiece(final, stopped=False)

    def flush(self) -> str:
        """Text held back, once no more tokens come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _same(text: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, text, other)))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text on its own, special tokens included; U+FFFD where it is part of a character."""
    return tokenizer.decode([token], skip_special_tokens=False)


def token_bytes(tokenizer: Tokenizer, token: int) -> list[int]:
    """A token's exact bytes, also where they are part of a character."""
    text = token_text(tokenizer, token)
    if "�" not in text:
        return list(text.encode())
    spelling = tokenizer.convert_ids_to_tokens(token)
    if len(spelling) == 6 and spelling.startswith("<0x"):
        return [int(spelling[3:5], 16)]
    try:
        return [_BYTE_OF[character] for character in spelling]
    except KeyError:
        return list(text.encode())


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as one printable character; this is the inverse of that table.

    Source: the table of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the rest is shifted past 255.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
