"""What the quality-retaining loss remembers and pulls to."""

from __future__ import annotations

import math

import pytest
import torch

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.quality import QualityRetaining, label_tokens
from tests.support.tokenizer import byte_tokenizer
from tests.support.tolerances import TOLERANCES

CLASSES = [[5, 3], [8, 1, 6]]
END = 2
CLOSE = TOLERANCES["logits", torch.float32]


def logits(n: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value / 2) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(held: list[float], now: list[float]) -> float:
    """Temperature 2, times its square."""
    pairs = zip(softmax(held), softmax(now), strict=True)
    return 4 * sum(p * math.log(p / q) for p, q in pairs)


def test_the_loss_is_that_of_the_formula() -> None:
    """The oracle: the formula in scalars, with the two last vectors of each word kept in lists."""
    loss = QualityRetaining(CLASSES)
    bank: dict[int, list[list[float]]] = {}
    running = [math.log(2), math.log(3)]
    steps = [[5, END, 6, END], [3, END, 6, END], [5, END, 6, END, 6, END], [6, END, 5, END, 3, END], [3, 5, 5, 8]]
    seen_nonzero = 0
    for step, labels in enumerate(steps):
        logits_NV = logits(len(labels), step)
        expected = 0.0
        held = {word: list(vectors) for word, vectors in bank.items()}
        for task, words in enumerate(CLASSES):
            rows = [row for row, label in enumerate(labels) if label in words]
            if not rows:
                continue
            losses = [-float(logits_NV[row].log_softmax(0)[labels[row]]) for row in rows]
            running[task] = 0.95 * running[task] + 0.05 * sum(losses) / len(losses)
            for row in rows:
                now = [float(logits_NV[row, word]) for word in words]
                if len(held.get(labels[row], [])) == 2:
                    expected += sum(divergence(old, now) for old in held[labels[row]]) / running[task]
                bank[labels[row]] = [*bank.get(labels[row], []), now][-2:]
        found = loss(logits_NV, torch.tensor(labels))
        CLOSE.assert_close(found, torch.tensor(expected / len(labels)))
        seen_nonzero += expected > 0
    assert seen_nonzero == 3
    CLOSE.assert_close(loss.kept["quality.loss"], torch.tensor(running))
    CLOSE.assert_close(loss.kept["quality.bank.1"][2], torch.tensor(bank[6]))


def test_what_is_remembered_is_no_part_of_the_gradient() -> None:
    loss = QualityRetaining(CLASSES)
    labels_N = torch.tensor([5, END])
    for seed in range(2):
        loss(logits(2, seed).requires_grad_(), labels_N)
    assert not any(tensor.requires_grad for tensor in loss.kept.values())
    last_NV = logits(2, 2).requires_grad_()
    loss(last_NV, labels_N).backward()  # type: ignore[no-untyped-call]
    assert last_NV.grad is not None
    assert set(last_NV.grad.nonzero()[:, 1].tolist()) == set(CLASSES[0]), "only the words of the task"
    assert bool((last_NV.grad[1] == 0).all()), "nothing for the end token"


def test_what_is_kept_is_changed_in_place_and_is_all_there_is() -> None:
    """A second one, given what the first kept, goes on alike."""
    first, second = QualityRetaining(CLASSES), QualityRetaining(CLASSES)
    kept = first.kept
    labels_N = torch.tensor([5, END, 8, END])
    for seed in range(3):
        first(logits(4, seed), labels_N)
    for name, tensor in second.kept.items():
        tensor.copy_(kept[name])
    assert torch.equal(first(logits(4, 9), labels_N), second(logits(4, 9), labels_N))


def test_label_words_are_single_tokens_of_one_task() -> None:
    tokenizer = byte_tokenizer()
    (no, yes), (one,) = label_tokens(tokenizer, [["n", "y"], ["1"]])
    assert tokenizer.decode([no, yes, one]) == "ny1"
    with pytest.raises(DataError, match="the answer 'maximum' has 7 tokens in this base, not 1"):
        label_tokens(tokenizer, [["n", "maximum"]])
    with pytest.raises(DataError, match="the answer 'n' belongs to two of the tasks"):
        label_tokens(tokenizer, [["n", "y"], ["m", "n"]])
