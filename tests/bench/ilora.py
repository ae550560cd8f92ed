"""iLoRA's claim: a gate per user recommends better than one LoRA of equal rank. LastFM, five frozen candidates a row.

Every run trains alike and names the next artist for the same 122 users; one JSON line a run. LLaRA is iLoRA without its
gate, LoRA without its projector too; SASRec alone ranks without any text. Run it from the repository root; a run that
the results hold already is left out:

    python -m tests.bench.ilora --data DATA_DIR --results docs/results/ilora-cpu.jsonl

Shapes: N users, K experts.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters.gates.sasrec import Sasrec
from motet.adapters.recipes import lastfm
from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.forward import answer_losses
from motet.adapters.recipes.ilora import UserGate
from motet.adapters.recipes.items import with_markers
from motet.adapters.recipes.readers import User, unmarked
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.scoring import answers
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import TASKS, prepared
from motet.adapters.recipes.trainee import Trainee
from tests.bench.claims import BASE_NAME
from tests.bench.plan import Plan

TASK = "lastfm"
SPLIT = "test"
STEPS, RATE, BATCH, RANK, ALPHA, THREADS = 100, 1e-3, 8, 8, 32, 1
"""LoRA's scale alpha/r is what iLoRA's becomes where all experts count alike."""
BASE, SASREC = "base", "sasrec"
SEEN_ROWS = 1500
"""Training rows on which SASRec is looked at too: it was trained on them."""


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        method: of RECIPES; BASE: the base model as it is, told the form of the answer; SASREC: SASRec without text.
    """

    method: str
    seed: int = 0

    @property
    def label(self) -> str:
        """A name for people."""
        return f"{self.method}, seed {self.seed}"

    @property
    def order(self) -> Order:
        """The training, alike whatever the method."""
        targets = RECIPES["ilora"].targets
        return Order(self.method, TASK, RANK, ALPHA, targets, STEPS, RATE, BATCH, self.seed, THREADS)


PLAN: Sequence[Run] = (
    Run(SASREC),
    Run(BASE),
    *(Run(method, seed) for seed in (0, 1) for method in ("ilora", "lora", "llara")),
)


def arguments(run: Run) -> dict[str, Any]:
    """Everything that shapes a run."""
    order = asdict(run.order) if run.method in RECIPES else {"method": run.method, "task": TASK, "seed": run.seed}
    rows = {"titles": lastfm.TITLES, "candidates": lastfm.CANDIDATES, "train_rows": lastfm.MOST_ROWS}
    return json.loads(json.dumps({**order, **rows, "split": SPLIT, "base": BASE_NAME}))  # type: ignore[no-any-return]


def rate(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits, its standard error, and which they are."""
    ratio = fmean(hits)
    return {
        "hit_ratio": ratio,
        "hit_ratio_standard_error": math.sqrt(ratio * (1 - ratio) / len(hits)),
        "hits": "".join(str(int(hit)) for hit in hits),
    }


def named(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Greedy answers: which are a candidate's name (ValidRatio), and which of all are the right one's (HitRatio@1).

    LLaRA's code divides hits by valid answers and ranks runs by that times the ValidRatio, which is `hit_ratio` here.
    """
    said = [lastfm.said(text) for text in texts]
    valid = [
        name in {candidate.casefold() for candidate in row["candidates"]} for name, row in zip(said, rows, strict=True)
    ]
    hits = [name == row["answer"].casefold() for name, row in zip(said, rows, strict=True)]
    return {"n": len(rows), **rate(hits), "valid_ratio": fmean(valid)}


@torch.inference_mode()
def ranked(
    model: Any, tokenizer: Any, questions: Sequence[str], rows: Sequence[dict[str, Any]], tell: Callable[[int], None]
) -> dict[str, Any]:
    """Candidates by the likelihood of their names, which no wording of the answer can spoil.

    Args:
        tell: called with a row's number before its forward.

    Returns:
        hit_ratio of the likeliest; loss of the right name among the five, by the softmax of their likelihoods; nll, of
        the right name's tokens.
    """
    model.eval()
    hits, losses, right_sum, right_tokens = [], [], 0.0, 0
    for number, (question, row) in enumerate(zip(questions, rows, strict=True)):
        corpus = Corpus.of(tokenizer, [(question, candidate) for candidate in row["candidates"]])  # one prefix
        tell(number)
        tokens = [len(told) for _, told in corpus.rows]
        all_losses = answer_losses(model, corpus.prefix, corpus.batch(range(len(tokens))))
        sum_C = torch.stack([part.sum() for part in torch.split(all_losses, tokens)])
        right = row["candidates"].index(row["answer"])
        hits.append(int(sum_C.argmin()) == right)
        losses.append(-float((-sum_C).log_softmax(0)[right]))
        right_sum, right_tokens = right_sum + float(sum_C[right]), right_tokens + tokens[right]
    return {
        **rate(hits),
        "loss": fmean(losses),
        "loss_standard_error": stdev(losses) / math.sqrt(len(losses)),
        "nll": right_sum / right_tokens,
        "row_losses": [round(loss, 4) for loss in losses],
    }


@torch.inference_mode()
def spread(gate: UserGate, users: Sequence[User]) -> dict[str, Any]:
    """How much ω [N, K] differs between users.

    Returns:
        entropy, mean over users, in nats; entropy_of_mean, of the mean user's ω: log K where experts are used alike;
        the difference is the information between user and expert. mean and standard deviation of each factor.
    """
    gate.eval()
    gate.see(users)
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


def alone(data: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the ids say without any text.

    Returns:
        hit ratios of the candidate that SASRec ranks first; whose embedding, which is all that a projector reads, is
        the most like the mean of the history's; and whose id is the nearest to one of the history.
    """
    tensors = load_file(data / lastfm.ENCODER)
    head = {part: tensors.pop(f"s_fc.{part}") for part in ("weight", "bias")}
    item_ND, places = tensors["item_embeddings.weight"], len(tensors["positional_embeddings.weight"])
    sasrec = Sasrec(tensors, len(item_ND) - 1, places)
    found: dict[str, list[bool]] = {"sasrec": [], "embedding": [], "nearest_id": []}
    unit_ND = torch.nn.functional.normalize(item_ND, dim=1)
    for row in rows:
        history, offered = (torch.tensor(ids) for ids in row["user"])
        right = row["candidates"].index(row["answer"])
        scores_I = head["weight"] @ sasrec.states([row["user"].history])[0] + head["bias"]
        found["sasrec"].append(int(scores_I[offered].argmax()) == right)
        found["embedding"].append(int((unit_ND[offered] @ unit_ND[history].mean(0)).argmax()) == right)
        distance_C = (offered[:, None] - history).abs().amin(1)
        found["nearest_id"].append(int(distance_C.argmin()) == right)
    ratios = {name: rate(hits) for name, hits in found.items()}
    return {name: {part: ratio[part] for part in ratio if part != "hits"} for name, ratio in ratios.items()}


def measure(run: Run, model_folder: Path, data: Path) -> dict[str, Any]:
    """Train and judge."""
    torch.set_num_threads(THREADS)
    rows = prepared(TASKS[TASK], data, SPLIT)
    if run.method == SASREC:
        seen = prepared(TASKS[TASK], data, "train")[:SEEN_ROWS]
        return {SPLIT: alone(data, rows), "train": alone(data, seen)}
    users = [row["user"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    trainee, hint = Trainee(model, {}, save=lambda _: None), TASKS[TASK].hint
    results: dict[str, Any] = {}
    gate: UserGate | None = None
    if run.method != BASE:
        trainee, loop = begin(run.order, Base(BASE_NAME, model, tokenizer), data)
        gate, hint = getattr(trainee.model, "user_gate", None), ""
        before = gate and spread(gate, users)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        results["training_losses"] = [round(loss, 4) for loss in loop]
        results["training_s"] = round(time.perf_counter() - began_s, 1)
        results["training_cpu_s"] = round(time.process_time() - began_cpu_s, 1)
        trainee.round_as_saved(getattr(torch, RECIPES[run.method].saved_dtype))
        results["parameters"] = sum(parameter.numel() for parameter in trainee.trainable.values())
        results["factors"] = gate and {"before": before, "after": spread(gate, users)}
    questions = [hint + lastfm.read(row)[0] for row in rows]
    if trainee.for_users is None:
        questions = [unmarked(question) for question in questions]
    else:
        tokenizer = with_markers(tokenizer)

    def tell(numbers: Sequence[int], stranger: int = 0) -> None:
        if trainee.for_users is not None:
            trainee.for_users([users[number] for number in numbers])
        if gate is not None and stranger:
            gate.see([users[(number + stranger) % len(users)] for number in numbers])

    texts, _ = answers(trainee.model, tokenizer, TASKS[TASK], questions, before=tell)
    results["answers"] = named(texts, rows)
    results["ranked"] = ranked(trainee.model, tokenizer, questions, rows, lambda number: tell([number]))
    if run.method == "ilora":
        results["ranked_by_another_users_gate"] = ranked(
            trainee.model, tokenizer, questions, rows, lambda number: tell([number], stranger=1)
        )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    return Plan(
        "ilora",
        __doc__ or "",
        PLAN,
        label=lambda run: run.label,
        arguments=arguments,
        measure=measure,
        tell=lambda found: {name: found[name]["hit_ratio"] for name in ("answers", "ranked") if name in found},
    ).carry_out(argv)


if __name__ == "__main__":
    sys.exit(main())
