"""Multiple-choice questions of ARC-Easy: what a base model knows and fine-tuning may make it forget.

Must not know: models, tokens, methods.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from motet.adapters.recipes.tasks import rows

DATA = "qa/ARC-Easy"
QUESTION = re.compile(r"[^:]*: (?P<text>.*?)\s*(?P<choices>Answer1: .*?)\s*Answer format: .*", re.S)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its possible answers, and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    right: int

    @property
    def prompt(self) -> str:
        """What an answer is the continuation of, after one space."""
        return f"Question: {self.text}\nAnswer:"

    @property
    def statement(self) -> str:
        """Prompt and right answer: the text that states the knowledge."""
        return f"{self.prompt} {self.choices[self.right]}"


def questions(data: Path, split: str) -> list[Question]:
    """The questions of a split in the order of the file.

    Raises:
        DataError: the file is absent.
    """
    found = []
    for row in rows(data, DATA, split):
        parsed = QUESTION.fullmatch(row["instruction"])
        if parsed is None:
            continue
        choices = tuple(choice.strip() for choice in re.split(r"\s*Answer\d+: ", parsed["choices"])[1:])
        right = int(row["answer"].removeprefix("answer")) - 1
        if right < len(choices) and all(choices):
            found.append(Question(parsed["text"].strip(), choices, right))
    return found
