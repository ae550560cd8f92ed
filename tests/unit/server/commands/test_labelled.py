"""Labelled rows are what they say, or are refused by their line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from motet.server.commands.labelled import LabelledRow, read_rows

LABELS = ("no", "yes")


def rows(folder: Path, content: str) -> list[LabelledRow]:
    (folder / "dev.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    return read_rows(folder / "dev.jsonl", LABELS)


def test_every_form(tmp_path: Path) -> None:
    text, prompt, chat = rows(
        tmp_path,
        '{"text": "a\u2028b", "label": "yes"}\r\n\n{"label": "no", "prompt": "c"}\n'
        '{"messages": [{"role": "user", "content": "d"}], "label": "no"}',
    )
    assert text == LabelledRow(1, "a\u2028b", 1)
    assert prompt == LabelledRow(3, "c", 0)
    assert (chat.line, chat.label) == (4, 0)
    assert not isinstance(chat.prompt, str)
    assert [(one.role, one.content) for one in chat.prompt] == [("user", "d")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is no JSON"),
        ("[1]", "it is no object; a row has label and one of text, prompt, messages"),
        ("[" * 100_000, "it is no JSON"),
        ('{"text": "a"}', "it has the keys text; a row"),
        ('{"label": "no"}', "it has the keys label"),
        ('{"text": "a", "prompt": "a", "label": "no"}', "it has the keys text, prompt, label"),
        ('{"text": "a", "label": "no", "id": 1}', "it has the keys text, label, id"),
        ('{"text": "a", "label": "No"}', "label 'No' is none of the head's 2: 'no', 'yes'"),
        ('{"text": "a", "label": 0}', "label 0 is none"),
        ('{"text": "a", "label": ["no"]}', r"label \['no'\] is none"),
        ('{"text": "", "label": "no"}', "text: .* at least 1 character"),
        ('{"text": null, "label": "no"}', "text: .* valid string"),
        ('{"prompt": [1, 2], "label": "no"}', "prompt: .* valid string"),
        ('{"text": "\\ud800", "label": "no"}', "text: .* valid string"),
        ('{"messages": [], "label": "no"}', "messages: .* at least 1 item"),
        ('{"messages": "hello", "label": "no"}', "messages: .* valid list"),
        ('{"messages": [{"role": "user"}, {"content": "a"}], "label": "no"}', "messages.1.role: .*required"),
        ('{"messages": [{"role": "user", "content": "a", "to": 1}], "label": "no"}', "messages.0.to: .*not permitted"),
    ],
)
def test_what_no_row_is(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(click.BadParameter, match=f"--data 'dev.jsonl', line 2: {said}"):
        rows(tmp_path, '{"text": "a", "label": "no"}\n' + line)


def test_what_no_file_is(tmp_path: Path) -> None:
    with pytest.raises(click.BadParameter, match=r"'dev\.jsonl' cannot be read"):
        rows(tmp_path, '{"text": "\udcff", "label": "no"}')
    assert rows(tmp_path, "\n") == []
