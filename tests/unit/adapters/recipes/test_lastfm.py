"""LastFM's rows: the same candidates always, one of them right; histories beside the questions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from motet.adapters.recipes import lastfm
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import MARKERS, unmarked
from motet.adapters.recipes.tasks import TASKS, examples, named, prepared, rows
from motet.adapters.recipes.users import encoder, users
from tests.support.layouts_ilora import HISTORY_LENGTH, ITEMS
from tests.unit.adapters.recipes.conftest import listener_row

TASK = TASKS["lastfm"]


def test_a_question_names_the_last_titles_and_the_candidates(data: Path) -> None:
    (row,) = lastfm.prepare(data, [listener_row(first=2, length=7)])
    assert row["user"].history == (4, 5, 6, 7, 8)
    question, answer = lastfm.read(row)
    heard, offered = unmarked(question).split("\n")
    assert heard == "Listened to: Band 4; Band 5; Band 6; Band 7; Band 8"
    assert offered == "Candidates: " + "; ".join(row["candidates"])
    assert answer == row["answer"] == "Band 9"


def test_one_of_five_candidates_is_next_and_none_was_heard(data: Path) -> None:
    made = prepared(TASK, data, "train")
    for row in made:
        assert len({name.casefold() for name in row["candidates"]}) == 5
        assert row["answer"] in row["candidates"]
        assert not set(row["user"].history) & set(row["user"].candidates)
        assert row["candidates"] == [f"Band {item}" for item in row["user"].candidates]
    assert {row["candidates"].index(row["answer"]) for row in made} == set(range(5))


def test_names_that_differ_in_case_only_are_one(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "rec", tmp_path / "rec")
    few = "0::One\n1::Two\n2::Three\n3::Four\n4::a\n5::A\n6::FOUR\n7::b\n8::c\n9::d\n"
    (tmp_path / lastfm.NAMES).write_text(few)
    for first in range(200):
        row = {"seq": [0, 1, 2, first % 2] + [ITEMS] * 6, "len_seq": 3 + first % 2, "next": 3}
        (made,) = lastfm.prepare(tmp_path, [row])
        assert sorted(name.casefold() for name in made["candidates"]) == ["a", "b", "c", "d", "four"]


def test_candidates_depend_on_the_row_alone(data: Path) -> None:
    both = lastfm.prepare(data, [listener_row(0, 5), listener_row(9, 5)])
    assert lastfm.prepare(data, [listener_row(9, 5)]) == both[1:]
    assert both[0]["candidates"] != both[1]["candidates"]


def test_short_histories_are_left_out_and_long_splits_are_thinned(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [len(row["user"].history) for row in prepared(TASK, data, "train")]
    assert len(rows(data, lastfm.DATA, "train")) == 33
    assert sorted(lengths) == sorted([min(length, 5) for length in range(3, HISTORY_LENGTH + 1)] * 3)
    monkeypatch.setattr(lastfm, "MOST_ROWS", 7)
    few = prepared(TASK, data, "train")
    assert len(few) == 7
    assert few == prepared(TASK, data, "train")


def test_a_marker_follows_every_name_of_a_users_items(data: Path) -> None:
    for (question, _), user in zip(examples(TASK, data, "test", marked=True), users([TASK], data, "test"), strict=True):
        lines = [
            "; ".join(f"Band {item} {marker}" for item in ids)
            for ids, marker in zip(user, MARKERS.values(), strict=True)
        ]
        assert question == f"Listened to: {lines[0]}\nCandidates: {lines[1]}"


def test_who_has_no_items_reads_the_names_alone(data: Path) -> None:
    marked = examples(TASK, data, "test", marked=True)
    for (plain, answer), (question, same) in zip(examples(TASK, data, "test"), marked, strict=True):
        assert plain == question.replace(" [HistoryEmb]", "").replace(" [CansEmb]", "")
        assert answer == same


def test_the_demo_has_a_marker_for_each_item_of_its_user() -> None:
    assert TASK.demo_user is not None
    for field, marker in MARKERS.items():
        assert TASK.demo.count(marker) == len(getattr(TASK.demo_user, field))


@pytest.mark.parametrize(
    ("text", "name"),
    [("Air", "air"), (" AIR \nand more", "air"), ("Air; Moby", "air; moby"), ("\n\n", None), ("", None)],
)
def test_an_answer_is_its_first_line(text: str, name: str | None) -> None:
    assert lastfm.facts(text) == (name and frozenset({("artist", name)}))


def test_the_encoder_has_no_layer_that_ranks(data: Path) -> None:
    tensors = encoder([TASK], data)
    assert tuple(tensors["item_embeddings.weight"].shape) == (ITEMS + 1, 64)
    assert not any(name.startswith("s_fc") for name in tensors)


@pytest.mark.parametrize("asked", ["wikisql", "lastfm+boolq"])
@pytest.mark.parametrize("read", [encoder, lambda tasks, data: users(tasks, data, "train")])
def test_tasks_without_a_history_for_every_row_are_refused(asked: str, read: Any, data: Path) -> None:
    with pytest.raises(DataError, match="--task must be one that has it: lastfm"):
        read(named(asked), data)


def test_absent_files_are_named_without_their_place(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"training data rec/lastfm/id2name\.txt cannot be read") as names:
        lastfm.prepare(tmp_path, [])
    with pytest.raises(DataError, match=r"network rec/lastfm/sasrec_lastfm\.safetensors") as network:
        encoder([TASK], tmp_path)
    assert str(tmp_path) not in str(names.value) + str(network.value)
    with pytest.raises(DataError, match=r"rec/lastfm/dev\.jsonl"):
        examples(TASK, data, "dev")
