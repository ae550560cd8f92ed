"""What iLoRA's claim is measured with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.recipes.run import Base
from motet.adapters.recipes.tasks import TASKS, prepared
from motet.adapters.recipes.trainee import Trainee
from tests.bench import ilora as bench

ROW = {"candidates": ["Air", "Moby", "Eminem", "Enigma", "Dido"], "answer": "Moby"}


@pytest.fixture
def model(base: Callable[[], Base], tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    made = base()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def test_every_run_of_the_plan_trains_alike() -> None:
    base, *trained = [bench.arguments(run) for run in bench.PLAN]
    assert base["method"] == "base"
    assert [line.pop("method") for line in trained] == ["lora", "ilora"]
    assert trained[0] == trained[1]


def test_an_answer_is_valid_when_it_is_a_candidate_and_a_hit_when_it_is_the_right_one() -> None:
    found = bench.named(["moby\nand", "Air", "Air; Moby", "Madonna"], [ROW] * 4)
    assert (found["n"], found["hit_ratio"], found["valid_ratio"], found["hits"]) == (4, 0.25, 0.5, "1000")


def test_the_likeliest_candidate_is_ranked_first(base: Callable[[], Base], data: Path) -> None:
    """The oracle: transformers' own summed loss of each answer, one by one."""
    made: Any = base()
    rows = prepared(TASKS["lastfm"], data, "test")[:6]
    found = bench.ranked(Trainee(made.model, {}, save=lambda _: None), made.tokenizer, rows, "Say. ")
    own, hits = [], ""
    for row in rows:
        sums = []
        for candidate in row["candidates"]:
            question = "Say. Listened to: " + "; ".join(row["titles"]) + "\nCandidates: " + "; ".join(row["candidates"])
            asked = made.tokenizer(f"<user>{question}\n<assistant>")["input_ids"]
            told = made.tokenizer(candidate + "</s>")["input_ids"]
            labels = torch.tensor([[-100] * len(asked) + told])
            with torch.no_grad():
                out = made.model.eval()(input_ids=torch.tensor([asked + told]), labels=labels)
            sums.append(-float(out.loss) * len(told))
        right = row["candidates"].index(row["answer"])
        own.append(-float(torch.tensor(sums).log_softmax(0)[right]))
        hits += str(int(max(range(5), key=sums.__getitem__) == right))
    assert found["hits"] == hits
    assert found["row_losses"] == pytest.approx(own, abs=1e-3)
    assert found["loss"] == pytest.approx(sum(own) / 6, abs=1e-3)


def test_users_that_differ_have_information() -> None:
    class Told:
        factors_NK = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])

        def eval(self) -> None: ...
        def see(self, histories: Any) -> None: ...

    found = bench.spread(Told(), [])  # type: ignore[arg-type]
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["entropy_of_mean"] == pytest.approx(found["most"]) == pytest.approx(math.log(4))
    assert (found["lowest"], found["highest"]) == ([0.0] * 4, [0.5] * 4)


def test_the_plan_is_run_once(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STEPS", 2)
    out = tmp_path / "ilora.jsonl"
    for _ in range(2):
        bench.main(["--data", str(data), "--results", str(out), "--model", str(model)])
    base, lora, ilora = (json.loads(line)["results"] for line in out.read_text().splitlines())
    assert base["ranked"].keys() == lora["ranked"].keys() == ilora["ranked"].keys()
    assert "training_s" not in base
    assert ilora["factors"].keys() == {"before", "after"}
    assert ilora["parameters"] > lora["parameters"]
    assert ilora["ranked_by_another_users_gate"]["row_losses"] != ilora["ranked"]["row_losses"]
    assert str(tmp_path) not in out.read_text()
