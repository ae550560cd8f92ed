"""Where the prompts of `motet verify` come from, and which are refused."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from motet.server.commands.prompts import BUILT_IN, tokens_of


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_without_any_the_built_in_ones() -> None:
    found = tokens_of(encode, (), None)
    assert [bytes(tokens).decode() for tokens in found] == list(BUILT_IN)
    assert len(found[0]) * 20 < len(found[-1]), "lengths vary"


def test_those_of_the_command_line_come_before_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"cd"\n\n{"prompt": "ef"}\n{"tokens": [1, 2]}\n')
    assert tokens_of(encode, ("ab",), file) == [encode("ab"), encode("cd"), encode("ef"), [1, 2]]


@pytest.mark.parametrize(
    "line",
    "3 null [1,2] {} { {'text':'a'} {'prompt':3} {'prompt':['a']} {'tokens':'ab'} {'tokens':[1,-2]} "
    "{'tokens':[1,true]} {'tokens':[1,2],'prompt':'ab'} 'ab'}".replace("'", '"').split(),
)
def test_a_line_that_is_no_prompt(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    with pytest.raises(click.BadParameter):
        tokens_of(encode, (), file)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_prompts(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(click.BadParameter):
        tokens_of(encode, ("given",), file)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_prompt_without_a_second_token_has_no_probability(text: str) -> None:
    with pytest.raises(click.BadParameter, match="two are the least"):
        tokens_of(encode, (text,), None)
