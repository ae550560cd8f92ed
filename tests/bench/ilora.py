"""iLoRA's claim: a gate per user recommends better than one LoRA of equal rank. LastFM, five frozen candidates a row.

Every run trains alike and names the next artist for the same 122 users; one JSON line a run. Run it from the repository
root, alone on a core if it can be had; a run that the results hold already is left out:

    python -m tests.bench.ilora --data DATA_DIR --results docs/results/ilora-cpu.jsonl

Shapes: N users, K experts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters.recipes import lastfm
from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.ilora import UserGate
from motet.adapters.recipes.loop import held_out_losses
from motet.adapters.recipes.readers import History
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.scoring import answers
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import TASKS, prepared
from motet.adapters.recipes.trainee import Trainee
from tests.bench.claims import BASE_NAME
from tests.bench.machine import Machine

TASK = "lastfm"
SPLIT = "test"
STEPS, RATE, BATCH, RANK, ALPHA, THREADS = 150, 1e-3, 8, 8, 32, 1
"""LoRA's scale alpha/r is what iLoRA's becomes where all experts count alike."""
SCORED_AT_ONCE = 20


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        method: of RECIPES; None: the base model as it is, told the form of the answer.
    """

    method: str | None
    seed: int = 0

    @property
    def label(self) -> str:
        """A name for people."""
        return f"{self.method or 'base'}, seed {self.seed}"

    def order(self, method: str) -> Order:
        """The training, alike whatever the method."""
        targets = RECIPES["ilora"].targets
        return Order(method, TASK, RANK, ALPHA, targets, STEPS, RATE, BATCH, self.seed, THREADS)


PLAN: Sequence[Run] = (Run(None), Run("lora"), Run("ilora"))


def arguments(run: Run) -> dict[str, Any]:
    """Everything that shapes a run."""
    order = asdict(run.order(run.method)) if run.method else {"method": "base", "task": TASK, "seed": run.seed}
    rows = {"titles": lastfm.TITLES, "candidates": lastfm.CANDIDATES, "train_rows": lastfm.MOST_ROWS}
    return json.loads(json.dumps({**order, **rows, "split": SPLIT, "base": BASE_NAME}))  # type: ignore[no-any-return]


def named(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Greedy answers: which are a candidate's name (ValidRatio), and which of all are the right one's (HitRatio@1).

    LLaRA's code divides hits by valid answers and ranks runs by that times the ValidRatio, which is `hit_ratio` here.
    """
    said = [lastfm.said(text) for text in texts]
    valid = [
        name in {candidate.casefold() for candidate in row["candidates"]} for name, row in zip(said, rows, strict=True)
    ]
    hits = [name == row["answer"].casefold() for name, row in zip(said, rows, strict=True)]
    ratio = fmean(hits)
    return {
        "n": len(rows),
        "hit_ratio": ratio,
        "hit_ratio_standard_error": math.sqrt(ratio * (1 - ratio) / len(rows)),
        "valid_ratio": fmean(valid),
        "hits": "".join(str(int(hit)) for hit in hits),
    }


def ranked(trainee: Trainee, tokenizer: Any, rows: Sequence[dict[str, Any]], hint: str) -> dict[str, Any]:
    """Candidates by the likelihood of their names, which no wording of the answer can spoil.

    Returns:
        hit_ratio of the likeliest; loss of the right name among the five, by the softmax of their likelihoods; nll, of
        the right name's tokens.
    """
    examples = [(hint + lastfm.read(row)[0], candidate) for row in rows for candidate in row["candidates"]]
    corpus = Corpus.of(tokenizer, examples)
    if trainee.for_users is not None:
        corpus = corpus.personal([row["history"] for row in rows for _ in row["candidates"]])
    sums, counts = held_out_losses(trainee, corpus, SCORED_AT_ONCE)
    losses_NC = torch.tensor(sums).reshape(len(rows), -1)
    right_N = torch.tensor([row["candidates"].index(row["answer"]) for row in rows])
    chosen = torch.arange(len(rows)), right_N
    own_N = (-losses_NC).log_softmax(1)[chosen]
    hits = (losses_NC.argmin(1) == right_N).tolist()
    tokens = torch.tensor(counts).reshape(len(rows), -1)[chosen].sum()
    return {
        "hit_ratio": fmean(hits),
        "loss": float(-own_N.mean()),
        "loss_standard_error": float(own_N.std() / math.sqrt(len(rows))),
        "nll": float(losses_NC[chosen].sum() / tokens),
        "hits": "".join(str(int(hit)) for hit in hits),
        "row_losses": [round(-loss, 4) for loss in own_N.tolist()],
    }


@torch.inference_mode()
def spread(gate: UserGate, histories: Sequence[History]) -> dict[str, Any]:
    """How much ω [N, K] differs between users.

    Returns:
        entropy, mean over users, in nats; entropy_of_mean, of the mean user's ω: log K where experts are used alike;
        the difference is the information between user and expert. mean and standard deviation of each factor.
    """
    gate.eval()
    gate.see(histories)
    omega_NK = gate.factors_NK
    assert omega_NK is not None
    mean_K = omega_NK.mean(0)
    return {
        "entropy": float(_entropy(omega_NK).mean()),
        "entropy_of_mean": float(_entropy(mean_K)),
        "most": math.log(omega_NK.shape[1]),
        "mean": mean_K.tolist(),
        "standard_deviation": omega_NK.std(0).tolist(),
        "lowest": omega_NK.amin(0).tolist(),
        "highest": omega_NK.amax(0).tolist(),
    }


def _entropy(omega: torch.Tensor) -> torch.Tensor:
    return -torch.special.xlogy(omega, omega).sum(-1)


def measure(run: Run, model_folder: Path, data: Path) -> dict[str, Any]:
    """Train and judge."""
    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rows = prepared(TASKS[TASK], data, SPLIT)
    histories = [row["history"] for row in rows]
    trainee, hint = Trainee(model, {}, save=lambda _: None), TASKS[TASK].hint
    results: dict[str, Any] = {}
    if run.method is not None:
        trainee, loop = begin(run.order(run.method), Base(BASE_NAME, model, tokenizer), data)
        gate = getattr(trainee.model, "user_gate", None)
        before = None if gate is None else spread(gate, histories)
        began_s = time.perf_counter()
        results["training_losses"] = [round(loss, 4) for loss in loop]
        results["training_s"] = round(time.perf_counter() - began_s, 1)
        trainee.round_as_saved(getattr(torch, RECIPES[run.method].saved_dtype))
        results["parameters"] = sum(parameter.numel() for parameter in trainee.trainable.values())
        if gate is not None:
            results["factors"] = {"before": before, "after": spread(gate, histories)}
            others = histories[1:] + histories[:1]
            strangers = [{**row, "history": other} for row, other in zip(rows, others, strict=True)]
            results["ranked_by_another_users_gate"] = ranked(trainee, tokenizer, strangers, "")
        hint = ""

    def tell(numbers: Sequence[int]) -> None:
        if trainee.for_users is not None:
            trainee.for_users([histories[number] for number in numbers])

    questions = [hint + lastfm.read(row)[0] for row in rows]
    texts, _ = answers(trainee.model, tokenizer, TASKS[TASK], questions, before=tell)
    results["answers"] = named(texts, rows)
    results["first_answers"] = texts[:5]
    results["ranked"] = ranked(trainee, tokenizer, rows, hint)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ilora", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MOTET_DATA", "../shared/data"))
    parser.add_argument("--model", type=Path, help="folder of the base model; by default the default model")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to append to")
    parser.add_argument("--until", type=float, metavar="SECONDS", help="start no run later than this after the start")
    options = parser.parse_args(argv)
    if (model := options.model) is None:
        from motet.server.model.default_model import ensure_default_model

        model = ensure_default_model()
    start_s = time.monotonic()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    known = [json.loads(line)["arguments"] for line in lines]
    for run in PLAN:
        if arguments(run) in known:
            continue
        if options.until is not None and time.monotonic() - start_s > options.until:
            break
        load_before, machine = os.getloadavg(), asdict(Machine.here())
        results = measure(run, model, options.data)
        line = {
            "label": run.label,
            "utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": arguments(run),
            "machine": machine,
            "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
            "load_before": load_before,
            "results": results,
        }
        with options.results.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        print(run.label, {name: results[name]["hit_ratio"] for name in ("answers", "ranked")}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
