"""Rows of the data sets as question and answer, and answers as sets of facts to score.

Must not know: models, tokens, files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

Example = tuple[str, str]
"""Question, answer."""
MARKERS = {"history": "[HistoryEmb]", "candidates": "[CansEmb]"}
"""After the names of a user's items in a question: in their places a model may read the items themselves."""


class User(NamedTuple):
    """Ids of the items that a question names, in its order: those that its user had, oldest first, and the offered."""

    history: tuple[int, ...]
    candidates: tuple[int, ...]


Facts = frozenset[tuple[str, str]]
"""What a text says, free of its order, case and quotes."""

SELECT = re.compile(r"SELECT (?:([A-Z]+) )?(\S+?)_FIELD FROM TABLE(?: AS \w+)?(?: WHERE (.+))? ;", re.I)
CONDITION = re.compile(r"(\S+?)_FIELD ([=<>]) (.+)")
AGGREGATES = {None: "select", "COUNT": "count", "MAX": "maximum", "MIN": "minimum", "SUM": "sum", "AVG": "average"}
"""SQL's function → the word for it."""
SELECTED = re.compile(r"SELECT (?:DISTINCT )?(.+?) FROM ")
TIMES = frozenset("START_TIME END_TIME SEMESTER YEAR MONDAY TUESDAY WEDNESDAY THURSDAY FRIDAY SATURDAY SUNDAY".split())
KINDS = ("course", "teacher", "time", "number", "whether")
"""What a student asks for."""
SQL = re.compile(r"select (.+?) from \S+(?: where (.+))?")


def unmarked(text: str) -> str:
    """The text as it is without items."""
    for marker in MARKERS.values():
        text = text.replace(f" {marker}", "")
    return text


def untokenised(text: str) -> str:
    """The text as people type it: no space before punctuation."""
    return re.sub(r" (?=[?.,!)]|'s\b|n't\b|-level)", "", text)


def read_wikisql(row: dict[str, Any]) -> Example | None:
    """Columns as identifiers, text quoted and spelt as in the question, numbers plain; None where that fails."""
    question = untokenised(row["question"])
    if (parsed := SELECT.fullmatch(row["sql"].replace("TABLEalias0.", ""))) is None:
        return None
    function, selected, where = parsed.groups()
    names, terms = [selected], []
    for part in re.split(r" AND (?=\S+_FIELD [=<>] )", where) if where else []:
        condition = CONDITION.fullmatch(part)
        value = condition and re.search(re.escape(untokenised(condition[3].strip('" '))), question, re.I)
        if not condition or not value or not value[0]:
            return None
        number = re.fullmatch(r"-?\d+(\.\d+)?", value[0].replace(",", ""))
        names.append(condition[1])
        terms.append(f" {condition[2]} " + (number[0] if number else "'" + value[0].replace("'", "''") + "'"))
    columns = [re.sub(r"[\W_]+", "_", name).strip("_").lower() for name in names]
    answer = f"SELECT {function.upper()}({columns[0]})" if function else f"SELECT {columns[0]}"
    wanted = " AND ".join(column + term for column, term in zip(columns[1:], terms, strict=True))
    answer += " FROM table" + (f" WHERE {wanted}" if wanted else "")
    return (question, answer) if all(columns) else None


def sql_facts(text: str) -> Facts | None:
    """The selected expression and each condition; None where the text is not one SELECT."""
    line = " ".join(re.sub(r"[\"'`]|```(sql)?", "", text.split(";")[0]).casefold().split())
    if (parsed := SQL.fullmatch(line[max(line.find("select "), 0) :])) is None:
        return None
    conditions = re.sub(r" ?([=<>]) ?", r" \1 ", parsed[2]).split(" and ") if parsed[2] else []
    return frozenset({("select", parsed[1]), *(("where", condition) for condition in conditions)})


def read_slots(row: dict[str, Any]) -> Example:
    """Slots in the order of the question; `number0`, `number1` become one list; unfilled slots are left out."""
    question = untokenised(row["question"])
    filled = [(untokenised(value), re.sub(r"\d+$", "", name)) for name, value in row["slots"].items() if value]
    slots: dict[str, list[str]] = {}
    for value, name in sorted(filled, key=lambda slot: question.lower().find(slot[0].lower())):
        slots.setdefault(name, []).append(value)
    return question, json.dumps({name: v[0] if len(v) == 1 else v for name, v in slots.items()})


def slot_facts(text: str) -> Facts | None:
    """Each slot with each of its values; None where the text holds no JSON object."""
    found = re.search(r"\{.*?\}", text, re.S)
    try:
        slots = json.loads(found[0] if found else "")
    except json.JSONDecodeError:
        return None
    listed = [(name, value if isinstance(value, list) else [value]) for name, value in slots.items()]
    return frozenset((name.casefold(), str(item).casefold()) for name, items in listed for item in items)


def read_boolq(row: dict[str, Any]) -> Example:
    """The question without its passage; true or false."""
    question = row["instruction"].split("question: ", 1)[1].split("\n", 1)[0]
    return question[0].upper() + question[1:], row["answer"]


def boolq_facts(text: str) -> Facts | None:
    """What the text begins with, yes taken for true and no for false."""
    said = re.match(r"\W*(true|yes|false|no)\b", text.casefold())
    return said and frozenset({("answer", {"yes": "true", "no": "false"}.get(said[1], said[1]))})


def read_aggregate(row: dict[str, Any]) -> Example | None:
    """What the query computes of the selected column, as one word; None where the query has no such form."""
    parsed = SELECT.fullmatch(row["sql"].replace("TABLEalias0.", ""))
    word = parsed and AGGREGATES.get(parsed[1] and parsed[1].upper())
    return (untokenised(row["question"]), word) if word else None


def read_kind(row: dict[str, Any]) -> Example | None:
    """One of KINDS, by what the query selects; None where that is none of them, or two."""
    kind = _kind(parsed[1]) if (parsed := SELECTED.match(row["sql"])) else None
    return (untokenised(row["question"]), kind) if kind else None


def _kind(selected: str) -> str | None:
    if re.fullmatch(r"COUNT\( \* \) [>=] 0", selected):
        return "whether"
    if re.fullmatch(r"COUNT\( [^()]+ \)", selected):
        return "number"
    columns = {tuple(column.split("alias0.")) for column in selected.split(" , ")}
    if columns == {("INSTRUCTOR", "NAME")}:
        return "teacher"
    if columns <= {("COURSE", name) for name in ("DEPARTMENT", "NAME", "NUMBER")}:
        return "course"
    names = {column[-1] for column in columns} - {"SECTION_NUMBER"}
    return "time" if names and names <= TIMES else None


def word_facts(words: Collection[str], text: str) -> Facts | None:
    """The word that the text begins with; None where it is not one of these."""
    said = re.match(r"\W*([a-z]+)\b", text.casefold())
    return frozenset({("answer", said[1])}) if said and said[1] in words else None
