"""Rows of the data sets as questions, answers and facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.adapters.recipes import knowledge, readers
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.tasks import TASKS, examples, interleaved, named
from tests.unit.adapters.recipes.conftest import boolq_row, wikisql_row, write_rows


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


@pytest.mark.parametrize(("function", "word"), [("", "select"), ("COUNT ", "count"), ("avg ", "average")])
def test_an_aggregate_is_a_word(function: str, word: str) -> None:
    row = wikisql_row("red", 4)
    row["sql"] = row["sql"].replace("COUNT ", function)
    assert readers.read_aggregate(row) == ("How many red cars have 4 doors?", word)
    assert readers.read_aggregate({**row, "sql": "DROP TABLE ;"}) is None


@pytest.mark.parametrize(
    ("selected", "kind"),
    [
        ("DISTINCT COURSEalias0.NAME , COURSEalias0.NUMBER", "course"),
        ("DISTINCT INSTRUCTORalias0.NAME", "teacher"),
        ("DISTINCT COURSE_OFFERINGalias0.END_TIME , COURSE_OFFERINGalias0.SECTION_NUMBER", "time"),
        ("DISTINCT SEMESTERalias0.YEAR", "time"),
        ("COUNT( DISTINCT COURSEalias0.COURSE_ID , SEMESTERalias0.SEMESTER )", "number"),
        ("COUNT( * )", "number"),
        ("COUNT( * ) > 0", "whether"),
        ("COUNT( * ) = 0", "whether"),
        ("DISTINCT COURSE_OFFERINGalias0.SECTION_NUMBER", None),
        ("DISTINCT COURSEalias0.NAME , INSTRUCTORalias0.NAME", None),
        ("DISTINCT COURSEalias0.NAME , SEMESTERalias0.SEMESTER", None),
        ("COUNT( * ) > 0 , PROGRAM_COURSEalias0.WORKLOAD", None),
    ],
)
def test_what_a_student_asks_for_is_what_the_query_selects(selected: str, kind: str | None) -> None:
    row = {"question": "Is it so ?", "sql": f"SELECT {selected} FROM COURSE AS COURSEalias0 WHERE A = 1 ;"}
    assert readers.read_kind(row) == (kind and ("Is it so?", kind))
    assert readers.read_kind({**row, "sql": "DROP TABLE ;"}) is None


def test_a_word_is_a_fact_where_it_may_be_the_answer() -> None:
    assert readers.word_facts(readers.KINDS, " Course, I think") == frozenset({("answer", "course")})
    assert readers.word_facts(readers.KINDS, "Courses") is None
    assert readers.word_facts(readers.KINDS, "It is a course") is None


def test_every_answer_is_one_of_the_choices() -> None:
    labelled = {name: task.choices for name, task in TASKS.items() if task.choices}
    assert labelled.keys() == {"boolq", "wikisql-aggregate", "advising-kind"}
    words = [word for choices in labelled.values() for word in choices]
    assert len(set(words)) == len(words), "or the tasks could not be joined"
    for name, choices in labelled.items():
        assert all(TASKS[name].facts(word) == frozenset({("answer", word)}) for word in choices)


def test_joined_tasks_take_turns_with_as_many_rows_each(tmp_path: Path) -> None:
    write_rows(tmp_path, "qa/boolq.train", map(boolq_row, range(10)))
    write_rows(tmp_path, "text/wikisql.train", [wikisql_row("red", n) for n in range(3)])
    found = interleaved(named("boolq+wikisql"), tmp_path, "train")
    questions = [question for question, _ in found]
    assert questions[::2] == ["Is 0 even?", "Is 1 even?", "Is 2 even?"]
    assert questions[1::2] == [f"How many red cars have {n} doors?" for n in range(3)]
    assert interleaved(named("boolq"), tmp_path, "train") == examples(TASKS["boolq"], tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("boolq+bolq", "there is no task 'bolq'; choose from wikisql, advising-slots, boolq, wikisql-aggregate"),
        ("boolq+", "there is no task ''; choose from"),
        ("boolq+wikisql+boolq", "the task 'boolq' is named twice; name each once"),
    ],
)
def test_joined_names_are_names_of_tasks(names: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        named(names)


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
