"""PoLAR-VBLL's claim: one pass tells better what it does not know than a plain head, and than several passes do.

A few hundred rows of three sets of questions, each answered by one word. The adapters are in the last layers; what is
below them is computed once and kept. One JSON line a set; run it from the repository root; a set that the results hold
already is left out:

    python -m tests.bench.calibrated --data DATA_DIR --results docs/results/uncertainty-cpu.jsonl

Shapes: N questions, C words, K passes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters import heads
from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.loop import Loop, Schedule, question_states
from motet.adapters.recipes.quality import label_tokens
from motet.adapters.recipes.readers import Example
from motet.adapters.recipes.starts import STARTS
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.recipes.upper import KeptCorpus, cut
from motet.server.heads import scores
from motet.server.heads.batch import Head, Row, predict
from tests.bench.calibrated_sets import ROWS_SEED, SETS, TEST_ROWS, TRAIN_ROWS, Questions
from tests.bench.claims import BASE_NAME
from tests.bench.lines import append, surroundings

LAYERS, STEPS, BATCH, RANK, THREADS = 4, 120, 8, 8, 1
SEEDS = (0, 1, 2)
PASSES = 5
"""With dropout."""
AT_ONCE = 32
MLE, DROPOUT, ENSEMBLE, VBLL, LAPLACE = "LoRA, plain head", "its dropout", "its seeds together", "PoLAR-VBLL", "Laplace"


@dataclass(frozen=True)
class Answers:
    """To the questions of one set.

    Args:
        total, epistemic: nats; epistemic is None where every pass says the same.
    """

    p_NC: torch.Tensor
    total_N: torch.Tensor
    epistemic_N: torch.Tensor | None

    @classmethod
    def mixed(cls, passes: Sequence[torch.Tensor]) -> Answers:
        """The mean of the passes' probabilities; what they disagree about is epistemic."""
        p_KNC = torch.stack(list(passes))
        total_N = torch.special.entr(p_KNC.mean(0)).sum(-1)
        return cls(p_KNC.mean(0), total_N, total_N - torch.special.entr(p_KNC).sum(-1).mean(0))


@dataclass(frozen=True)
class Upper:
    """The last layers, and the rows of every set as they read them: (set, "train" or "test") → corpus."""

    model: Any
    tokenizer: Any
    parts: Mapping[tuple[str, str], KeptCorpus]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, sets: Mapping[str, Questions]) -> Upper:
        """Compute the lower layers, products in bfloat16."""
        ends, every = [], list[Example]()
        for name, questions in sets.items():
            for part, found in (("train", questions.train), ("test", questions.test)):
                every += found
                ends.append(((name, part), len(every) - len(found), len(every)))
        with torch.autocast("cpu", torch.bfloat16):
            kept = cut(model, Corpus.of(tokenizer, every), LAYERS)
        parts = {
            key: KeptCorpus(kept.prefix, kept.rows[start:stop], (), kept.answers[start:stop])
            for key, start, stop in ends
        }
        return cls(model, tokenizer, parts)


def trained(upper: Upper, corpus: KeptCorpus, words: tuple[str, ...], method: str, seed: int) -> tuple[Trainee, float]:
    """The trainee after its last step, and the mean objective of the last ten."""
    torch.manual_seed(seed)
    recipe, tokens = RECIPES[method], label_tokens(upper.tokenizer, [words])
    setup = Setup(
        copy.deepcopy(upper.model),
        recipe,
        RANK,
        recipe.alpha,
        recipe.targets,
        BASE_NAME,
        samples=tuple,
        classes=lambda: tokens,
        labels=words,
        n_rows=len(corpus.rows),
    )
    trainee = STARTS[method](setup)
    losses = list(Loop(trainee, corpus, Schedule(STEPS, recipe.learning_rate, BATCH, seed)))
    return trainee, fmean(losses[-10:])


def served(trainee: Trainee) -> Head:
    """The head as a server reads it from the saved files."""
    with tempfile.TemporaryDirectory() as folder:
        trainee.save(Path(folder))
        file = heads.read(Path(folder))
    assert file is not None
    return Head.of(file, torch.device("cpu"))


def states(trainee: Trainee, corpus: Corpus) -> torch.Tensor:
    """At the ends of the questions, products in bfloat16 as they are served."""
    with torch.autocast("cpu", torch.bfloat16):
        return question_states(trainee, corpus, AT_ONCE).float()


def answered(head: Head, states_ND: torch.Tensor) -> Answers:
    """By the code that serves."""
    found = predict([Row(head, x_D) for x_D in states_ND])
    total_N, epistemic_N = (torch.tensor([getattr(each, name) for each in found]) for name in ("total", "epistemic"))
    return Answers(torch.stack([each.p_C for each in found]), total_N, epistemic_N if epistemic_N.any() else None)


def figures(own: Answers, y_N: torch.Tensor, others: Mapping[str, Answers]) -> dict[str, Any]:
    """How good the answers are, and how well their doubt tells other sets' questions apart."""
    outside = {}
    for name, other in others.items():
        both = (own.total_N, other.total_N), (own.epistemic_N, other.epistemic_N)
        truth_N = torch.cat([torch.zeros(len(own.total_N)), torch.ones(len(other.total_N))])
        total, epistemic = (
            None if one is None or two is None else scores.auroc(torch.cat([one, two]), truth_N) for one, two in both
        )
        outside[name] = {"total": total, "epistemic": epistemic}
    measures = (scores.accuracy, scores.calibration_error, scores.nll, scores.brier)
    found = {measure.__name__: measure(own.p_NC, y_N) for measure in measures}
    return {**found, "confidence": float(own.p_NC.max(-1).values.mean()), "auroc": outside}


def measure(name: str, sets: Mapping[str, Questions], upper: Upper) -> list[dict[str, Any]]:
    """Every way of answering one set, each seed apart."""
    words, corpus = sets[name].words, upper.parts[name, "train"]
    y_N = torch.tensor([words.index(word) for _, word in sets[name].test])
    asked = {other: upper.parts[other, "test"] for other in (name, *(each for each in sets if each != name))}
    results: list[dict[str, Any]] = []
    alone: list[dict[str, torch.Tensor]] = []

    def add(way: str, seed: int | None, passes: int, answers: dict[str, Answers], spent: dict[str, float]) -> None:
        found = figures(answers[name], y_N, {other: answers[other] for other in asked if other != name})
        results.append({"way": way, "seed": seed, "passes": passes, **found, **spent})

    for seed in SEEDS:
        began_s = time.process_time()
        trainee, objective = trained(upper, corpus, words, "lora-head", seed)
        spent = {"objective": objective, "training_cpu_s": round(time.process_time() - began_s, 1)}
        head = served(trainee)
        trainee.model.eval()
        features, pass_ms = _timed({other: (trainee, part) for other, part in asked.items()})
        answers = {other: answered(head, states_ND) for other, states_ND in features.items()}
        alone.append({other: each.p_NC for other, each in answers.items()})
        add(MLE, seed, 1, answers, {**spent, "passes_cpu_ms": pass_ms})
        trainee.model.train()
        runs = [_timed({other: (trainee, part) for other, part in asked.items()}) for _ in range(PASSES)]
        answers = {other: Answers.mixed([answered(head, run[other]).p_NC for run, _ in runs]) for other in asked}
        add(DROPOUT, seed, PASSES, answers, {"passes_cpu_ms": sum(ms for _, ms in runs)})

        began_s = time.process_time()
        trainee, objective = trained(upper, corpus, words, "polar-laplace", seed)
        spent = {"objective": objective, "training_cpu_s": round(time.process_time() - began_s, 1)}
        trainee.model.eval()
        features, pass_ms = _timed({other: (trainee, part) for other, part in asked.items()})
        for way in (VBLL, LAPLACE):
            if way == LAPLACE:
                assert trainee.refit is not None
                trainee.refit(states(trainee, corpus))
            head, began_s = served(trainee), time.process_time()
            answers = {other: answered(head, states_ND) for other, states_ND in features.items()}
            head_ms = (time.process_time() - began_s) * 1e3 / sum(map(len, features.values()))
            add(way, seed, 1, answers, {**spent, "passes_cpu_ms": pass_ms, "head_cpu_ms": head_ms})
        print(name, "seed", seed, flush=True)
    together = {other: Answers.mixed([member[other] for member in alone]) for other in asked}
    add(ENSEMBLE, None, len(SEEDS), together, {})
    return results


def _timed(asked: Mapping[str, tuple[Trainee, Corpus]]) -> tuple[dict[str, torch.Tensor], float]:
    """The states of every set, and processor milliseconds of a question through the last layers."""
    began_s = time.process_time()
    found = {other: states(trainee, corpus) for other, (trainee, corpus) in asked.items()}
    return found, (time.process_time() - began_s) * 1e3 / sum(map(len, found.values()))


def arguments(name: str) -> dict[str, Any]:
    """Everything that shapes a set's runs."""
    fixed = {"train_rows": TRAIN_ROWS, "test_rows": TEST_ROWS, "rows_seed": ROWS_SEED, "layers": LAYERS}
    further = {"steps": STEPS, "batch": BATCH, "rank": RANK, "seeds": list(SEEDS), "dropout_passes": PASSES}
    others = {"others": [each for each in SETS if each != name], "threads": THREADS, "base": BASE_NAME}
    return {"set": name, **fixed, **further, **others}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calibrated", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MOTET_DATA", "../shared/data"))
    parser.add_argument("--model", type=Path, help="folder of the base model; by default the default model")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to append to")
    options = parser.parse_args(argv)
    if (folder := options.model) is None:
        from motet.server.model.default_model import ensure_default_model

        folder = ensure_default_model()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    known = [json.loads(line)["arguments"] for line in lines]
    if not (names := [name for name in SETS if arguments(name) not in known]):
        return 0
    torch.set_num_threads(THREADS)
    head = surroundings("torch", "transformers", "peft")
    sets = {name: read(options.data) for name, read in SETS.items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    began_s = time.process_time()
    upper = Upper.of(model, tokenizer, sets)
    lower_ms = (time.process_time() - began_s) * 1e3 / sum(len(part.rows) for part in upper.parts.values())
    for name in names:
        line = {
            "label": name,
            **head,
            "arguments": arguments(name),
            "lower_cpu_ms": lower_ms,
            "results": measure(name, sets, upper),
        }
        append(options.results, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
