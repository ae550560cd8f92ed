"""Text from tokens, piece by piece, is the text of all tokens at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from motet.server.api.text import CONTEXT_TOKENS, Detokenizer, TextPiece, token_bytes, token_text
from tests.support.tokenizer import byte_tokenizer

TOKENIZER: Any = byte_tokenizer()
TEXT = st.text(max_size=20)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(ids: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(ids, skip_special_tokens=True)
    return text


def detokenizer(prompt: Sequence[int] = (), stops: Sequence[str] = (), **options: bool) -> Detokenizer:
    return Detokenizer(TOKENIZER, prompt, stops, **{"skip_special_tokens": True, "include_stop": False, **options})


def pieces(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[TextPiece]:
    """Up to the stop; without one, the rest comes as a last piece."""
    found: list[TextPiece] = []
    for token in tokens:
        found.append(detokenizer.add(token))
        if found[-1].stopped:
            return found
    return [*found, TextPiece(detokenizer.flush(), stopped=False)]


def joined(found: Sequence[TextPiece]) -> str:
    return "".join(piece.text for piece in found)


@settings(deadline=None)
@given(prompt=TEXT, text=TEXT)
def test_any_text_comes_back(prompt: str, text: str) -> None:
    # A text that ends in U+FFFD looks as if a character were incomplete.
    text = text.rstrip("\ufffd")
    assert joined(pieces(detokenizer(encode(prompt)), encode(text))) == text == decode(encode(text))


@settings(deadline=None)
@given(st.lists(st.integers(3, len(TOKENIZER) - 1), max_size=9), st.lists(st.integers(3, len(TOKENIZER) - 1)))
def test_any_tokens_read_as_when_decoded_together(prompt: list[int], tokens: list[int]) -> None:
    """Also where the prompt ends within a character: it is completed, and nothing of the prompt is repeated."""
    context = prompt[-CONTEXT_TOKENS:]
    ends = (decode(context + tokens[:count]) for count in range(len(tokens), 0, -1))
    whole = next((text for text in ends if not text.endswith("\ufffd")), decode(context))
    before = decode(context)
    shared = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(map(len, (before, whole)))
    )
    assert joined(pieces(detokenizer(prompt), tokens)) == whole[shared:]


def test_a_prompt_that_ends_in_a_replacement_character_is_not_repeated() -> None:
    assert joined(pieces(detokenizer(encode("what is this: \ufffd")), encode(" nothing"))) == " nothing"


def test_a_character_comes_with_its_last_token() -> None:
    tokens = encode("é€😀")
    assert len(tokens) == 9, "no token of the test's vocabulary holds more than a byte of these"
    assert [piece.text for piece in pieces(detokenizer(), tokens)] == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_an_unfinished_character_is_never_shown() -> None:
    assert joined(pieces(detokenizer(), encode("a😀")[:-1])) == "a"


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a</s>b")])
def test_special_tokens_are_shown_on_request(skip: bool, text: str) -> None:
    tokens = [*encode("a"), TOKENIZER.eos_token_id, *encode("b")]
    assert joined(pieces(detokenizer(skip_special_tokens=skip), tokens)) == text


def test_the_space_of_a_first_word_survives() -> None:
    """In vocabularies of SentencePiece's kind, decoding alone strips the space before the first word."""
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "?": 2}, unk_token="?"))
    tokenizer.decoder = decoders.Metaspace()
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    found = Detokenizer(fast, [0], [], skip_special_tokens=True, include_stop=False).add(1)
    assert found.text == " sea"
    assert fast.decode([1]) == "sea"


class TestStops:
    @settings(deadline=None, max_examples=300)
    @given(text=st.text(alphabet="abc", max_size=24), stops=STOPS, seed=st.integers(0, 9), include=st.booleans())
    def test_the_first_stop_string_ends_the_text_wherever_tokens_split(
        self, text: str, stops: list[str], seed: int, include: bool
    ) -> None:
        cuts = random.Random(seed)
        tokens = [token for part in _split(text, cuts) for token in encode(part)]
        found = pieces(detokenizer(stops=stops, include_stop=include), tokens)
        # What ends first is what a reader token by token sees first; among those the leftmost.
        shown, expected = "", None
        for token in tokens:
            shown += decode([token])
            if hits := sorted((shown.find(stop), stop) for stop in stops if stop in shown):
                at, stop = hits[0]
                expected = shown[: at + len(stop) * include]
                break
        assert joined(found) == (text if expected is None else expected)
        assert found[-1].stopped == (expected is not None)

    @settings(deadline=None)
    @given(text=st.text(alphabet="abc", max_size=24), stops=STOPS)
    def test_nothing_is_shown_that_may_become_a_stop_string(self, text: str, stops: list[str]) -> None:
        found, shown = detokenizer(stops=stops), ""
        for at, token in enumerate(encode(text)):
            piece = found.add(token)
            shown += piece.text
            if piece.stopped:
                return
            seen = decode(encode(text)[: at + 1])
            longest = max((i for stop in stops for i in range(len(stop)) if seen.endswith(stop[:i])), default=0)
            assert shown == seen[: len(seen) - longest], "held back: exactly the longest possible beginning"

    def test_a_stop_string_over_three_tokens(self) -> None:
        tokens = [token for part in ("x", "END", "-O", "F!", "y") for token in encode(part)]
        assert joined(pieces(detokenizer(stops=["D-OF"]), tokens)) == "xEN"
        assert joined(pieces(detokenizer(stops=["D-OF"], include_stop=True), tokens)) == "xEND-OF"

    def test_a_stop_string_of_several_bytes(self) -> None:
        assert joined(pieces(detokenizer(stops=["😀"]), encode("a😁b😀c"))) == "a😁b"

    def test_the_leftmost_of_several_ends_the_text(self) -> None:
        [token] = encode(" over")
        assert detokenizer(stops=["er", "ove"]).add(token).text == " "

    def test_a_stop_string_in_the_prompt_stops_nothing(self) -> None:
        found = pieces(detokenizer(encode("stop"), stops=["stop", "p1"]), encode("1 2"))
        assert (joined(found), found[-1].stopped) == ("1 2", False)


def _split(text: str, cuts: random.Random) -> list[str]:
    parts = []
    while text:
        size = cuts.randint(1, 3)
        parts.append(text[:size])
        text = text[size:]
    return parts


class TestTokens:
    @settings(deadline=None)
    @given(TEXT)
    def test_bytes_of_tokens_make_up_the_text(self, text: str) -> None:
        assert bytes(byte for token in encode(text) for byte in token_bytes(TOKENIZER, token)) == text.encode()

    def test_every_byte_has_a_token(self) -> None:
        singles = {bytes(token_bytes(TOKENIZER, token)) for token in range(3, len(TOKENIZER))}
        assert {bytes([byte]) for byte in range(256)} <= singles

    def test_special_tokens_are_text(self) -> None:
        assert token_text(TOKENIZER, 2) == "</s>"
        assert bytes(token_bytes(TOKENIZER, 2)) == b"</s>"

    def test_byte_fallback_tokens(self) -> None:
        vocabulary = {"?": 0, "é": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="?", byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
        for byte in range(256):
            assert token_bytes(fast, 2 + byte) == [byte]
        assert token_bytes(fast, 1) == list("é".encode())


def test_stop_strings_do_not_count_before_the_generation_may_stop() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a STOP b STOP c", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer, [], ["STOP"], skip_special_tokens=True, include_stop=False)
    text = ""
    for count, token in enumerate(tokens, 1):
        piece = detokenizer.add(token, may_stop=count >= 8)
        text += piece.text
        if piece.stopped:
            break
    assert text == "a STOP b "
