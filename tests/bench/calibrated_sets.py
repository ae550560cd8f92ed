"""The questions that PoLAR-VBLL's claim is measured on: few rows to learn from, each answered by one token.

Knows nothing of models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.adapters.recipes.readers import Example
from motet.adapters.recipes.tasks import TASKS, examples, rows

TRAIN_ROWS, TEST_ROWS, ROWS_SEED = 200, 150, 0
AG_WORDS = {"World": "world", "Sports": "games", "Business": "business", "Sci/Tech": "science"}
SST_WORDS = ("negative", "positive")


@dataclass(frozen=True)
class Questions:
    """Of one set, balanced or nearly so."""

    words: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[Example]


def ag_news(data: Path) -> Questions:
    """The topic of a headline, without its text."""
    drawn = random.Random(ROWS_SEED).sample(_file(data, "text/ag_news.7600"), TRAIN_ROWS + TEST_ROWS)
    found = [(row["title"], AG_WORDS[row["topic"]]) for row in drawn]
    return Questions(tuple(AG_WORDS.values()), found[:TRAIN_ROWS], found[TRAIN_ROWS:])


def sst2(data: Path) -> Questions:
    """Whether a review is good or bad."""
    train, test = (
        [(row["sentence"].strip(), SST_WORDS[row["label"]]) for row in random.Random(ROWS_SEED).sample(found, n)]
        for found, n in ((_file(data, "text/sst2.train8k"), TRAIN_ROWS), (_file(data, "text/sst2.dev"), TEST_ROWS))
    )
    return Questions(SST_WORDS, train, test)


def aggregate(data: Path) -> Questions:
    """What a question makes of a column; see TASKS."""
    task, chosen = TASKS["wikisql-aggregate"], random.Random(ROWS_SEED)
    test = [example for split in ("dev", "test") for example in examples(task, data, split)]
    assert task.choices is not None
    train = chosen.sample(examples(task, data, "train"), TRAIN_ROWS)
    return Questions(task.choices, train, chosen.sample(test, TEST_ROWS))


SETS: Mapping[str, Callable[[Path], Questions]] = {"ag_news": ag_news, "sst2": sst2, "wikisql-aggregate": aggregate}


def _file(data: Path, name: str) -> list[dict[str, Any]]:
    stem, _, split = name.rpartition(".")
    return rows(data, stem, split)
