"""Scores of known answers, and the record of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from motet.adapters.recipes import scorecard
from motet.adapters.recipes.items import marker_ids, with_markers
from motet.adapters.recipes.readers import User
from motet.adapters.recipes.run import Base, Order
from motet.adapters.recipes.scoring import answers, score
from motet.adapters.recipes.tasks import TASKS
from tests.support.tokenizer import byte_tokenizer


class Scripted:
    """Answers each prompt as told; the logits of the first token as told too."""

    def __init__(self, tokenizer: Any, said: Mapping[str, str], logits: Mapping[str, float] | None = None) -> None:
        self._tokenizer, self._said, self._logits = tokenizer, said, logits or {}

    def eval(self) -> Scripted:
        return self

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> SimpleNamespace:
        assert not options["do_sample"]
        rows, first = [], torch.zeros(len(input_ids), 320)
        for i, ids in enumerate(input_ids):
            prompt = self._tokenizer.decode(ids[attention_mask[i] == 1])
            question = prompt.removeprefix("<user>").removesuffix("\n<assistant>")
            rows.append(self._tokenizer(self._said[question] + "</s>")["input_ids"])
            first[i, self._tokenizer("true")["input_ids"][0]] = self._logits.get(question, 0.0)
        longest = max(map(len, rows))
        told = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return SimpleNamespace(sequences=torch.cat([input_ids, told], dim=1), logits=[first])


def test_answers_come_in_the_order_of_the_questions_whatever_their_length() -> None:
    tokenizer = byte_tokenizer()
    said = {f"q{'x' * (n % 7)}{n}": f"answer {n}" for n in range(40)}
    texts, logits = answers(Scripted(tokenizer, said), tokenizer, TASKS["wikisql"], list(said))
    assert texts == list(said.values())
    assert logits == [[]] * 40


def test_scores_count_facts() -> None:
    tests = [("a", "SELECT x FROM table WHERE y = 1"), ("b", "SELECT x FROM table"), ("c", "SELECT z FROM table")]
    said = {"a": "select X from t where y=1", "b": "SELECT x FROM table WHERE y = 2", "c": "I do not know."}
    tokenizer = byte_tokenizer()
    found = score(Scripted(tokenizer, said), tokenizer, TASKS["wikisql"], tests)
    # Facts said 2 + 2 + 0, wanted 2 + 1 + 1, shared 2 + 1.
    assert found == {"exact_match": 0.3333, "f1": 0.75, "well_formed": 0.6667}


def test_the_hint_precedes_every_question() -> None:
    tokenizer = byte_tokenizer()
    model = Scripted(tokenizer, {"Hint: a": "SELECT x FROM table"})
    assert score(model, tokenizer, TASKS["wikisql"], [("a", "SELECT x FROM table")], "Hint: ")["exact_match"] == 1


def test_choices_are_ranked_by_their_first_logits() -> None:
    tokenizer = byte_tokenizer()
    tests = [("a", "true"), ("b", "true"), ("c", "false"), ("d", "false")]
    model = Scripted(tokenizer, dict(tests), {"a": 2.0, "b": -1.0, "c": -1.0, "d": -3.0})
    found = score(model, tokenizer, TASKS["boolq"], tests)
    assert (found["logit_accuracy"], found["logit_auc"], found["majority_class"]) == (0.75, 0.875, 0.5)


def test_more_than_two_choices_have_no_auc() -> None:
    """The first tokens are c, t, t, n and w; 't' has the logits that are told, all others 0."""
    tokenizer = byte_tokenizer()
    tests = [("a", "teacher"), ("b", "course"), ("c", "course"), ("d", "whether")]
    model = Scripted(tokenizer, dict(tests), {"a": 2.0, "b": -1.0, "c": 1.0, "d": -1.0})
    found = score(model, tokenizer, TASKS["advising-kind"], tests)
    assert (found["logit_accuracy"], found["majority_class"], found["exact_match"]) == (0.5, 0.5, 1.0)
    assert "logit_auc" not in found


def test_the_record_of_joined_tasks_has_a_part_for_each(
    order: Callable[..., Order], data: Path, tmp_path: Path
) -> None:
    exams = [scorecard.Exam.of(TASKS[name], data, 5) for name in ("wikisql", "boolq")]
    bases = [scorecard.Result({"f1": 0.1}, "prose"), scorecard.Result({"f1": 0.2}, "prose")]
    adapters = [scorecard.Result({"f1": 0.3}, "SELECT"), scorecard.Result({"f1": 0.4}, "true")]
    scorecard.write(tmp_path, order("lora", task="wikisql+boolq"), exams, bases, adapters)
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["task"] == "wikisql+boolq"
    assert record["tasks"].keys() == {"wikisql", "boolq"}
    assert (record["tasks"]["boolq"]["base_told_the_format"], record["tasks"]["boolq"]["adapter"]) == (
        {"f1": 0.2},
        {"f1": 0.4},
    )
    assert record["tasks"]["wikisql"]["split"] == "text/wikisql.test"
    assert (record["method"], record["rank"]) == ("lora", 3)
    assert "adapter" not in record


def test_the_record_says_how_the_adapter_was_trained(
    base: Callable[[], Base], order: Callable[..., Order], data: Path, tmp_path: Path
) -> None:
    exam = scorecard.Exam.of(TASKS["wikisql"], data, 5)
    assert (len(exam.rows), exam.n_all) == (5, 36)
    assert exam.rows == scorecard.Exam.of(TASKS["wikisql"], data, 5).rows
    tracked: list[int] = []

    def track(items: Any) -> Any:
        tracked.extend(items)
        return items

    said = dict(exam.rows) | {exam.task.demo: "SELECT demo FROM table"}
    tokenizer = byte_tokenizer()
    result = exam.taken_by(Scripted(tokenizer, said), tokenizer, track, told=False)
    assert tracked == [0]
    scorecard.write(tmp_path, order("pissa", seed=3), [exam], [scorecard.Result({"f1": 0.0}, "prose")], [result])
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["adapter"]["exact_match"] == 1
    assert record["demo"] == {"question": exam.task.demo, "base": "prose", "adapter": "SELECT demo FROM table"}
    expected = {"task": "wikisql", "split": "text/wikisql.test", "n": 5, "of": 36, "method": "pissa", "seed": 3}
    assert expected.items() <= record.items()


@pytest.mark.parametrize("told", [True, False])
def test_only_the_base_is_told_the_form(told: bool, data: Path) -> None:
    exam = scorecard.Exam.of(TASKS["wikisql"], data, 2)
    hint = exam.task.hint if told else ""
    tokenizer = byte_tokenizer()
    model = Scripted(tokenizer, {**{hint + question: answer for question, answer in exam.rows}, exam.task.demo: "x"})
    assert exam.taken_by(model, tokenizer, iter, told).scores["exact_match"] == 1


def named(asked: str) -> User:
    """The items whose names, and markers, are in a question."""
    heard, offered = (re.findall(rf"Band (\d+) \[{marker}Emb\]", asked) for marker in ("History", "Cans"))
    return User(tuple(map(int, heard)), tuple(map(int, offered)))


def test_a_model_is_told_whose_questions_come_next(data: Path) -> None:
    """In the order of each batch, which is by length; the demo has a user of its own."""
    exam = scorecard.Exam.of(TASKS["lastfm"], data, 9)
    assert len(exam.users) == len(exam.rows) == 9
    assert all(named(asked) == user for user, (asked, _) in zip(exam.users, exam.rows, strict=True))
    tokenizer, told, counts = with_markers(byte_tokenizer()), [], []
    markers = torch.tensor(marker_ids(byte_tokenizer()))

    class Listening(Scripted):
        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> SimpleNamespace:
            told.append([tokenizer.decode(ids[mask == 1]) for ids, mask in zip(input_ids, attention_mask, strict=True)])
            counts.extend(torch.isin(input_ids, markers).sum(1).tolist())
            return super().generate(input_ids, attention_mask, **options)

    said = dict(exam.rows) | {exam.task.demo: "Air"}
    users: list[Any] = []
    model = Listening(tokenizer, said)
    result = exam.taken_by(model, byte_tokenizer(), iter, told=False, for_users=users.append)
    assert result.scores["exact_match"] == 1
    batch, demo = users
    assert demo == [exam.task.demo_user]
    assert counts == [len(user.history) + len(user.candidates) for user in (*batch, *demo)]
    assert len(told) == 2
    assert all(named(prompt) == user for user, prompt in zip(batch, told[0], strict=True))
