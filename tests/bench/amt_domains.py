"""Labelled texts of domains that a pool has not seen, their noisy forms, and episodes over them. Knows no models."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.adapters.recipes.episodes import MOST_TOKENS
from motet.adapters.recipes.tasks import TASKS, examples, file_rows

WAYS, SHOTS, QUERIES = 5, 5, 5
"""Classes of an episode, where the domain has as many; rows of each to compare with, and to classify."""
ROWS_A_CLASS = {"subjects-dev": 10, "subjects": 12, "ag_news": 25, "sst2": 40, "advising-kind": 20}
"""Of the others all that there are."""
WORDS_DROPPED, LETTERS_CHANGED = 0.2, 0.1
SEED = 0
VALIDATION = "subjects-dev"
"""Other questions of the subjects that were trained on: what a member may be chosen by."""
HELD_OUT = ("subjects", "ag_news", "advising-kind", "wikisql-aggregate", "sst2")

Labelled = tuple[str, str]
"""Text, label."""


def without_words(text: str) -> str:
    """A fifth of the words is missing; at least one stays."""
    chance = random.Random(f"{SEED} {text}")
    words = text.split()
    return " ".join(word for word in words if chance.random() >= WORDS_DROPPED) or words[0]


def misspelt(text: str) -> str:
    """A tenth of the letters is another one."""
    chance = random.Random(f"{SEED} {text}")
    return "".join(
        chance.choice(string.ascii_lowercase) if letter.isalpha() and chance.random() < LETTERS_CHANGED else letter
        for letter in text
    )


NOISES: Mapping[str, Callable[[str], str]] = {
    "clean": lambda text: text,
    "words dropped": without_words,
    "misspelt": misspelt,
}
"""What becomes of all texts of an episode, support and queries."""


@dataclass(frozen=True)
class Domain:
    """Texts by label, labels in alphabetical order; at least SHOTS + QUERIES of each."""

    name: str
    texts: Mapping[str, Sequence[str]]

    @property
    def ways(self) -> int:
        return min(WAYS, len(self.texts))

    def episodes(self, count: int) -> Iterator[tuple[list[Labelled], list[Labelled]]]:
        """(support, queries), class after class."""
        source = random.Random(f"{SEED} {self.name}")
        for _ in range(count):
            support: list[Labelled] = []
            queries: list[Labelled] = []
            for label in source.sample(list(self.texts), self.ways):
                drawn = [(text, label) for text in source.sample(self.texts[label], SHOTS + QUERIES)]
                support += drawn[:SHOTS]
                queries += drawn[SHOTS:]
            yield support, queries


def domain(name: str, data: Path, count_tokens: Callable[[str], int]) -> Domain:
    """A sample of a domain, of texts that are no longer than the training's, noisy or not.

    Raises:
        DataError: its file is absent.
    """
    by_label: dict[str, list[str]] = {}
    for text, label in _rows(name, data):
        if text not in (known := by_label.setdefault(label, [])):
            known.append(text)
    source = random.Random(f"{SEED} rows of {name}")
    texts: dict[str, list[str]] = {}
    for label in sorted(by_label):
        every = [text for text in by_label[label] if _short(text, count_tokens)]
        if len(every) >= SHOTS + QUERIES:
            texts[label] = source.sample(every, min(ROWS_A_CLASS.get(name, len(every)), len(every)))
    return Domain(name, texts)


def _rows(name: str, data: Path) -> Sequence[Labelled]:
    if name == VALIDATION:
        return examples(TASKS["subjects"], data, "dev")
    if name in TASKS:
        return examples(TASKS[name], data, "test")
    read: Mapping[str, tuple[str, Callable[[dict[str, Any]], Labelled]]] = {
        "ag_news": ("text/ag_news.7600", lambda row: (row["title"], row["topic"])),
        "sst2": ("text/sst2.dev", lambda row: (row["sentence"], str(row["label"]))),
    }
    file, labelled = read[name]
    return [labelled(row) for row in file_rows(data, file)]


def _short(text: str, count_tokens: Callable[[str], int]) -> bool:
    return bool(text.split()) and all(1 <= count_tokens(noise(text)) <= MOST_TOKENS for noise in NOISES.values())
