"""What the claims are measured with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from motet.adapters.recipes import knowledge
from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import TASKS, examples
from motet.adapters.recipes.trainee import Trainee
from tests.bench import claims, claims_measures as measures
from tests.support.models import tiny_llama
from tests.support.tolerances import TOLERANCES

CLOSE = TOLERANCES["logits", torch.float32].atol


def test_the_stable_rank_of_a_known_change() -> None:
    """Singular values 3, 3 and 1.5: (9 + 9 + 2.25) / 9."""
    q, _ = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    delta = q @ torch.diag(torch.tensor([3.0, 3.0, 1.5])) @ q.T
    weight = torch.eye(6)
    found = measures.change({"a": weight, "b": weight}, {"a": weight + delta, "b": weight + 2 * delta})
    assert found.stable_rank == pytest.approx(2.25, abs=CLOSE)
    assert found.stable_rank_standard_error == pytest.approx(0, abs=CLOSE)
    assert found.relative_norm == pytest.approx(1.5 * math.sqrt(20.25 / 6), abs=CLOSE)
    assert found.targets == 2
    untouched = torch.randn(6, 6)
    before, after = {"a": weight, "b": weight, "c": untouched}, {"a": weight + delta, "b": weight + 2 * delta}
    assert measures.change(before, {**after, "c": untouched.clone()}) == found


def test_parameters_are_counted_that_train_now_and_ever(
    base: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    """LoRA: 2 layers, rank 3 beside q (48 + 48) and v (48 + 24). LISA: all of them, γ layers at a time."""
    trainee, _ = begin(order("lora"), base(), data)
    assert measures.parameters(trainee) == measures.Parameters(all=1008, at_once=1008)
    deep = tiny_llama(num_hidden_layers=5, vocab_size=320, max_position_embeddings=512)
    trainee, loop = begin(order("lisa"), Base("deep", deep, base().tokenizer), data)
    next(iter(loop))
    layer = sum(parameter.numel() for parameter in deep.model.layers[0].parameters())
    outside = 320 * 48 + 48
    assert measures.parameters(trainee) == measures.Parameters(all=outside + 5 * layer, at_once=outside + 2 * layer)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "polar"])
def test_the_effective_weight_is_what_the_target_computes(
    method: str, base: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    trainee, loop = begin(order(method), base(), data)
    list(loop)
    weights = measures.effective_weights(trainee.model, ("v_proj",))
    assert len(weights) == 2
    layer = trainee.model.get_submodule(path := next(iter(weights)))
    x_TI = torch.randn(5, 48)
    with torch.no_grad():
        TOLERANCES["dense merge", torch.float32].assert_close(
            layer(x_TI), x_TI @ weights[path].T, torch.ones(5, 24) * 9
        )


@torch.no_grad()
def test_the_held_out_loss_is_the_mean_of_all_answer_tokens(base: Callable[[], Base], data: Path) -> None:
    made = base()
    corpus = Corpus.of(made.tokenizer, examples(TASKS["wikisql"], data, "test")[:20])
    trainee = Trainee(made.model, {}, save=lambda _: None)
    found = measures.held_out(trainee, corpus)
    sums = []
    for row in range(20):
        ids, labels = Corpus([], [(corpus.prefix + corpus.rows[row][0], corpus.rows[row][1])]).batch([0])
        sums.append(float(made.model(input_ids=ids, labels=labels).loss) * len(corpus.rows[row][1]))
    assert found.row_losses == pytest.approx(sums, abs=30 * CLOSE)
    assert found.loss == pytest.approx(sum(sums) / sum(len(told) for _, told in corpus.rows), abs=CLOSE)
    assert 0 < found.standard_error < 0.2


@torch.no_grad()
def test_knowledge_is_the_likelihood_of_the_answers_text(base: Callable[[], Base], data: Path) -> None:
    """The oracle: each answer alone after its prompt, by a whole forward."""
    made = base()
    questions = knowledge.questions(data, "test")
    found = measures.knowledge(made.model, made.tokenizer, questions)
    right, nlls = "", []
    for question in questions:
        totals = []
        for choice in question.choices:
            asked = made.tokenizer(question.prompt)["input_ids"]
            told = made.tokenizer(f" {choice}")["input_ids"]
            labels = torch.tensor([[-100] * len(asked) + told])
            totals.append(float(made.model(input_ids=torch.tensor([asked + told]), labels=labels).loss) * len(told))
            if choice == question.choices[question.right]:
                nlls.append(totals[-1] / len(told))
        right += str(int(totals.index(min(totals)) == question.right))
    assert found.right == right
    assert found.accuracy == pytest.approx(right.count("1") / len(right))
    assert found.answer_nll == pytest.approx(sum(nlls) / len(nlls), abs=CLOSE)


def test_every_run_of_the_plan_is_alike_but_for_what_it_compares() -> None:
    lines = [claims.arguments(run) for run in claims.PLAN]
    assert len({json.dumps(line) for line in lines}) == len(lines)
    for line in lines:
        assert line["method"] == claims.BASE or line["method"] in RECIPES
        own = {"s2ft": {"targets"}, "lisa": {"targets", "rank"}, "full": {"targets", "rank"}}.get(line["method"], set())
        fixed = {name: line[name] for name in line if name not in {"method", "learning_rate", "seed", "alpha", *own}}
        assert fixed == {name: lines[0][name] for name in fixed}
        assert all(line[name] != lines[0][name] for name in own)
        assert line["alpha"] == (32 if line["method"] == "polar" else line["rank"])


def test_a_run_is_measured_from_start_to_end(
    base: Callable[[], Base], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = base()
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    held_out = data / "text" / "wikisql.test.jsonl"
    (tmp_path / "data" / "text").mkdir(parents=True)
    for name in ("train", "test", "dev"):
        (tmp_path / "data" / "text" / f"wikisql.{name}.jsonl").write_bytes(held_out.read_bytes())
    (tmp_path / "data" / "qa").symlink_to(data / "qa")
    small = {"STEPS": 4, "LOOK_AT": (2, 4), "RANK": 3, "BATCH": 4, "HELD_OUT_ROWS": 6, "QUESTIONS": 5}
    for name, value in small.items():
        monkeypatch.setattr(claims, name, value)
    found = claims.measure(("corda-kpm", 3e-3, 0), tmp_path / "model", tmp_path / "data")
    assert found["held_out"].keys() == {"2", "4"}
    assert len(found["training_losses"]) == 4
    assert 1 <= found["change"]["stable_rank"] <= 6
    assert found["held_out_as_saved"] == pytest.approx(found["held_out"]["4"]["loss"], abs=CLOSE), "CorDA is float32"
    assert len(found["knowledge"]["right"]) == 5
    whole = claims.measure(("lisa", 3e-3, 0), tmp_path / "model", tmp_path / "data")
    assert whole["change"]["targets"] == 4
    assert 0 < abs(whole["held_out_as_saved"] - whole["held_out"]["4"]["loss"]) < 0.1, "bfloat16"
    before = claims.measure((claims.BASE, 0.0, 0), tmp_path / "model", tmp_path / "data")
    assert before["held_out"].keys() == {"0"}
    assert asdict(measures.Knowledge(**before["knowledge"])) == before["knowledge"]
