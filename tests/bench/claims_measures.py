"""What the claims are judged by: held-out loss, knowledge kept, stable rank. Knows nothing of how a model was trained.

Shapes: I/O in and out width of a target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.forward import answer_losses
from motet.adapters.recipes.knowledge import Question
from motet.adapters.recipes.loop import held_out_losses
from motet.adapters.recipes.trainee import Trainee

BATCH = 16


@dataclass(frozen=True)
class HeldOut:
    """Mean loss of an answer token, in nats.

    Args:
        standard_error: over rows, of the ratio of sums.
        row_losses: summed over each row's answer, in the order of the rows: for comparisons row by row.
    """

    loss: float
    standard_error: float
    row_losses: list[float]


@dataclass(frozen=True)
class Knowledge:
    """Multiple choice by the likelihood of the answer's text after "Question: …\\nAnswer:".

    Args:
        accuracy: by the summed log-likelihood, with its standard error.
        accuracy_per_byte: by the log-likelihood divided by the answer's bytes.
        answer_nll: mean over questions of the right answer's mean loss of a token, in nats, with its standard error.
        right: one character a question, "1" where `accuracy` counts it.
    """

    accuracy: float
    accuracy_standard_error: float
    accuracy_per_byte: float
    answer_nll: float
    answer_nll_standard_error: float
    right: str


@dataclass(frozen=True)
class Parameters:
    """Elements of the tensors that training may change.

    Args:
        at_once: those that have a gradient at the end; LISA's take turns.
    """

    all: int
    at_once: int


@dataclass(frozen=True)
class Change:
    """The change of the adapted weights, mean over the targets that changed.

    Args:
        stable_rank: ‖ΔW‖_F² / ‖ΔW‖_2².
        relative_norm: ‖ΔW‖_F / ‖W‖_F.
        targets: how many changed.
    """

    stable_rank: float
    stable_rank_standard_error: float
    relative_norm: float
    targets: int


def parameters(trainee: Trainee) -> Parameters:
    """What the trainee trains."""
    tensors = trainee.trainable.values()
    return Parameters(
        all=sum(parameter.numel() for parameter in tensors),
        at_once=sum(parameter.numel() for parameter in tensors if parameter.requires_grad),
    )


def held_out(trainee: Trainee, corpus: Corpus) -> HeldOut:
    """In float32."""
    sums, counts = held_out_losses(trainee, corpus, BATCH)
    loss = sum(sums) / sum(counts)
    residuals = [total - loss * count for total, count in zip(sums, counts, strict=True)]
    error = math.sqrt(sum(residual**2 for residual in residuals)) / sum(counts)
    return HeldOut(loss, error, [round(total, 4) for total in sums])


@torch.inference_mode()
def knowledge(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Knowledge:
    """In float32."""
    model.eval()
    right, per_byte, answer_nlls = [], [], []
    for question in questions:
        asked = tokenizer(question.prompt)["input_ids"]
        told = [tokenizer(f" {choice}")["input_ids"] for choice in question.choices]
        corpus = Corpus(asked[:-1], [(asked[-1:], tokens) for tokens in told])
        losses = answer_losses(model, corpus.prefix, corpus.batch(range(len(told))))
        parts = torch.split(losses, [len(tokens) for tokens in told])
        totals = [float(part.sum()) for part in parts]
        rates = [total / len(text.encode()) for total, text in zip(totals, question.choices, strict=True)]
        right.append(totals.index(min(totals)) == question.right)
        per_byte.append(rates.index(min(rates)) == question.right)
        answer_nlls.append(float(parts[question.right].mean()))
    root = math.sqrt(len(questions))
    accuracy = fmean(right)
    return Knowledge(
        accuracy=accuracy,
        accuracy_standard_error=math.sqrt(accuracy * (1 - accuracy)) / root,
        accuracy_per_byte=fmean(per_byte),
        answer_nll=fmean(answer_nlls),
        answer_nll_standard_error=stdev(answer_nlls) / root,
        right="".join(str(int(each)) for each in right),
    )


@torch.inference_mode()
def effective_weights(model: Any, targets: Sequence[str]) -> dict[str, torch.Tensor]:
    """Target → [O, I]: what the target does to each unit vector, whatever is inside it. For targets without bias."""
    weights = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in targets:
            plain = getattr(module, "base_layer", module)
            weights[path] = module(torch.eye(plain.in_features)).T
    return weights


def change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> Change:
    """Of the targets that changed, two of them at least: LISA leaves some layers as they are."""
    ranks, norms = [], []
    for path, weight_OI in before.items():
        delta_OI = after[path] - weight_OI
        if not delta_OI.any():
            continue
        total = float(torch.linalg.matrix_norm(delta_OI))
        ranks.append((total / float(torch.linalg.matrix_norm(delta_OI, 2))) ** 2)
        norms.append(total / float(torch.linalg.matrix_norm(weight_OI)))
    return Change(fmean(ranks), stdev(ranks) / math.sqrt(len(ranks)), fmean(norms), len(ranks))
