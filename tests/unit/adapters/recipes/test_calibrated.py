"""What PoLAR-VBLL's claim is measured with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from motet.adapters.recipes.run import Base
from tests.bench import calibrated as bench, calibrated_sets as sets
from tests.bench.calibrated import Answers
from tests.unit.adapters.recipes.conftest import COLORS, wikisql_row, write_rows

FUNCTIONS = ("", "COUNT ", "MAX ", "MIN ", "SUM ", "AVG ")


def test_passes_that_are_sure_of_different_answers_are_in_doubt() -> None:
    sure, other = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    found = Answers.mixed([sure, other])
    assert found.p_NC.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert found.total_N.tolist() == pytest.approx([math.log(2)] * 2)
    assert found.epistemic_N is not None
    assert found.epistemic_N.tolist() == pytest.approx([math.log(2), 0.0])


def test_doubt_about_the_other_sets_questions_is_what_tells_them_apart() -> None:
    p_NC = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    own = Answers(p_NC, torch.tensor([0.1, 0.3]), torch.tensor([0.3, 0.1]))
    other = Answers(p_NC, torch.tensor([0.2, 0.4]), torch.tensor([0.4, 0.5]))
    found = bench.figures(own, torch.tensor([0, 0]), {"other": other, "certain": Answers(p_NC, own.total_N, None)})
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2)
    assert found["confidence"] == pytest.approx(0.85)
    assert found["auroc"] == {
        "other": {"total": 0.75, "epistemic": 1.0},
        "certain": {"total": 0.5, "epistemic": None},
    }


def test_the_sets_ask_other_questions_than_they_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "TRAIN_ROWS", 24)
    monkeypatch.setattr(sets, "TEST_ROWS", 12)
    topics = list(sets.AG_WORDS)
    write_rows(tmp_path, "text/ag_news.7600", ({"title": f"t{n}", "topic": topics[n % 4]} for n in range(40)))
    for name, first in (("train8k", 0), ("dev", 50)):
        write_rows(tmp_path, f"text/sst2.{name}", ({"sentence": f"s{first + n} ", "label": n % 2} for n in range(30)))
    for split, first in (("train", 0), ("dev", 9), ("test", 18)):
        made = [
            {**wikisql_row(color, first + n), "sql": wikisql_row(color, n)["sql"].replace("COUNT ", FUNCTIONS[n])}
            for color in COLORS
            for n in range(6)
        ]
        write_rows(tmp_path, f"text/wikisql.{split}", made)
    for name, read in sets.SETS.items():
        found = read(tmp_path)
        assert (len(found.train), len(found.test)) == (24, 12), name
        assert not {question for question, _ in found.train} & {question for question, _ in found.test}
        assert set(Counter(word for _, word in found.train)) <= set(found.words)
        assert read(tmp_path) == found, "the rows do not depend on the run"
    assert sets.sst2(tmp_path).train[0][1] == sets.SST_WORDS[int(sets.sst2(tmp_path).train[0][0][1:]) % 2]


@pytest.fixture
def model(base: Callable[[], Base], tmp_path: Path) -> Path:
    made = base()
    made.model.save_pretrained(tmp_path / "tiny")
    made.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_every_set_is_answered_in_every_way_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def questions(words: str, about: str) -> sets.Questions:
        rows = [(f"{color} {about}?", words[n % len(words)]) for n, color in enumerate(COLORS)]
        return sets.Questions(tuple(words), rows[:8], rows[8:])

    made = {"one": lambda _: questions("xyz", "one"), "two": lambda _: questions("lr", "or two")}
    monkeypatch.setattr(bench, "SETS", made)
    for name, value in {"LAYERS": 1, "STEPS": 4, "BATCH": 4, "RANK": 3, "SEEDS": (0, 1), "PASSES": 2}.items():
        monkeypatch.setattr(bench, name, value)
    out = tmp_path / "uncertainty.jsonl"
    for _ in range(2):
        bench.main(["--data", str(tmp_path), "--results", str(out), "--model", str(model)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["arguments"]["set"] for line in lines] == ["one", "two"]
    for line in lines:
        found = {(each["way"], each["seed"]): each for each in line["results"]}
        ways = (bench.MLE, bench.DROPOUT, bench.VBLL, bench.LAPLACE)
        assert set(found) == {(way, seed) for way in ways for seed in (0, 1)} | {(bench.ENSEMBLE, None)}
        assert {each["passes"] for (way, _), each in found.items() if way in (bench.VBLL, bench.LAPLACE)} == {1}
        assert found[bench.DROPOUT, 0]["passes"] == found[bench.ENSEMBLE, None]["passes"] == 2
        assert found[bench.VBLL, 0]["objective"] == found[bench.LAPLACE, 0]["objective"], "one training"
        assert found[bench.VBLL, 0]["nll"] != found[bench.LAPLACE, 0]["nll"], "two covariances"
        assert found[bench.MLE, 0]["nll"] != found[bench.DROPOUT, 0]["nll"]
        (other,) = {"one", "two"} - {line["arguments"]["set"]}
        for (way, _), each in found.items():
            (doubt,) = each["auroc"].values()
            assert set(each["auroc"]) == {other}
            assert (doubt["epistemic"] is None) == (way == bench.MLE)
    assert str(tmp_path) not in out.read_text()
