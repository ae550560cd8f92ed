"""Episodes: which rows, how many, in what order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from motet.adapters.recipes.episodes import MOST_TOKENS, SHOTS, WAYS, Episode, Episodes
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import Example
from motet.adapters.recipes.run import Base, Order, begin
from tests.support.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def task(mark: str, labels: int, rows: int) -> list[Example]:
    return [(f"{mark} {label} {row}", f"label {label}") for row in range(rows) for label in range(labels)]


def texts(episodes: Episodes, numbers: list[int]) -> list[str]:
    return [TOKENIZER.decode(episodes.rows[number]) for number in numbers]


def test_an_episode_has_equally_many_rows_of_five_classes_and_none_twice() -> None:
    episodes = Episodes.of(TOKENIZER, [task("a", 7, 9)])
    for numbers in episodes.draws(20, 40, 0):
        assert len(set(numbers)) == 40
        labels = [text.split()[1] for text in texts(episodes, numbers)]
        assert labels == [label for label in dict.fromkeys(labels) for _ in range(8)]
        episode = Episode.of(numbers)
        assert set(episode.support).isdisjoint(episode.queries)
        assert {*episode.support, *episode.queries} == set(numbers)
        for rows, classes in zip((episode.support, episode.queries), episode.labels, strict=True):
            found = [text.split()[1] for text in texts(episodes, list(rows))]
            assert found == [list(dict.fromkeys(labels))[number] for number in classes]
        assert set(Counter(episode.labels[0].tolist()).values()) == {SHOTS}


def test_all_classes_and_rows_come_and_the_seed_fixes_them() -> None:
    episodes = Episodes.of(TOKENIZER, [task("a", 7, 9)])
    drawn = list(episodes.draws(60, 30, 3))
    assert {number for numbers in drawn for number in numbers} == set(range(63))
    assert drawn == list(episodes.draws(60, 30, 3))
    assert drawn[:9] == list(episodes.draws(9, 30, 3))
    assert drawn != list(episodes.draws(60, 30, 4))


def test_tasks_take_turns() -> None:
    episodes = Episodes.of(TOKENIZER, [task("a", 5, 6), task("b", 6, 7)])
    marks = [{text[0] for text in texts(episodes, numbers)} for numbers in episodes.draws(4, 30, 0)]
    assert marks == [{"a"}, {"b"}, {"a"}, {"b"}]


def test_long_and_empty_texts_are_left_out() -> None:
    rows = [*task("a", 5, 6), ("x" * (MOST_TOKENS + 1), "label 0"), ("", "label 0"), ("x" * MOST_TOKENS, "label 1")]
    episodes = Episodes.of(TOKENIZER, [rows])
    assert len(episodes.rows) == 31
    assert [len(one) for one in episodes.classes[0]] == [6, 7, 6, 6, 6]


def test_texts_stand_without_a_chat_template() -> None:
    episodes = Episodes.of(TOKENIZER, [[("a text", "x")]])
    assert episodes.rows == [list(TOKENIZER("a text", add_special_tokens=True)["input_ids"])]


def test_the_digest_knows_texts_and_labels() -> None:
    one = [("a", "x"), ("b", "x"), ("c", "y")]
    digests = {
        Episodes.of(TOKENIZER, [rows]).digest()
        for rows in (one, [("a", "x"), ("b", "y"), ("c", "y")], [("a", "x"), ("b", "x"), ("d", "y")])
    }
    assert len(digests) == 3


@pytest.mark.parametrize("size", [4, 25, 31, 0])
def test_a_batch_that_is_no_episode_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"--batch {size} is no episode of 5 classes.*a multiple of 5 from 30 on"):
        next(Episodes.of(TOKENIZER, [task("a", 5, 9)]).draws(1, size, 0))


@pytest.mark.parametrize(("labels", "rows", "fewest"), [(4, 9, 4), (6, 7, 0)])
def test_a_task_with_too_few_classes_is_refused(labels: int, rows: int, fewest: int) -> None:
    episodes = Episodes.of(TOKENIZER, [task("a", 5, 9), task("b", labels, rows)])
    with pytest.raises(DataError, match=f"a task has {fewest} labels with 8 rows .*; an episode of --batch 40 needs 5"):
        next(episodes.draws(1, 40, 0))


def test_a_task_whose_answers_are_all_different_is_refused(
    base: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    _, loop = begin(order("amt", task="wikisql"), base(), data)
    with pytest.raises(DataError, match="a task has 0 labels with 6 rows"):
        next(iter(loop))


def test_labels_are_whole_numbers() -> None:
    support_S, query_N = Episode.of(range(30)).labels
    assert support_S.dtype == query_N.dtype == torch.int64
    assert (len(support_S), len(query_N)) == (WAYS * SHOTS, WAYS)
