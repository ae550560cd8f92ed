"""TASKS: what an adapter can be taught, with the data it is taught and tested by.

Must not know: models, tokens, methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from motet.adapters.recipes import lastfm, readers, subjects
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import Example, Facts, User, unmarked


@dataclass(frozen=True, slots=True)
class Task:
    """A bare question to a short answer.

    Attributes:
        data: path below the data folder, without `.train.jsonl`, `.test.jsonl`; with a slash at its end, of the folder
            that has `train.jsonl`, `test.jsonl`; where there is a `part`, of the one file, without `.jsonl`.
        read: a row of the data, with markers where items can stand; None where it does not fit.
        facts: what an answer is scored by; None where the text is not of the task's form.
        hint: put before the question for the base model only, which cannot know the form otherwise.
        answer_tokens: the longest answer asked for.
        choices: all answers there are, to rank by the logit of their first token as well; the rows are balanced
            between them.
        prepare: what else of the data folder the rows need, put into those that are kept.
        part: the rows of a split, where one file has them all.
        user: of a row; None where the task has none.
        encoder: path below the data folder of the SASRec that reads the histories.
        demo_user: who asks the demo question.
    """

    data: str
    read: Callable[[dict[str, Any]], Example | None]
    facts: Callable[[str], Facts | None]
    hint: str
    answer_tokens: int
    demo: str
    choices: tuple[str, ...] | None = None
    prepare: Callable[[Path, list[dict[str, Any]]], list[dict[str, Any]]] = lambda _, rows: rows
    part: Callable[[list[dict[str, Any]], str], list[dict[str, Any]]] | None = None
    user: Callable[[dict[str, Any]], User] | None = None
    encoder: str | None = None
    demo_user: User | None = None


TASKS: Mapping[str, Task] = {
    "wikisql": Task(
        data="text/wikisql",
        read=readers.read_wikisql,
        facts=readers.sql_facts,
        hint="Write one SQL query over a table named table that answers the question. Reply with SQL only, "
        "like SELECT MAX(points) FROM table WHERE team = 'Essendon' AND year > 1990\n\nQuestion: ",
        answer_tokens=80,
        demo="What is the highest number of points when the home team is Essendon?",
    ),
    "advising-slots": Task(
        data="text/advising_sql",
        read=readers.read_slots,
        facts=readers.slot_facts,
        hint="Extract the values of department, number, requirement, semester, instructor, topic, credit, level, "
        "year, time, area, grade and program that the question names. Reply with one JSON object only, like "
        '{"department": "MATH", "number": "185", "semester": "Summer"}\n\nQuestion: ',
        answer_tokens=64,
        demo="Is EECS 484 offered in the Winter of 2017?",
    ),
    "boolq": Task(
        data="qa/boolq",
        read=readers.read_boolq,
        facts=readers.boolq_facts,
        hint="Answer with one word, true or false: ",
        answer_tokens=4,
        demo="Is confectioners' sugar the same as powdered sugar?",
        choices=("true", "false"),
    ),
    "wikisql-aggregate": Task(
        data="text/wikisql",
        read=readers.read_aggregate,
        facts=partial(readers.word_facts, readers.AGGREGATES.values()),
        hint="Which operation on a table answers the question? Answer with one word: select, count, maximum, minimum, "
        "sum or average.\n\nQuestion: ",
        answer_tokens=4,
        demo="What is the highest number of points when the home team is Essendon?",
        choices=tuple(readers.AGGREGATES.values()),
    ),
    "advising-kind": Task(
        data="text/advising_sql",
        read=readers.read_kind,
        facts=partial(readers.word_facts, readers.KINDS),
        hint="What does the student ask for? Answer with one word: course, teacher, time, number, or whether for a "
        "question that is answered by yes or no.\n\nQuestion: ",
        answer_tokens=4,
        demo="Who is teaching EECS 484 next Winter?",
        choices=readers.KINDS,
    ),
    "subjects": Task(
        data=subjects.DATA,
        read=subjects.read,
        facts=subjects.facts,
        hint=subjects.HINT,
        answer_tokens=8,
        demo=subjects.DEMO,
        part=subjects.part,
    ),
    "lastfm": Task(
        data=lastfm.DATA,
        read=lastfm.read,
        facts=lastfm.facts,
        hint=lastfm.HINT,
        answer_tokens=24,
        demo=lastfm.DEMO,
        prepare=lastfm.prepare,
        user=lambda row: row["user"],
        encoder=lastfm.ENCODER,
        demo_user=lastfm.DEMO_USER,
    ),
}
JOINED = "+"
"""Between the names of tasks that one adapter learns at once."""


def named(names: str) -> tuple[Task, ...]:
    """The tasks of a name, or of several joined by "+".

    Raises:
        DataError: there is no such task, or one stands twice.
    """
    parts = names.split(JOINED)
    for number, part in enumerate(parts):
        if part not in TASKS:
            raise DataError(f"there is no task {part!r}; choose from {', '.join(TASKS)}, one or several joined by '+'")
        if part in parts[:number]:
            raise DataError(f"the task {part!r} is named twice; name each once")
    return tuple(TASKS[part] for part in parts)


def interleaved(tasks: Sequence[Task], data: Path, split: str) -> list[Example]:
    """Rows of each task in turn, as many of every one as the smallest has.

    Raises:
        DataError: a file is absent.
    """
    return [example for turn in zip(*(examples(task, data, split) for task in tasks), strict=False) for example in turn]


def examples(task: Task, data: Path, split: str, marked: bool = False) -> list[Example]:
    """Every row of a split that fits the task, in the order of the file.

    Args:
        marked: leave the markers in the questions.

    Raises:
        DataError: the file is absent.
    """
    found = [example for row in prepared(task, data, split) if (example := task.read(row)) is not None]
    if not marked:
        found = [(unmarked(asked), told) for asked, told in found]
    if task.choices is None:
        return found
    sides = ([example for example in found if example[1] == choice] for choice in task.choices)
    return [example for turn in zip(*sides, strict=False) for example in turn]  # as many of each as of any other


def prepared(task: Task, data: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split as the task prepares them.

    Raises:
        DataError: a file is absent.
    """
    if task.part is not None:
        return task.prepare(data, task.part(file_rows(data, task.data), split))
    return task.prepare(data, rows(data, task.data, split))


def rows(data: Path, name: str, split: str) -> list[dict[str, Any]]:
    """The JSON objects of a split's file.

    Raises:
        DataError: the file is absent.
    """
    return file_rows(data, split_name(name, split))


def file_rows(data: Path, name: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, named without `.jsonl`.

    Raises:
        DataError: the file is absent.
    """
    try:
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")  # texts may hold other ends of lines
    except OSError as error:
        raise DataError(
            f"training data {name}.jsonl cannot be read ({error.strerror}); "
            "name the folder that has it with --data or MOTET_DATA"
        ) from error
    return [json.loads(line) for line in lines if line]


def split_name(name: str, split: str) -> str:
    """Path of a split's file below the data folder, without `.jsonl`; `name` as `Task.data`."""
    return name + split if name.endswith("/") else f"{name}.{split}"
