"""Trains one adapter of each method alike and measures what each method claims of itself; one JSON line a run.

Run it from the repository root; a method and a learning rate that the results hold already are left out:

    python -m tests.bench.claims --data DATA_DIR --results docs/results/claims-cpu.jsonl
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters.recipes import knowledge
from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import TASKS, examples
from motet.adapters.recipes.trainee import Trainee
from tests.bench import claims_measures as measures
from tests.bench.plan import Plan

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASK = "wikisql"
STEPS = 150
LOOK_AT = (10, 25, 50, 100, 150)
"""Steps after which the held-out loss is measured."""
RANK, TARGETS, BATCH, THREADS = 6, ("q_proj", "v_proj"), 8, 1
SPARSE_TARGETS = ("down_proj",)
"""S²FT's, with about as many parameters as the rank gives the others; whole models have neither rank nor targets."""
POLAR_ALPHA = 32
"""The authors'; of the others alpha is the rank, as in the paper on PiSSA."""
HELD_OUT_ROWS, QUESTIONS = 128, 300
ROWS_SEED = 0
"""Of the held-out rows and the questions: all runs see the same."""
BASE = "base"
"""Instead of a method: the base model as it is."""

Run = tuple[str, float, int]
"""Method, learning rate, seed."""
PLAN: Sequence[Run] = (
    (BASE, 0.0, 0),
    *((method, 1e-3, 0) for method in ("lora", "pissa", "corda-kpm", "corda-ipm")),
    *((method, 4e-3, 0) for method in ("polar", "lora", "corda-kpm", "corda-ipm", "pissa")),
    ("polar", 1e-3, 0),
    *(("lisa", 3e-4, 0), ("full", 1e-4, 0), ("s2ft", 4e-3, 0), ("s2ft", 1e-3, 0), ("lisa", 1e-3, 0), ("full", 3e-4, 0)),
    *((method, rate, 0) for method in ("olora", "eva") for rate in (1e-3, 4e-3)),
    *((method, rate, 1) for rate in (1e-3, 4e-3) for method in ("lora", "corda-kpm", "corda-ipm", "pissa", "polar")),
)


def shape(method: str) -> tuple[int, int, tuple[str, ...]]:
    """Rank, alpha and targets of a method."""
    if method in RECIPES and not RECIPES[method].targets:
        return 0, 0, ()
    return RANK, POLAR_ALPHA if method == "polar" else RANK, SPARSE_TARGETS if method == "s2ft" else TARGETS


def arguments(run: Run) -> dict[str, Any]:
    """Everything that shapes a run."""
    held_out = {"held_out_rows": HELD_OUT_ROWS, "questions": QUESTIONS, "rows_seed": ROWS_SEED}
    return json.loads(json.dumps({**shaped(run), **held_out, "base": BASE_NAME}))  # type: ignore[no-any-return]


def shaped(run: Run) -> dict[str, Any]:
    """The fields of the run's order; the base model has them too, as those it is compared with."""
    method, rate, seed = run
    fields = (method, TASK, *shape(method), STEPS, rate, BATCH, seed, THREADS)
    return dict(zip(Order.__slots__, fields, strict=True))


def measure(run: Run, model_folder: Path, data: Path) -> dict[str, Any]:
    """Train and judge."""
    method, *_ = run
    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    chosen = random.Random(ROWS_SEED)
    rows = chosen.sample(examples(TASKS[TASK], data, "dev"), HELD_OUT_ROWS)
    questions = chosen.sample(knowledge.questions(data, "test"), QUESTIONS)
    corpus = Corpus.of(tokenizer, rows)
    looked_at = shape(method)[2] or TARGETS
    before = {path: weight.clone() for path, weight in measures.effective_weights(model, looked_at).items()}
    results: dict[str, Any] = {}
    if method == BASE:
        trainee = Trainee(model, {}, save=lambda _: None)
        results["held_out"] = {"0": asdict(measures.held_out(trainee, corpus))}
    else:
        start_s = time.perf_counter()
        trainee, loop = begin(Order(**shaped(run)), Base(BASE_NAME, model, tokenizer), data)
        results["start_s"] = round(time.perf_counter() - start_s, 2)
        results["held_out"], step_s = {}, time.perf_counter()
        training_s = 0.0
        for _ in loop:
            training_s += time.perf_counter() - step_s
            if loop.done in LOOK_AT:
                found = asdict(measures.held_out(trainee, corpus))
                if loop.done != STEPS:
                    del found["row_losses"]
                results["held_out"][str(loop.done)] = found
            step_s = time.perf_counter()
        results["training_s"] = round(training_s, 1)
        results["training_losses"] = [round(loss, 4) for loss in loop.losses]
        results["parameters"] = asdict(measures.parameters(trainee))
        results["change"] = asdict(measures.change(before, measures.effective_weights(trainee.model, looked_at)))
    results["knowledge"] = asdict(measures.knowledge(trainee.model, tokenizer, questions))
    if method != BASE:
        trainee.round_as_saved(getattr(torch, RECIPES[method].saved_dtype))
        results["held_out_as_saved"] = measures.held_out(trainee, corpus).loss
    return results


def main(argv: Sequence[str] | None = None) -> int:
    return Plan(
        "claims",
        __doc__ or "",
        PLAN,
        label=lambda run: f"{run[0]} at {run[1]:g}, seed {run[2]}",
        arguments=arguments,
        measure=measure,
        tell=lambda results: {step: round(at["loss"], 4) for step, at in results["held_out"].items()},
    ).carry_out(argv)


if __name__ == "__main__":
    sys.exit(main())
