"""Greedy answers to held-out questions, and how many of their facts are right.

Must not know: methods, training, files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, TypeVar

import torch

from motet.adapters.recipes.corpus import chat_ids
from motet.adapters.recipes.readers import Example
from motet.adapters.recipes.tasks import Task

BATCH = 32
Item = TypeVar("Item")
Track = Callable[[Sequence[Item]], Iterable[Item]]
"""Shows progress through a sequence."""
Classify = Callable[[torch.Tensor], torch.Tensor]
"""From states float32 [N, D] after the final norm to a logit of each choice [N, C]."""


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: Any,
    task: Task,
    questions: Sequence[str],
    track: Track[int] = iter,
    before: Callable[[Sequence[int]], None] = lambda _: None,
    classify: Classify | None = None,
) -> tuple[list[str], list[list[float]]]:
    """Greedy texts and, of each, the logits of the choices' first tokens; none without choices.

    Args:
        before: called before each batch with the numbers of its questions.
        classify: the adapter's own head: the texts are the likeliest choices then, and the logits its own.
    """
    texts: list[str] = [""] * len(questions)
    logits: list[list[float]] = [[]] * len(questions)
    first_tokens = [tokenizer(choice)["input_ids"][0] for choice in task.choices or ()]
    prompts = [chat_ids(tokenizer, question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    keep = {"return_dict_in_generate": True, "output_logits": task.choices is not None}
    for start in track(range(0, len(order), BATCH)):
        chosen = order[start : start + BATCH]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        model.eval()
        before(chosen)
        if classify is not None:
            assert task.choices is not None
            for i, row in zip(chosen, classify(model.model(**batch).last_hidden_state[:, -1].float()), strict=True):
                texts[i], logits[i] = task.choices[int(row.argmax())], row.tolist()
            continue
        out = model.generate(**batch, **keep, do_sample=False, max_new_tokens=task.answer_tokens)
        for place, i in enumerate(chosen):
            texts[i] = tokenizer.decode(out.sequences[place, len(batch["input_ids"][0]) :], skip_special_tokens=True)
            if first_tokens:
                logits[i] = out.logits[0][place, first_tokens].tolist()
    return texts, logits


def score(
    model: Any,
    tokenizer: Any,
    task: Task,
    tests: Sequence[Example],
    hint: str = "",
    track: Track[int] = iter,
    before: Callable[[Sequence[int]], None] = lambda _: None,
    classify: Classify | None = None,
) -> dict[str, float]:
    """Exact match and micro F1 of the facts, share of well-formed texts; with choices, accuracy by the logits.

    With two choices their AUC too.

    Args:
        hint: put before every question.
        before, classify: as `answers` uses them.
    """
    questions = [hint + question for question, _ in tests]
    texts, logits = answers(model, tokenizer, task, questions, track, before, classify)
    pairs = [(task.facts(text), task.facts(told) or frozenset()) for text, (_, told) in zip(texts, tests, strict=True)]
    metrics = {
        "exact_match": fmean(given == wanted for given, wanted in pairs),
        "f1": 2 * sum(len(g & w) for g, w in pairs if g) / sum(len(g or ()) + len(w) for g, w in pairs),
        "well_formed": fmean(given is not None for given, _ in pairs),
    }
    if task.choices:
        right = [task.choices.index(told) for _, told in tests]
        metrics["majority_class"] = max(Counter(right).values()) / len(tests)
        metrics["logit_accuracy"] = fmean(row.index(max(row)) == c for row, c in zip(logits, right, strict=True))
        if len(task.choices) == 2:
            margins = [one - other for one, other in logits]
            yes, no = ([m for m, r in zip(margins, right, strict=True) if r == c] for c in range(2))
            metrics["logit_auc"] = fmean((y > n) + (y == n) / 2 for y in yes for n in no)
    return {name: round(value, 4) for name, value in metrics.items()}
