"""The prompts that `motet verify` compares log-probabilities on.

Must not know: models, servers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click

BUILT_IN: tuple[str, ...] = (
    "The sea is",
    "Question: what is the capital of Norway?\nAnswer: Oslo.",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2024 GROUP BY name HAVING COUNT(*) > 3 ORDER BY 2 DESC;",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
    "def mean(values: list[float]) -> float:\n"
    '    """Arithmetic mean; an empty list has none."""\n'
    "    if not values:\n"
    '        raise ValueError("no values")\n'
    "    return sum(values) / len(values)\n",
    "A motet is a piece of music for several voices. In its oldest form one voice, the tenor, sings a melody that "
    "everybody knows, slowly and in long notes, while the voices above it sing texts of their own, often in another "
    "language and at another speed. None of them waits for the others, and yet every chord is planned: each voice "
    "must fit the one melody below, and through it they all fit together. Composers of the thirteenth century liked "
    "to add a third and a fourth voice to motets that were already complete, leaving the tenor as it stood. Listeners "
    "could follow whichever voice they wished.\n\n1. Which voice is the oldest?\n2. Who waits for whom?\n3. What did "
    "composers leave unchanged?\n",
)
"""Of a few to about two hundred tokens, in prose, code and another language."""

Encode = Callable[[str], Sequence[int]]


def tokens_of(encode: Encode, texts: Sequence[str], file: Path | None) -> list[list[int]]:
    """Token ids of the prompts given one by one and in a file; of the built-in ones where there are none.

    Args:
        encode: text → token ids.
        file: JSON Lines; each line a string, or an object with `prompt` (text) or `tokens` (ids).

    Raises:
        click.BadParameter: the file says something else, or a prompt has fewer than two tokens.
    """
    several: list[str | list[int]] = [*texts, *(_read(file) if file else ())]
    found = [list(encode(one)) if isinstance(one, str) else one for one in several or BUILT_IN]
    for one, tokens in zip(several or BUILT_IN, found, strict=True):
        if len(tokens) < 2:
            raise click.BadParameter(
                f"the prompt {one!r} has {len(tokens)} tokens; two are the least, because the first has no probability"
            )
    return found


def _read(file: Path) -> list[str | list[int]]:
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise click.BadParameter(f"--prompts {str(file)!r} cannot be read as JSON Lines: {error}") from error
    if not lines:
        raise click.BadParameter(f"--prompts {str(file)!r} holds no prompt; write one JSON value per line")
    return [_one(file, number, line) for number, line in enumerate(lines, 1)]


def _one(file: Path, number: int, line: object) -> str | list[int]:
    text = line["prompt"] if isinstance(line, dict) and line.keys() == {"prompt"} else line
    if isinstance(text, str):
        return text
    tokens = line["tokens"] if isinstance(line, dict) and line.keys() == {"tokens"} else None
    if isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens):
        return tokens
    raise click.BadParameter(
        f"--prompts {str(file)!r}: value {number} is neither a string, nor an object with prompt (text) or tokens (ids)"
    )
