"""What a method may do within the loop: act before a step, add a loss, correct gradients, keep tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.forward import answer_losses
from motet.adapters.recipes.loop import Loop, Schedule, held_out_losses
from motet.adapters.recipes.readers import User
from motet.adapters.recipes.run import Base
from motet.adapters.recipes.tasks import TASKS, examples
from motet.adapters.recipes.trainee import Trainee

SCHEDULE = Schedule(steps=4, learning_rate=1e-2, batch=4, seed=0)
Make = Callable[..., tuple[Trainee, Loop]]


@pytest.fixture
def make(base: Callable[[], Base], data: Path) -> Make:
    """A loop over the embedding and the last norm of a tiny model, in float32, with the hooks given."""

    def begun(**hooks: Any) -> tuple[Trainee, Loop]:
        made = base()
        made.model.requires_grad_(False)
        trainable: dict[str, nn.Parameter] = {
            "embedding": made.model.model.embed_tokens.weight,
            "norm": made.model.model.norm.weight,
        }
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        corpus = Corpus.of(made.tokenizer, examples(TASKS["wikisql"], data, "train"))
        trainee = replace(Trainee(made.model, trainable, save=lambda _: None), **hooks)
        return trainee, Loop(trainee, corpus, SCHEDULE, autocast=False)

    return begun


def values(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainee.trainable.items()}


def test_a_method_is_told_where_the_run_stands_before_each_step(make: Make) -> None:
    told: list[tuple[int, int, int]] = []
    _, loop = make(before_step=lambda done, steps: told.append((done, steps, loop.done)))
    list(loop)
    assert told == [(done, 4, done) for done in range(4)]


def test_it_is_told_so_in_a_resumed_run_as_well(make: Make) -> None:
    _, first = make()
    steps = iter(first)
    next(steps), next(steps)
    told: list[tuple[int, int]] = []
    _, resumed = make(before_step=lambda done, steps: told.append((done, steps)))
    resumed.restore(first.state())
    list(resumed)
    assert told == [(2, 4), (3, 4)]


def test_what_a_method_freezes_stays_and_leaves_the_optimiser(make: Make) -> None:
    def before_step(done: int, _: int) -> None:
        trainee.trainable["norm"].requires_grad_(done in (0, 3))

    trainee, loop = make(before_step=before_step)
    seen = [values(trainee)]
    momentous = []
    for _ in loop:
        seen.append(values(trainee))
        momentous.append("norm@exp_avg" in loop.state().tensors)
    moved = [not torch.equal(one["norm"], other["norm"]) for one, other in pairwise(seen)]
    assert moved == momentous == [True, False, False, True]
    assert loop.state().tensors["norm@step"] == 1, "it begins anew: no push from what it did before"
    assert loop.state().tensors["embedding@step"] == 4


def test_a_further_loss_trains_and_is_not_reported(make: Make) -> None:
    """It is given the logits of the answers' tokens and these; a loss that undoes the first leaves nothing to learn."""
    given: list[tuple[tuple[int, ...], int]] = []

    def undo(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        given.append((tuple(logits_NV.shape), len(labels_N)))
        return -torch.nn.functional.cross_entropy(logits_NV, labels_N)

    plain_trainee, plain = make()
    trainee, loop = make(further_loss=undo)
    before = values(trainee)
    first = next(iter(loop))
    assert first == next(iter(plain)) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(trainee).items())
    assert not torch.equal(plain_trainee.trainable["embedding"], before["embedding"])
    (shape, n_labels), (ids, labels) = given[0], loop.corpus.batch(next(loop.corpus.draws(4, 4, 0)))
    assert shape == (n_labels, 320)
    assert n_labels == len(answer_losses(make()[0].model, loop.corpus.prefix, (ids, labels)))


def test_a_tensor_may_learn_at_a_share_of_the_rate(make: Make) -> None:
    """AdamW's first step is the rate itself, whatever the gradient."""
    trainee, loop = make(rates={"norm": 0.25})
    before = values(trainee)
    next(iter(loop))
    largest = {name: float((tensor - before[name]).abs().max()) for name, tensor in values(trainee).items()}
    assert largest == pytest.approx({"embedding": 1e-2, "norm": 0.25e-2}, rel=1e-3)


def test_a_slower_tensor_is_taken_up_with_its_own_moments(make: Make) -> None:
    whole, loop = make(rates={"embedding": 0.5})
    list(loop)
    _, halted = make(rates={"embedding": 0.5})
    steps = iter(halted)
    next(steps), next(steps)
    resumed, other = make(rates={"embedding": 0.5})
    other.restore(halted.state())
    assert list(other.losses) == list(loop.losses)[:2]
    list(other)
    assert all(torch.equal(tensor, values(whole)[name]) for name, tensor in values(resumed).items())


def test_a_model_is_told_its_users_before_each_forward(make: Make) -> None:
    """In training with the rows of the batch, and in evaluation, when the model knows that it is one."""
    told: list[tuple[bool, list[User]]] = []
    trainee, plain = make(for_users=lambda users: told.append((trainee.model.training, list(users))))
    corpus = plain.corpus.personal([User((number,), (7,)) for number in range(len(plain.corpus.rows))])
    list(Loop(trainee, corpus, SCHEDULE, autocast=False))
    assert told == [(True, [User((number,), (7,)) for number in numbers]) for numbers in corpus.draws(4, 4, 0)]
    told.clear()
    sums, counts = held_out_losses(trainee, corpus, 5)
    assert not any(training for training, _ in told)
    seen = [user.history[0] for _, users in told for user in users]
    assert sorted(seen) == list(range(len(corpus.rows)))
    lengths = [sum(map(len, corpus.rows[number])) for number in seen]
    assert lengths == sorted(lengths), "in the order of the batches"
    assert len(sums) == len(counts) == len(seen)


def test_gradients_are_corrected_after_they_were_clipped(make: Make) -> None:
    norms: list[float] = []

    def nothing() -> None:
        gradients = [parameter.grad for parameter in trainee.trainable.values() if parameter.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients]))))
        for each in gradients:
            each.zero_()

    trainee, loop = make(correct_gradients=nothing)
    before = values(trainee)
    list(loop)
    assert all(norm <= 1 + 1e-5 for norm in norms)
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(trainee).items())


def test_what_a_method_keeps_is_kept_and_given_back_in_place(make: Make) -> None:
    def counting() -> tuple[Trainee, Loop, torch.Tensor]:
        count = torch.zeros(())

        def before_step(_done: int, _steps: int) -> None:
            count.add_(1)

        return *make(before_step=before_step, kept={"count": count}), count

    _, first, count = counting()
    steps = iter(first)
    next(steps), next(steps)
    state = first.state()
    next(steps)
    assert (state.tensors["count"], count) == (2, 3), "a copy"
    _, resumed, other = counting()
    resumed.restore(state)
    assert other == 2
    list(resumed)
    assert other == 4


def test_a_restored_loop_goes_on_bit_for_bit(make: Make) -> None:
    def before_step(done: int, _: int) -> None:
        for trainee in trainees:
            trainee.trainable["norm"].requires_grad_(done != 1)

    (one, whole), (other, parts) = make(before_step=before_step), make(before_step=before_step)
    trainees = [one, other]
    steps = iter(whole)
    next(steps), next(steps)
    parts.restore(whole.state())
    assert list(parts) == list(steps)
    assert parts.losses == whole.losses
    for name, tensor in values(one).items():
        assert torch.equal(tensor, other.trainable[name])
