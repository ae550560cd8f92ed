"""EMTAL's claim on several tasks at once: one adapter of it beside plain LoRA, one for all tasks or one for each.

Every run trains alike and answers the same held-out questions; one JSON line a run. Run it from the repository root,
alone on a core if it can be had; a run that the results hold already is left out:

    python -m tests.bench.emtal_quality --data DATA_DIR --results docs/results/emtal-quality-cpu.jsonl

Shapes: N rows, C label words of a task.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.forward import answer_logits
from motet.adapters.recipes.loop import Loop, Schedule
from motet.adapters.recipes.quality import label_tokens
from motet.adapters.recipes.readers import Example
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import JOINED, TASKS, examples
from tests.bench.claims import BASE_NAME
from tests.bench.plan import Plan

LEARNT = ("boolq", "wikisql-aggregate", "advising-kind")
SPLITS = {"boolq": ("test",), "wikisql-aggregate": ("dev", "test"), "advising-kind": ("dev", "test")}
"""Held-out rows; the test split alone would be too few of the smaller tasks. No run sees either in training."""
MOST_ROWS = 400
STEPS, RATE, BATCH, RANK, THREADS = 120, 4e-3, 12, 4, 1
ROWS_SEED = 0
SCORED_AT_ONCE = 32


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        method: of RECIPES; None: the base model as it is, told the form of each answer.
        tasks: learnt at once, in as many steps as are their share of all tasks.
        retaining: with the method's further loss.
    """

    method: str | None
    tasks: tuple[str, ...] = LEARNT
    retaining: bool = True
    seed: int = 0

    @property
    def label(self) -> str:
        """A name for people."""
        method = self.method or "base"
        return f"{method}{'' if self.retaining else ' without QR'} on {JOINED.join(self.tasks)}, seed {self.seed}"

    def order(self, method: str) -> Order:
        """The training, with the same seed and rate whatever the method."""
        steps = STEPS * len(self.tasks) // len(LEARNT)
        targets = RECIPES["emtal"].targets
        return Order(method, JOINED.join(self.tasks), RANK, RANK, targets, steps, RATE, BATCH, self.seed, THREADS)


def _runs_of(seed: int) -> tuple[Run, ...]:
    together = (Run("emtal", seed=seed), Run("lora", seed=seed), Run("emtal", retaining=False, seed=seed))
    return (*together, *(Run("lora", (task,), seed=seed) for task in LEARNT))


PLAN: Sequence[Run] = (Run(None), *_runs_of(0), *_runs_of(1))


def arguments(run: Run) -> dict[str, Any]:
    """Everything that shapes a run."""
    order = asdict(run.order(run.method)) if run.method else {"method": "base", "task": JOINED.join(run.tasks)}
    held_out = {"splits": SPLITS, "most_rows": MOST_ROWS, "rows_seed": ROWS_SEED}
    whole = {**order, "retaining": run.retaining, **held_out, "base": BASE_NAME}
    return json.loads(json.dumps(whole))  # type: ignore[no-any-return]


def held_out(task: str, data: Path) -> list[Example]:
    """The same rows for every run, of like length side by side."""
    rows = [example for split in SPLITS[task] for example in examples(TASKS[task], data, split)]
    return sorted(random.Random(ROWS_SEED).sample(rows, min(MOST_ROWS, len(rows))), key=lambda row: len(row[0]))


@torch.inference_mode()
def judged(model: Any, tokenizer: Any, task: str, rows: Sequence[Example], told: bool) -> dict[str, Any]:
    """Accuracy and loss over the task's words, in float32.

    Args:
        told: whether the form of the answer stands before each question.

    Returns:
        accuracy by the largest logit among the task's words; greedy, among all tokens; loss, of the softmax over the
        words; right: one character a row, "1" where the accuracy counts it.
    """
    choices = TASKS[task].choices
    assert choices is not None
    (words,) = label_tokens(tokenizer, [choices])
    hint = TASKS[task].hint if told else ""
    corpus = Corpus.of(tokenizer, [(hint + question, answer) for question, answer in rows])
    right, greedy, losses = [], [], []
    for first in range(0, len(rows), SCORED_AT_ONCE):
        batch = corpus.batch(range(first, min(first + SCORED_AT_ONCE, len(rows))))
        logits, labels = answer_logits(model.eval(), corpus.prefix, batch)
        answered = torch.isin(labels, torch.tensor(words))  # not the end tokens
        logits_NV, labels_N = logits[answered], labels[answered]
        right_N = (labels_N[:, None] == torch.tensor(words)).int().argmax(1)
        logits_NC = logits_NV[:, words]
        right += (logits_NC.argmax(1) == right_N).tolist()
        greedy += (logits_NV.argmax(1) == labels_N).tolist()
        losses += (-log_softmax(logits_NC, 1)).gather(1, right_N[:, None])[:, 0].tolist()
    assert len(right) == len(rows)
    root, accuracy = math.sqrt(len(rows)), fmean(right)
    return {
        "n": len(rows),
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy)) / root,
        "greedy_accuracy": fmean(greedy),
        "loss": fmean(losses),
        "loss_standard_error": stdev(losses) / root,
        "right": "".join(str(int(each)) for each in right),
    }


def measure(run: Run, model_folder: Path, data: Path) -> dict[str, Any]:
    """Train and judge on each of the run's tasks."""
    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    results: dict[str, Any] = {}
    if run.method is not None:
        began_s = time.perf_counter()
        trainee, loop = begin(run.order(run.method), Base(BASE_NAME, model, tokenizer), data)
        if not run.retaining:
            order = run.order(run.method)
            trainee = replace(trainee, further_loss=None)
            loop = Loop(trainee, loop.corpus, Schedule(order.steps, order.learning_rate, order.batch, order.seed))
        results["start_s"] = round(time.perf_counter() - began_s, 1)
        began_s = time.perf_counter()
        results["training_losses"] = [round(loss, 4) for loss in loop]
        results["training_s"] = round(time.perf_counter() - began_s, 1)
        trainee.round_as_saved(getattr(torch, RECIPES[run.method].saved_dtype))
        results["parameters"] = sum(parameter.numel() for parameter in trainee.trainable.values())
        model = trainee.model
    told = run.method is None
    results["tasks"] = {task: judged(model, tokenizer, task, held_out(task, data), told) for task in run.tasks}
    return results


def main(argv: Sequence[str] | None = None) -> int:
    return Plan(
        "emtal_quality",
        __doc__ or "",
        PLAN,
        label=lambda run: run.label,
        arguments=arguments,
        measure=measure,
        tell=lambda results: {task: round(found["accuracy"], 3) for task, found in results["tasks"].items()},
        packages=("torch", "transformers", "peft", "scipy"),
    ).carry_out(argv)


if __name__ == "__main__":
    sys.exit(main())
