"""What EMTAL's claims are measured with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from motet.adapters.recipes.run import Base
from motet.adapters.recipes.tasks import TASKS, examples
from tests.bench import emtal as latency, emtal_quality as quality
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.recipes.conftest import PARTS, SIDES

CLOSE = TOLERANCES["logits", torch.float32].atol


@pytest.fixture(scope="module")
def model(wide: Callable[[], Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    made = wide()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 2, "SHAPES": ((1, 5), (2, 3)), "ROWS": (1, 2), "PROMPT_TOKENS": 3}.items():
        monkeypatch.setattr(latency, name, value)
    monkeypatch.setattr(latency, "DECODED", 4)


@pytest.mark.usefixtures("small")
def test_both_forms_are_measured_and_checked(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "emtal.jsonl"
    latency.main(["--out", str(out), "--model", str(model)])
    training, served = (json.loads(line) for line in out.read_text().splitlines())
    assert training["results"].keys() == {"1 x 5", "2 x 3"}
    assert served["results"].keys() == {"1 rows", "2 rows"}
    assert training["results"]["1 x 5"].keys() == {"base", "lora", "emtal, router active", "emtal, router faded"}
    assert served["results"]["2 rows"]["lora"]["n"] == 2 * 3, "two rounds of four steps, less the prompts'"
    assert all(form["least_ms"] <= form["median_ms"] for form in served["results"]["1 rows"].values())
    assert str(tmp_path) not in out.read_text()


@pytest.mark.usefixtures("small")
def test_no_figure_without_the_right_answer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is not the one beside it is no comparison."""
    folders = tmp_path / "emtal", tmp_path / "lora"
    latency.training_form(model, *folders)
    other = tmp_path / "other"
    monkeypatch.setattr(torch, "manual_seed", lambda _: torch.default_generator.manual_seed(7))
    latency.training_form(model, tmp_path / "emtal2", other)
    with pytest.raises(AssertionError):
        latency.served(model, folders[0], other)


@pytest.fixture
def own(label_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quality, "SPLITS", {SIDES: ("test",), PARTS: ("train", "test")})
    for name, value in {"STEPS": 6, "BATCH": 4, "LEARNT": (SIDES, PARTS)}.items():
        monkeypatch.setattr(quality, name, value)
    return label_tasks


def test_every_run_of_the_plan_differs_in_what_it_compares_only() -> None:
    lines = [quality.arguments(run) for run in quality.PLAN]
    assert len({json.dumps(line) for line in lines}) == len(lines)
    for line in lines[1:]:
        assert line["steps"] == (quality.STEPS if "+" in line["task"] else quality.STEPS / 3)
        assert (line["rank"], line["learning_rate"], line["batch"]) == (quality.RANK, quality.RATE, quality.BATCH)
        assert {line["method"], line["retaining"]} in ({"emtal", True}, {"emtal", False}, {"lora", True})
        assert len(line["targets"]) == 7


def test_the_judgement_is_that_of_each_row_alone(wide: Callable[[], Base], own: Path) -> None:
    """The oracle: one forward of each whole row, its words ranked by hand."""
    made = wide()
    rows = quality.held_out(PARTS, own)
    assert len(rows) == 2 * len(examples(TASKS[PARTS], own, "test")) == 72
    found = quality.judged(made.model, made.tokenizer, PARTS, rows, told=False)
    words = [made.tokenizer(word)["input_ids"][0] for word in "xyz"]
    right, losses = "", []
    for question, answer in rows:
        chat = [{"role": "user", "content": question}]
        ids = made.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = made.model(torch.tensor([ids])).logits[0, -1, words]
        wanted = "xyz".index(answer)
        right += str(int(logits.argmax() == wanted))
        losses.append(-float(logits.log_softmax(0)[wanted]))
    assert found["right"] == right
    assert found["accuracy"] == right.count("1") / len(right)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=CLOSE)
    assert found["greedy_accuracy"] <= found["accuracy"]


def test_a_run_without_what_retains_learns_otherwise(model: Path, own: Path) -> None:
    with_it, without = (quality.measure(quality.Run("emtal", (SIDES, PARTS), qr), model, own) for qr in (True, False))
    assert len(with_it["training_losses"]) == 6
    assert with_it["training_losses"][:2] == without["training_losses"][:2]
    assert with_it["training_losses"] != without["training_losses"]
    assert with_it["tasks"].keys() == {SIDES, PARTS}
    alone = quality.measure(quality.Run("lora", (SIDES,)), model, own)
    assert len(alone["training_losses"]) == 3
    assert alone["tasks"].keys() == {SIDES}
    assert "training_losses" not in quality.measure(quality.Run(None, (SIDES, PARTS)), model, own)
