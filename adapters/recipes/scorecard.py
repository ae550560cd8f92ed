"""scores.json: an adapter beside its base on held-out questions, with all that it was trained by.

Must not know: methods, the loop.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from motet.adapters.recipes.items import with_markers
from motet.adapters.recipes.readers import Example, User, unmarked
from motet.adapters.recipes.run import Order
from motet.adapters.recipes.scoring import Classify, Track, answers, score
from motet.adapters.recipes.tasks import JOINED, Task, examples, split_name
from motet.adapters.recipes.users import users

FILE = "scores.json"
ROWS_SEED = 0
"""All adapters of a task answer the same questions."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Questions to answer.

    Attributes:
        rows: with markers.
        n_all: how many the split has.
        users: of the rows; none where the task has none.
    """

    task: Task
    rows: Sequence[Example]
    n_all: int
    users: Sequence[User] = ()

    @classmethod
    def of(cls, task: Task, data: Path, n_rows: int) -> Exam:
        """A sample of the task's test split.

        Raises:
            DataError: the data is absent.
        """
        tests = examples(task, data, "test", marked=True)
        chosen = random.Random(ROWS_SEED).sample(range(len(tests)), min(n_rows, len(tests)))
        known = users([task], data, "test") if task.user is not None else []
        asking = [known[number] for number in chosen] if known else ()
        return cls(task, [tests[number] for number in chosen], len(tests), asking)

    def taken_by(
        self,
        model: Any,
        tokenizer: Any,
        track: Track[int],
        told: bool,
        for_users: Callable[[Sequence[User]], None] | None = None,
        classify: Classify | None = None,
    ) -> Result:
        """A model's scores.

        Args:
            told: whether it is told the form of the answer, as a base model must be.
            for_users: the trainee's, which the model must be told its rows' users by.
            classify: the trainee's, by which it answers in place of the vocabulary's logits.
        """

        def before(numbers: Sequence[int]) -> None:
            if for_users is not None:
                for_users([self.users[number] for number in numbers])

        def before_demo(_: Sequence[int]) -> None:
            if for_users is not None and self.task.demo_user is not None:
                for_users([self.task.demo_user])

        rows, demo = self.rows, self.task.demo
        if for_users is None:
            rows, demo = [(unmarked(asked), answer) for asked, answer in rows], unmarked(demo)
        else:
            tokenizer = with_markers(tokenizer)
        hint = self.task.hint if told else ""
        scores = score(model, tokenizer, self.task, rows, hint, track, before, classify)
        texts, _ = answers(model, tokenizer, self.task, [demo], before=before_demo, classify=classify)
        return Result(scores, texts[0])


@dataclass(frozen=True, slots=True)
class Result:
    """Scores, and the answer to the task's demo question, asked bare."""

    scores: dict[str, float]
    demo: str


def write(
    folder: Path, order: Order, exams: Sequence[Exam], bases: Sequence[Result], adapters: Sequence[Result]
) -> None:
    """Write the record beside the adapter.

    Args:
        exams: of each of the order's tasks; the results of either model belong to them one by one.
    """
    sections = {
        name: {
            "split": split_name(exam.task.data, "test"),
            "n": len(exam.rows),
            "of": exam.n_all,
            "base_told_the_format": base.scores,
            "adapter": adapter.scores,
            "demo": {"question": exam.task.demo, "base": base.demo, "adapter": adapter.demo},
        }
        for name, exam, base, adapter in zip(order.task.split(JOINED), exams, bases, adapters, strict=True)
    }
    record = {
        "task": order.task,
        **(sections[order.task] if len(sections) == 1 else {"tasks": sections}),
        **{name: value for name, value in asdict(order).items() if name != "task"},
        "training_dtype": "bfloat16 autocast",
        "scoring_dtype": "float32",
        **{package: version(package) for package in ("torch", "transformers", "peft")},
    }
    (folder / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
