"""Labelled texts as token ids, and their episodes: five classes, some rows of each to compare with, some to tell apart.

A pure function of the seed, so that a run can be taken up anywhere. Texts stand as they are, without a chat template:
so merges read them.

Must not know: models, methods.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import Example

WAYS, SHOTS = 5, 5
"""Classes of an episode, and rows of each to compare with."""
MOST_TOKENS = 32
"""Longer texts are left out: they would take most of the time, and pad all others."""


@dataclass(frozen=True, slots=True)
class Episode:
    """Numbers of rows, class after class; `labels` are 0 to WAYS - 1."""

    support: Sequence[int]
    queries: Sequence[int]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Episode:
        """Split what `Episodes.draws` gave."""
        each = len(numbers) // WAYS
        parts = [numbers[at : at + each] for at in range(0, len(numbers), each)]
        return cls(
            [number for part in parts for number in part[:SHOTS]], [number for part in parts for number in part[SHOTS:]]
        )

    @property
    def labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the support and of the queries, int64."""
        classes = torch.arange(WAYS)
        return classes.repeat_interleave(SHOTS), classes.repeat_interleave(len(self.queries) // WAYS)


@dataclass(frozen=True, slots=True)
class Episodes:
    """Rows of token ids.

    Attributes:
        classes: of each task, of each of its labels, the numbers of its rows.
    """

    rows: list[list[int]]
    classes: list[list[list[int]]]

    @classmethod
    def of(cls, tokenizer: Any, tasks: Sequence[Sequence[Example]]) -> Episodes:
        """The rows of some tasks; the answer is the label."""
        rows: list[list[int]] = []
        classes: list[list[list[int]]] = []
        for examples in tasks:
            by_label: dict[str, list[int]] = {}
            for text, label in examples:
                ids = list(tokenizer(text)["input_ids"])
                if 1 <= len(ids) <= MOST_TOKENS:
                    by_label.setdefault(label, []).append(len(rows))
                    rows.append(ids)
            classes.append([by_label[label] for label in sorted(by_label)])
        return cls(rows, classes)

    def digest(self) -> str:
        """SHA-256 of all token ids and of who belongs together."""
        return hashlib.sha256(repr((self.rows, self.classes)).encode()).hexdigest()

    def draws(self, steps: int, size: int, seed: int) -> Iterator[list[int]]:
        """The numbers of the rows of `steps` episodes, class after class; the tasks take turns.

        Args:
            size: rows of an episode.

        Raises:
            DataError: `size` is no number of rows that an episode can have, or a task has too few classes for it.
        """
        each, left = divmod(size, WAYS)
        if left or each <= SHOTS:
            raise DataError(
                f"--batch {size} is no episode of {WAYS} classes with {SHOTS} rows each to compare with and as many "
                f"others of each; choose a multiple of {WAYS} from {WAYS * (SHOTS + 1)} on"
            )
        large = [[rows for rows in classes if len(rows) >= each] for classes in self.classes]
        if (fewest := min(map(len, large))) < WAYS:
            raise DataError(
                f"a task has {fewest} labels with {each} rows of at most {MOST_TOKENS} tokens; an episode of --batch "
                f"{size} needs {WAYS}: choose another task, or lower --batch"
            )
        source = random.Random(seed)
        for step in range(steps):
            chosen = source.sample(large[step % len(large)], WAYS)
            yield [number for rows in chosen for number in source.sample(rows, each)]
