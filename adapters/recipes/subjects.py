"""MMLU's questions by their subject. There is one file: a third of the subjects is kept for tests, whole.

Must not know: models, tokens, methods.
"""

from __future__ import annotations

from typing import Any

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import Example, Facts

DATA = "qa/mmlu.test"
TEST_EVERY = 3
"""Of the subjects in alphabetical order, the first of each three is a test's."""
DEV_EVERY = 5
"""Of the rows of another subject, the first of each five is for choosing between adapters."""
HINT = "To which subject does this question belong? Answer with the name of the subject only, like machine learning\n\n"
DEMO = "Which planet has the shortest day?"


def part(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Those of a split: test has subjects of its own, train and dev share theirs.

    Raises:
        DataError: there is no such split.
    """
    if split not in ("train", "dev", "test"):
        raise DataError(f"{DATA} has no split {split!r}; it has train, dev and test")
    subjects = sorted({row["subject"] for row in rows})
    tested = set(subjects[::TEST_EVERY])
    if split == "test":
        return [row for row in rows if row["subject"] in tested]
    kept, seen = [], dict.fromkeys(subjects, 0)
    for row in rows:
        is_dev = seen[row["subject"]] % DEV_EVERY == 0
        seen[row["subject"]] += 1
        if row["subject"] not in tested and is_dev == (split == "dev"):
            kept.append(row)
    return kept


def read(row: dict[str, Any]) -> Example:
    """The question without its choices; its subject in words."""
    return row["question"].strip(), row["subject"].replace("_", " ")


def facts(text: str) -> Facts | None:
    """The first line, free of its case; None where it is empty."""
    name = (text.strip().splitlines() or [""])[0].strip().casefold()
    return frozenset({("subject", name)}) if name else None
