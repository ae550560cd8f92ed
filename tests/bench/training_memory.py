"""What a training step keeps in memory and takes of a core, by method; each in a process of its own, one line a method.

Run it from the repository root; a line is appended for each method:

    OMP_NUM_THREADS=1 python -m tests.bench.training_memory --data DATA_DIR --out docs/results/training-memory-cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters.recipes.loop import MOMENTS, Loop, Schedule
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.table import RECIPES
from tests.bench.lines import append, surroundings

TASK, STEPS, BATCH = "wikisql", 6, 8
"""LISA draws other layers before the last step."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEVEN = "lora on seven"
"""Linears of a layer, where the recipe adapts two."""
METHODS: Mapping[str, str] = {
    "full": "full",
    "lisa": "lisa",
    "lora": "lora",
    SEVEN: "lora",
    "dora": "dora",
    "s2ft": "s2ft",
}
"""What a line is called → the recipe."""


@dataclass(frozen=True)
class Memory:
    """Of one run.

    Attributes:
        trained: elements of the tensors with a gradient in a step, the most.
        gradient_bytes: of them, after the backward pass, the most of any step.
        moment_bytes: of the optimiser's state after the last step.
        loaded_bytes: largest resident memory of the process until the base was loaded.
        peak_bytes: largest resident memory of the process until the last step was done.
        step_cpu_s: processor time of each step.
    """

    trained: int
    gradient_bytes: int
    moment_bytes: int
    loaded_bytes: int
    peak_bytes: int
    step_cpu_s: list[float]


def order(name: str) -> Order:
    """The recipe's, for a few steps."""
    method, recipe = METHODS[name], RECIPES[METHODS[name]]
    targets = LINEARS if name == SEVEN else recipe.targets
    return Order(method, TASK, recipe.rank, recipe.alpha, targets, STEPS, recipe.learning_rate, BATCH, 0, 1)


def measure(asked: Order, base: Base, data: Path) -> Memory:
    """Train the order's steps. The resident memory means something in a process that has done nothing else."""
    loaded_bytes = _peak_bytes()
    trainee, prepared = begin(asked, base, data)
    gradients: list[tuple[int, int]] = []

    def look() -> None:
        trainee.correct_gradients()
        found = [tensor.grad for tensor in trainee.trainable.values() if tensor.grad is not None]
        gradients.append((sum(each.numel() for each in found), sum(each.nbytes for each in found)))

    schedule = Schedule(asked.steps, asked.learning_rate, asked.batch, asked.seed)
    loop = Loop(replace(trainee, correct_gradients=look), prepared.corpus, schedule)
    step_cpu_s, began_s = [], time.process_time()
    for _ in loop:
        step_cpu_s.append(round(time.process_time() - began_s, 3))
        began_s = time.process_time()
    peak_bytes = _peak_bytes()  # before the state is copied
    ends = tuple(f"@{moment}" for moment in MOMENTS)
    moments = [tensor for name, tensor in loop.state().tensors.items() if name.endswith(ends)]
    return Memory(*max(gradients), sum(each.nbytes for each in moments), loaded_bytes, peak_bytes, step_cpu_s)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _alone(name: str, model: Path, data: Path) -> str:
    """In a new process: the memory as JSON."""
    arguments = ["--only", name, "--model", str(model), "--data", str(data)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.training_memory", *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training_memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MOTET_DATA", "../shared/data"))
    parser.add_argument("--model", type=Path, help="folder of the base model; by default the default model")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    parser.add_argument("--only", choices=METHODS, help="one method, in this process; prints it")
    options = parser.parse_args(argv)
    if (model := options.model) is None:
        from motet.server.model.default_model import ensure_default_model

        model = ensure_default_model()
    if options.only is not None:
        torch.set_num_threads(1)
        tokenizer = AutoTokenizer.from_pretrained(model)
        base = Base("base", AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer)
        print(json.dumps(asdict(measure(order(options.only), base, options.data))))
        return 0
    if options.out is None:
        parser.error("--out is needed, unless --only prints one method")
    for name in METHODS:
        head = surroundings("torch", "transformers", "peft")
        found = json.loads(_alone(name, model, options.data))
        line = {
            "label": name,
            **head,
            "arguments": asdict(order(name)),
            "results": found,
        }
        append(options.out, line)
        megabytes = {key: round(found[key] / 1e6, 1) for key in found if key.endswith("_bytes")}
        print(name, megabytes, median(found["step_cpu_s"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
