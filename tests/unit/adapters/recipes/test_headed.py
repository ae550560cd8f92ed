"""Adapters that learn with a head of their own: from the start to the files that are served."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vbll import DiscClassification

from motet.adapters import heads
from motet.adapters.errors import ConfigError
from motet.adapters.heads import HeadFile, Parameterization
from motet.adapters.recipes import variational
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.loop import question_states
from motet.adapters.recipes.run import Base, Order, Run, begin
from motet.adapters.recipes.scorecard import Exam
from motet.adapters.recipes.tasks import TASKS
from motet.server.heads.batch import Head, Row, logits
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.recipes.conftest import COLORS, HEADED, PARTS, SIDES

LOGITS = TOLERANCES["logits", torch.float32]
KINDS = {
    "lora-head": Parameterization.SOFTMAX,
    "polar-vbll": Parameterization.DENSE,
    "polar-vbll-diagonal": Parameterization.DIAGONAL,
    "polar-vbll-lowrank": Parameterization.LOW_RANK,
    "polar-laplace": Parameterization.DENSE,
}
N_ROWS = 3 * len(COLORS)
Bases = Callable[[], Base]
Orders = Callable[..., Order]


def read(folder: Path) -> HeadFile:
    head = heads.read(folder)
    assert head is not None
    return head


def whole_states(base: Base, prompts: list[str]) -> torch.Tensor:
    """The oracle: transformers' own state after the final norm, of one whole prompt at a time."""
    states = []
    for prompt in prompts:
        ids = base.tokenizer(f"<user>{prompt}\n<assistant>")["input_ids"]
        with torch.no_grad():
            out = base.model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True)
        states.append(out.hidden_states[-1][0, -1])
    return torch.stack(states)


def prompts() -> list[str]:
    return [f"{color} {PARTS} {n}?" for color in COLORS for n in range(3)]


@pytest.mark.parametrize("method", HEADED)
def test_a_folder_has_the_adapter_and_its_head(
    method: str, base: Bases, order: Orders, label_tasks: Path, tmp_path: Path
) -> None:
    """The served head, on transformers' states, gives the trained head's logits."""
    made = base()
    run = Run(order(method, task=PARTS, seed=5), made, label_tasks, tmp_path / "out", resume=False, keep_every=9)
    list(run)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        heads.HEAD_CONFIG,
        heads.HEAD_WEIGHTS,
    }
    head = read(tmp_path / "out")
    assert head.parameterization is KINDS[method]
    assert head.labels == ("x", "y", "z")
    assert head.label_token_ids == tuple(made.tokenizer(word)["input_ids"][0] for word in "xyz")
    assert (head.n_train, head.seed, head.width) == (N_ROWS, 5, 48)
    states_ND = whole_states(replace(made, model=run.trainee.model), prompts()[:5])
    ready = Head.of(head, torch.device("cpu"))
    served = torch.stack([found.mean_C for found in logits([Row(ready, x_D) for x_D in states_ND])])
    assert run.trainee.classify is not None
    LOGITS.assert_close(served, run.trainee.classify(states_ND).detach())


@pytest.mark.parametrize("method", HEADED)
def test_a_resumed_run_gives_the_same_bytes(
    method: str, base: Bases, order: Orders, label_tasks: Path, tmp_path: Path
) -> None:
    asked = order(method, task=PARTS)
    list(Run(asked, base(), label_tasks, tmp_path / "whole", resume=False, keep_every=2))
    stopped = Run(asked, base(), label_tasks, tmp_path / "parts", resume=False, keep_every=2)
    assert len(list(itertools.islice(stopped, 5))) == 5
    torch.manual_seed(99)
    assert len(list(Run(asked, base(), label_tasks, tmp_path / "parts", resume=True, keep_every=2))) == 2
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_the_start_is_the_vocabularys_head(base: Bases, order: Orders, label_tasks: Path) -> None:
    """Of the words alone, but for a number that all of a row's logits have in common."""
    made = base()
    states_ND = whole_states(made, prompts()[:4])
    tokens = [made.tokenizer(word)["input_ids"][0] for word in "xyz"]
    expected = states_ND @ made.model.lm_head.weight.detach()[tokens].T
    trainee, _ = begin(order("polar-vbll", task=PARTS), made, label_tasks)
    assert trainee.classify is not None
    ours = trainee.classify(states_ND).detach()
    LOGITS.assert_close(ours - ours[:, :1], expected - expected[:, :1])


def test_a_step_descends_the_bound_of_the_words_alone(base: Bases, order: Orders, label_tasks: Path) -> None:
    """The oracle: vbll's loss of the first batch, on the states of whole prompts; the end token has no part in it."""
    made = base()
    trainee, loop = begin(order("polar-vbll", task=PARTS, steps=1), made, label_tasks)
    (numbers,) = loop.corpus.draws(1, 4, 0)
    first = {number: told[0] for number, (_, told) in enumerate(loop.corpus.rows)}
    states_ND = whole_states(made, prompts())
    tokens = [made.tokenizer(word)["input_ids"][0] for word in "xyz"]
    asked = [made.tokenizer(f"<user>{prompt}\n<assistant>")["input_ids"] for prompt in prompts()]
    where = [asked.index(loop.corpus.prefix + loop.corpus.rows[number][0]) for number in numbers]
    theirs = DiscClassification(48, 3, 1 / N_ROWS, parameterization="dense", prior_scale=variational.PRIOR_SCALE)
    own = {name.removeprefix("head."): tensor for name, tensor in trainee.trainable.items() if "head." in name}
    theirs.load_state_dict({**own, "noise_mean": torch.zeros(3)})
    y_N = torch.tensor([tokens.index(first[number]) for number in numbers])
    expected = theirs(states_ND[where]).train_loss_fn(y_N).item()
    object.__setattr__(loop, "_autocast", False)
    assert list(loop) == pytest.approx([expected], rel=LOGITS.atol)


@pytest.mark.parametrize("method", ["polar-vbll", "polar-laplace"])
def test_the_covariance_is_refitted_to_all_rows_where_asked(
    method: str, base: Bases, order: Orders, label_tasks: Path, tmp_path: Path
) -> None:
    made = base()
    run = Run(order(method, task=PARTS), made, label_tasks, tmp_path / "out", resume=False, keep_every=9)
    list(run)
    head = read(tmp_path / "out").tensors
    states_ND = whole_states(replace(made, model=run.trainee.model), prompts()).double()
    p_NC = (states_ND @ head["W_mean"].double().T).softmax(-1)
    prior_DD = torch.eye(48).double() * 48 / (2 * variational.PRIOR_SCALE)
    precision_DD = (states_ND.T * (p_NC * (1 - p_NC))[:, 1]) @ states_ND + prior_DD
    factor_DD = head["W_offdiag"][1].tril(-1) + head["W_logdiag"][1].exp().diag()
    off = (factor_DD.double() @ factor_DD.double().T @ precision_DD - torch.eye(48)).abs().max()
    assert (float(off) < 1e-2) == (method == "polar-laplace")


def test_a_plain_head_learns_under_dropout(base: Bases, order: Orders, label_tasks: Path) -> None:
    trainee, loop = begin(order("lora-head", task=PARTS), base(), label_tasks)
    list(loop)
    trainee.model.train()
    one, other = (question_states(trainee, loop.corpus, 5) for _ in range(2))
    assert not torch.equal(one, other)
    trainee.model.eval()
    one, other = (question_states(trainee, loop.corpus, size) for size in (5, 7))
    LOGITS.assert_close(one, other)


@pytest.mark.parametrize("task", ["wikisql", f"{SIDES}+{PARTS}"])
def test_a_task_without_one_list_of_answers_is_refused(
    task: str, base: Bases, order: Orders, data: Path, label_tasks: Path
) -> None:
    with pytest.raises(DataError, match="a head learns one task whose answers are a list of words; choose one such"):
        begin(order("polar-vbll", task=task), base(), data if task == "wikisql" else label_tasks)


def test_a_seed_that_the_file_cannot_hold_is_refused_before_the_training(
    base: Bases, order: Orders, label_tasks: Path
) -> None:
    with pytest.raises(ConfigError, match="seed 18446744073709551615 is not a whole number from 0"):
        begin(order("polar-vbll", task=PARTS, seed=-1), base(), label_tasks)


def test_the_scores_are_the_heads(base: Bases, order: Orders, label_tasks: Path) -> None:
    made = base()
    trainee, _ = begin(order("polar-vbll", task=PARTS), made, label_tasks)
    exam = Exam.of(TASKS[PARTS], label_tasks, 20)
    assert trainee.classify is not None
    chosen = trainee.classify(whole_states(made, [question for question, _ in exam.rows])).argmax(1)
    right = [word == "xyz"[int(number)] for (_, word), number in zip(exam.rows, chosen, strict=True)]

    def taken(classify: Any) -> Any:
        return exam.taken_by(trainee.model, made.tokenizer, iter, False, None, classify)

    found = taken(trainee.classify)
    assert found.scores["logit_accuracy"] == found.scores["exact_match"] == pytest.approx(sum(right) / 20)
    assert found.scores["well_formed"] == 1
    assert found.demo in "xyz"
    assert taken(None).scores["well_formed"] < 1, "the vocabulary's head says something else"
