"""The quality-retaining loss: what several tasks have learnt is held while they are learnt together.

A bank has the last two logit vectors of every label word, over the words of its task. To the loss is added

    T² Σ_bank KL(softmax(bank / T) ‖ softmax(z / T)) / L,  T = 2

of each row's logits z to the bank of its own word; L is the running cross entropy of the row's task, so that a task
that is learnt well is held firmly. As the cross entropy, it is a mean over all answer tokens.

Must not know: models, methods, tasks. Source: https://arxiv.org/abs/2501.06884 and the authors' code, whose bank starts
with zeros, that is, pulls to the uniform distribution; here a word is held once its bank is full.

Shapes: N answer tokens, V vocabulary, n rows of one task, C its label words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy, log_softmax

from motet.adapters.recipes.errors import DataError

TEMPERATURE = 2.0
MEMORY = 0.95
"""Weight of the past in the running cross entropy; it starts at that of a guess, log C."""
DEPTH = 2
"""Logit vectors that the bank has of each word."""


class QualityRetaining:
    """The loss with its bank."""

    def __init__(self, classes: Sequence[Sequence[int]]) -> None:
        """The bank is empty.

        Args:
            classes: token ids of each task's label words, no id twice.
        """
        self._classes = [torch.tensor(words) for words in classes]
        self._bank = [torch.zeros(len(words), DEPTH, len(words)) for words in classes]
        self._seen = [torch.zeros(len(words), dtype=torch.int64) for words in classes]
        self._loss = torch.tensor([math.log(len(words)) for words in classes])

    @property
    def kept(self) -> Mapping[str, torch.Tensor]:
        """What the next call depends on."""
        banks = {f"quality.bank.{task}": bank for task, bank in enumerate(self._bank)}
        seen = {f"quality.seen.{task}": seen for task, seen in enumerate(self._seen)}
        return {**banks, **seen, "quality.loss": self._loss}

    def __call__(self, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """The further loss of a step; then its logits are what the next is held to."""
        total = logits_NV.new_zeros(())
        for task, words_C in enumerate(self._classes):
            rows, word_n = (labels_N[:, None] == words_C).nonzero(as_tuple=True)
            if not len(rows):
                continue
            chosen_nV = logits_NV[rows]
            now = cross_entropy(chosen_nV.detach(), labels_N[rows])
            self._loss[task] = MEMORY * self._loss[task] + (1 - MEMORY) * now
            logits_nC = chosen_nV[:, words_C]
            held = self._seen[task][word_n] >= DEPTH
            total = total + _divergence(logits_nC[held], self._bank[task][word_n[held]]) / self._loss[task].clone()
            self._remember(task, logits_nC.detach(), word_n)
        return total / len(labels_N)

    def _remember(self, task: int, logits_nC: torch.Tensor, word_n: torch.Tensor) -> None:
        for logits_C, word in zip(logits_nC, word_n.tolist(), strict=True):
            self._bank[task][word] = torch.stack([*self._bank[task][word][1:], logits_C])
            self._seen[task][word] += 1


def _divergence(logits_nC: torch.Tensor, bank_nDC: torch.Tensor) -> torch.Tensor:
    ours_nDC = log_softmax(logits_nC / TEMPERATURE, dim=-1)[:, None]
    theirs_nDC = log_softmax(bank_nDC / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * (theirs_nDC.exp() * (theirs_nDC - ours_nDC)).sum()


def label_tokens(tokenizer: Any, choices: Sequence[Sequence[str]]) -> list[list[int]]:
    """The token id of each label word of each task.

    Raises:
        DataError: a word is not one token, or belongs to two tasks.
    """
    found: dict[str, int] = {}
    for word in (word for words in choices for word in words):
        ids = tokenizer(word)["input_ids"]
        if len(ids) != 1:
            raise DataError(f"the answer {word!r} has {len(ids)} tokens in this base, not 1; train by another method")
        if word in found:
            raise DataError(f"the answer {word!r} belongs to two of the tasks, which must be told by it; join others")
        found[word] = ids[0]
    return [[found[word] for word in words] for words in choices]
