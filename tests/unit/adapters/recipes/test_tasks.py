"""Rows of the data sets as questions, answers and facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.adapters.recipes import knowledge, readers
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.tasks import TASKS, examples
from tests.unit.adapters.recipes.conftest import wikisql_row, write_rows


def test_wikisql_becomes_sql_with_plain_columns_and_the_values_of_the_question() -> None:
    row = {
        "question": "What is the number of Byes when Against is 1,076 and team is Bob 's ?",
        "sql": "SELECT MAX TABLEalias0.NO._OF_BYES_FIELD FROM TABLE AS TABLEalias0 WHERE TABLEalias0.AGAINST_FIELD = "
        '1,076 AND TABLEalias0.TEAM_FIELD = "bob \'s" ;',
    }
    question = "What is the number of Byes when Against is 1,076 and team is Bob's?"
    answer = "SELECT MAX(no_of_byes) FROM table WHERE against = 1076 AND team = 'Bob''s'"
    assert readers.read_wikisql(row) == (question, answer)


def test_wikisql_rows_whose_value_is_not_in_the_question_are_left_out() -> None:
    row = wikisql_row("red", 4)
    assert readers.read_wikisql(row) is not None
    assert readers.read_wikisql({**row, "sql": row["sql"].replace("red", "blue")}) is None
    assert readers.read_wikisql({**row, "sql": "DROP TABLE ;"}) is None


def test_sql_is_the_same_in_any_order_case_and_quotes() -> None:
    facts = readers.sql_facts("SELECT MAX(a) FROM table WHERE b = 'X' AND c > 3")
    assert facts == readers.sql_facts('```sql\nselect max(a) from t where c>3 and b="x";\n```')
    assert facts == frozenset({("select", "max(a)"), ("where", "b = x"), ("where", "c > 3")})
    assert readers.sql_facts("The answer is 10.") is None


def test_slots_are_in_the_order_of_the_question_and_lists_where_there_are_several() -> None:
    row = {
        "question": "Is 484 or 485 of EECS easy ?",
        "slots": {"department0": "EECS", "number0": "484", "number1": "485", "year": ""},
    }
    assert readers.read_slots(row) == (
        "Is 484 or 485 of EECS easy?",
        '{"number": ["484", "485"], "department": "EECS"}',
    )
    facts = frozenset({("number", "484"), ("number", "485"), ("department", "eecs")})
    assert readers.slot_facts('Here: {"department": "EECS", "number": ["485", "484"]}.') == facts
    assert readers.slot_facts("no object") is None
    assert readers.slot_facts("{not json}") is None


def test_boolq_takes_yes_for_true() -> None:
    row = {"instruction": "Answer. question: is it so?\n\nAnswer format: true/false", "answer": "false"}
    assert readers.read_boolq(row) == ("Is it so?", "false")
    assert readers.boolq_facts("Yes, it is") == readers.boolq_facts("true") == frozenset({("answer", "true")})
    assert readers.boolq_facts("yesterday") is None


def test_the_rows_of_a_choice_are_balanced(tmp_path: Path) -> None:
    rows = [{"instruction": f"question: q{n}?\n", "answer": "true" if n else "false"} for n in range(4)]
    write_rows(tmp_path, "qa/boolq.train", rows)
    assert examples(TASKS["boolq"], tmp_path, "train") == [("Q1?", "true"), ("Q0?", "false")]


def test_absent_data_is_named_without_its_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text/wikisql\.dev\.jsonl .*--data or MOTET_DATA") as error:
        examples(TASKS["wikisql"], tmp_path, "dev")
    assert str(tmp_path) not in str(error.value)


def test_arc_questions_are_parsed_with_any_number_of_answers(tmp_path: Path) -> None:
    form = "Please choose the correct answer to the question: {}\n\n{}\n\nAnswer format: answer1/answer2"
    rows = [
        {"instruction": form.format("Why: A?", "Answer1: one, two Answer2: three"), "answer": "answer2"},
        {"instruction": form.format("B?", "Answer1: x Answer2: y Answer3: z"), "answer": "answer1"},
        {"instruction": form.format("C?", "Answer1: x Answer2: y"), "answer": "answer4"},
    ]
    write_rows(tmp_path, "qa/ARC-Easy.train", rows)
    first, second = knowledge.questions(tmp_path, "train")
    assert (first.text, first.choices, first.right) == ("Why: A?", ("one, two", "three"), 1)
    assert first.statement == "Question: Why: A?\nAnswer: three"
    assert (second.choices, second.right) == (("x", "y", "z"), 0)
