"""What iLoRA's claim is measured with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.recipes.run import Base
from motet.adapters.recipes.tasks import TASKS, prepared
from tests.bench import ilora as bench
from tests.support.ilora_modules import SasrecModule
from tests.support.layouts_ilora import HISTORY_LENGTH, ITEMS

ROW = {"candidates": ["Air", "Moby", "Eminem", "Enigma", "Dido"], "answer": "Moby"}


@pytest.fixture
def model(base: Callable[[], Base], tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    made = base()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def test_every_run_of_the_plan_trains_alike() -> None:
    sasrec, base, *trained = [bench.arguments(run) for run in bench.PLAN]
    assert (sasrec["method"], base["method"]) == ("sasrec", "base")
    named = [(line.pop("seed"), line.pop("method")) for line in trained]
    assert set(named) == {(seed, method) for seed in (0, 1) for method in ("lora", "llara", "ilora")}
    assert all(line == trained[0] for line in trained)


def test_an_answer_is_valid_when_it_is_a_candidate_and_a_hit_when_it_is_the_right_one() -> None:
    found = bench.named(["moby\nand", "Air", "Air; Moby", "Madonna"], [ROW] * 4)
    assert (found["n"], found["hit_ratio"], found["valid_ratio"], found["hits"]) == (4, 0.25, 0.5, "1000")


def test_the_likeliest_candidate_is_ranked_first(base: Callable[[], Base], data: Path) -> None:
    """The oracle: transformers' own summed loss of each answer, one by one."""
    made: Any = base()
    rows = prepared(TASKS["lastfm"], data, "test")[:6]
    questions = [f"Say. {row['titles']}, {row['candidates']}" for row in rows]
    told_of: list[int] = []
    found = bench.ranked(made.model, made.tokenizer, questions, rows, told_of.append)
    assert told_of == list(range(6))
    own, hits = [], ""
    for row, question in zip(rows, questions, strict=True):
        sums = []
        for candidate in row["candidates"]:
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
    monkeypatch.setattr(bench, "PLAN", [run for run in bench.PLAN if run.seed == 0])
    out = tmp_path / "ilora.jsonl"
    for _ in range(2):
        bench.main(["--data", str(data), "--results", str(out), "--model", str(model)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["arguments"]["method"] for line in lines] == ["sasrec", "base", "ilora", "lora", "llara"]
    sasrec, base, ilora, lora, llara = (line["results"] for line in lines)
    assert sasrec["test"].keys() == sasrec["train"].keys() == {"sasrec", "embedding", "nearest_id"}
    assert base["ranked"].keys() == lora["ranked"].keys() == llara["ranked"].keys() == ilora["ranked"].keys()
    assert "training_s" not in base
    assert ilora["factors"].keys() == {"before", "after"}
    assert ilora["parameters"] > llara["parameters"] > lora["parameters"]
    assert len({json.dumps(run["ranked"]["row_losses"]) for run in (base, lora, llara, ilora)}) == 4
    assert ilora["ranked_by_another_users_gate"]["row_losses"] != ilora["ranked"]["row_losses"]
    assert str(tmp_path) not in out.read_text()


def test_sasrec_alone_ranks_by_its_own_layer(data: Path) -> None:
    """The oracle: the tests' own module. Items follow one another by id, so the nearest id is always right."""
    rows = prepared(TASKS["lastfm"], data, "test")
    found = bench.alone(data, rows)
    sasrec = SasrecModule(ITEMS, HISTORY_LENGTH)
    sasrec.load_state_dict(load_file(data / "rec" / "lastfm" / "sasrec_lastfm.safetensors"))
    hits, alike = [], []
    for row in rows:
        history, offered = row["user"]
        right = row["candidates"].index(row["answer"])
        padded = torch.tensor([[*history, *[ITEMS] * (HISTORY_LENGTH - len(history))]])
        with torch.no_grad():
            scores = sasrec.s_fc(sasrec.eval()(padded, torch.tensor([len(history)])))[0]
            item_ND = sasrec.item_embeddings.weight
            cosines = [
                sum(float(torch.cosine_similarity(item_ND[item], item_ND[one], dim=0)) for one in history)
                for item in offered
            ]
        hits.append(max(range(5), key=lambda n: float(scores[offered[n]])) == right)
        alike.append(max(range(5), key=cosines.__getitem__) == right)
    assert found["sasrec"]["hit_ratio"] == pytest.approx(sum(hits) / len(rows))
    assert found["embedding"]["hit_ratio"] == pytest.approx(sum(alike) / len(rows))
    assert found["nearest_id"]["hit_ratio"] > 0.8
