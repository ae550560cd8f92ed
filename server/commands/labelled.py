"""The labelled rows of `motet calibrate`.

Must not know: models, heads, how a prompt becomes tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from motet.server.api.schemas import Message

PROMPTS = ("text", "prompt", "messages")
"""What is asked: the first two are the same, a text as /v1/completions takes it; the third is a chat."""
_CHAT = TypeAdapter(Annotated[list[Message], Field(min_length=1)])
_TEXT = TypeAdapter(Annotated[str, StringConstraints(min_length=1)])


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One line of the file.

    Attributes:
        line: its number, from 1.
        prompt: a text, or the messages of a chat.
        label: number of the label among the head's.
    """

    line: int
    prompt: str | list[Message]
    label: int


def read_rows(file: Path, labels: Sequence[str]) -> list[LabelledRow]:
    """The rows of a file of JSON Lines.

    Args:
        labels: of the head.

    Raises:
        click.BadParameter: a line is something else, or its label is none of the head's.
    """
    try:
        lines = file.read_text("utf-8").split("\n")  # JSON strings may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"--data {file.name!r} cannot be read: {error}") from error
    return [_row(file, number, line, labels) for number, line in enumerate(lines, 1) if line.strip()]


def _row(file: Path, number: int, line: str, labels: Sequence[str]) -> LabelledRow:
    def wrong(what: str) -> click.BadParameter:
        return click.BadParameter(f"--data {file.name!r}, line {number}: {what}")

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong(f"it is no JSON: {error}") from error
    prompts = [name for name in PROMPTS if isinstance(row, dict) and name in row]
    if len(prompts) != 1 or row.keys() != {*prompts, "label"}:
        said = f"has the keys {', '.join(row)}" if isinstance(row, dict) else "is no object"
        raise wrong(f"it {said}; a row has label and one of {', '.join(PROMPTS)}, and nothing else")
    prompt, label = row[prompts[0]], row["label"]
    if label not in labels:
        shown = ", ".join(map(repr, labels[:10])) + (", …" if len(labels) > 10 else "")
        raise wrong(f"label {label!r} is none of the head's {len(labels)}: {shown}")
    try:
        content: str | list[Message] = (_CHAT if prompts[0] == "messages" else _TEXT).validate_python(prompt)
    except ValidationError as error:
        first = error.errors()[0]
        raise wrong(f"{'.'.join(map(str, (prompts[0], *first['loc'])))}: {first['msg']}") from error
    return LabelledRow(number, content, labels.index(label))
