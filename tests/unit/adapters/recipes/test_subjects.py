"""MMLU's one file in three parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from motet.adapters.recipes import subjects
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.scorecard import Exam
from motet.adapters.recipes.tasks import TASKS, examples
from tests.unit.adapters.recipes.conftest import write_rows

TASK = TASKS["subjects"]


def row(subject: str, number: int) -> dict[str, Any]:
    return {"subject": subject, "question": f" What of {subject} {number}?\n", "choices": list("abcd"), "answer": 0}


ROWS = [row(subject, number) for number in range(10) for subject in "gabcdef"]


def test_a_third_of_the_subjects_is_tested_whole_and_the_rest_is_split() -> None:
    train, dev, test = (subjects.part(ROWS, split) for split in ("train", "dev", "test"))
    assert Counter(one["subject"] for one in test) == dict.fromkeys("adg", 10)
    assert Counter(one["subject"] for one in train) == dict.fromkeys("bcef", 8)
    assert Counter(one["subject"] for one in dev) == dict.fromkeys("bcef", 2)
    every = [one["question"] for part in (train, dev, test) for one in part]
    assert sorted(every) == sorted(one["question"] for one in ROWS)


def test_a_question_belongs_to_a_subject_in_words(tmp_path: Path) -> None:
    rows = [row(name, 0) for name in ("abstract_algebra", "b", "c")]
    rows[0]["question"] = "Which\u2028lines\x85end?"  # json.dumps may leave these, and so does the file
    path = tmp_path / "qa" / "mmlu.test.jsonl"
    write_rows(tmp_path, "qa/mmlu.test", rows)
    path.write_text(path.read_text().replace("\\u2028", "\u2028").replace("\\u0085", "\x85"), encoding="utf-8")
    assert "\u2028" in path.read_text(encoding="utf-8")
    assert examples(TASK, tmp_path, "test") == [("Which\u2028lines\x85end?", "abstract algebra")]
    assert examples(TASK, tmp_path, "dev") == [("What of b 0?", "b"), ("What of c 0?", "c")]
    assert Exam.of(TASK, tmp_path, 1).n_all == 1


def test_an_answer_is_its_first_line() -> None:
    assert subjects.facts(" High School Physics \nfor it asks") == frozenset({("subject", "high school physics")})
    assert subjects.facts(" \n") is None


def test_another_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"qa/mmlu.test has no split 'validation'; it has train, dev and test"):
        subjects.part(ROWS, "validation")


def test_the_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"training data qa/mmlu.test.jsonl cannot be read"):
        examples(TASK, tmp_path, "train")
