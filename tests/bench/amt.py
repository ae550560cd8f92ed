"""AMT's claim: members merged by a support set beat the best single one on domains they have not seen.

Classifies episodes of each domain by nearness to class means, as /v1/classify does, with the base, every member, all
members alike, and the two best by their scores; texts clean, noisy, and attacked. First a server in this process must
find the same weights and labels for some episodes. One JSON line a domain; run it from the repository root:

    python -m tests.bench.amt --data DATA_DIR --results docs/results/amt-cpu.jsonl

Shapes: N queries, S support rows, C classes, D width.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.adapters.gates import merge
from tests.bench.amt_domains import HELD_OUT, NOISES, QUERIES, SHOTS, VALIDATION, Domain, Labelled, domain
from tests.bench.amt_network import Alpha, Network
from tests.bench.amt_served import Served, served
from tests.bench.claims import BASE_NAME
from tests.bench.lines import append, surroundings

POOL = Path("examples/adapters/subjects-amt")
EPISODES, ATTACKED_EPISODES, SERVED_EPISODES = 24, 8, 1
"""Of a domain: under each noise; attacked; asked of a server too."""
ATTACKED_QUERIES = 3
"""Of each class: an attack costs forty times as much as a classification."""
ATTACKED = ("subjects",)
STRENGTHS = (0.2, 0.4)
"""Of the attack, as a share of the mean norm of the token embeddings."""
THREADS = 1
NOISES_OF_VALIDATION = ("clean",)
BASE, UNIFORM, BEST_SCORE, MERGED = "base", "uniform", "best by score", "merged"
PARITY = 1e-4
"""Largest difference of a weight or probability between the server and this bench: float32 sums in other batches."""

Episode = tuple[list[Labelled], list[Labelled]]


def member_name(member: int) -> str:
    """What results call a member."""
    return f"member {member}"


def arguments(name: str) -> dict[str, Any]:
    """Everything that shapes a line."""
    shape = {"shots": SHOTS, "queries": QUERIES, "episodes": EPISODES}
    attacks = (
        {"episodes": ATTACKED_EPISODES, "queries": ATTACKED_QUERIES, "strengths": list(STRENGTHS)}
        if name in ATTACKED
        else None
    )
    noises = list(NOISES_OF_VALIDATION if name == VALIDATION else NOISES)
    merging = {"top_k": merge.DEFAULT_TOP_K, "beta": merge.DEFAULT_BETA, "gamma": merge.DEFAULT_GAMMA}
    return {
        "domain": name,
        **shape,
        "noises": noises,
        "attacks": attacks,
        "pool": POOL.name,
        **merging,
        "base": BASE_NAME,
    }


def numbered(rows: Sequence[Labelled]) -> torch.Tensor:
    """[N] int64: the place of each row's label in the order of first occurrence."""
    places = {label: place for place, label in enumerate(dict.fromkeys(label for _, label in rows))}
    return torch.tensor([places[label] for _, label in rows])


def right(features_ND: torch.Tensor, means_CD: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Share of the queries whose nearest class mean is their own."""
    return float((merge.similarities(features_ND, means_CD).argmax(1) == labels_N).float().mean())


def weighed(members: Sequence[torch.Tensor], labels_S: torch.Tensor, ways: int) -> merge.Merge:
    """The merge that a server makes of each member's features [S, D] of a support set, when it is told no more."""
    means = [merge.prototypes(features_SD, labels_S, ways) for features_SD in members]
    return merge.merged([merge.similarities(*pair) for pair in zip(members, means, strict=True)], labels_S)


def summary(accuracies: Sequence[float]) -> dict[str, Any]:
    """Mean over episodes, with its standard error."""
    error = stdev(accuracies) / math.sqrt(len(accuracies))
    return {
        "accuracy": fmean(accuracies),
        "standard_error": error,
        "episodes": [round(one, 4) for one in accuracies],
    }


def classified(network: Network, found: Domain, noise: str) -> dict[str, Any]:
    """Every classifier on the episodes of a domain, all texts under one noise."""
    change = NOISES[noise]
    texts = [change(text) for each in found.texts.values() for text in each]
    below = network.below(texts)
    ordered = list(below)
    place = {text: number for number, text in enumerate(ordered)}
    fixed: dict[str, Alpha] = {BASE: None, UNIFORM: tuple(merge.uniform(network.members).tolist())}
    fixed |= {member_name(member): network.alone(member) for member in range(network.members)}
    known = {name: network.features([below[text] for text in ordered], alpha) for name, alpha in fixed.items()}
    accuracies: dict[str, list[float]] = {name: [] for name in (*fixed, BEST_SCORE, MERGED)}
    alphas: list[list[float]] = []
    scores: list[list[float]] = []
    for support, queries in found.episodes(EPISODES):
        labels_S, labels_N = numbered(support), numbered(queries)
        rows_S = [place[change(text)] for text, _ in support]
        rows_N = [place[change(text)] for text, _ in queries]
        means = {name: merge.prototypes(every[rows_S], labels_S, found.ways) for name, every in known.items()}
        for name, every in known.items():
            accuracies[name].append(right(every[rows_N], means[name], labels_N))
        members = [known[member_name(member)][rows_S] for member in range(network.members)]
        made = weighed(members, labels_S, found.ways)
        alpha = tuple(made.alpha_P.tolist())
        accuracies[BEST_SCORE].append(accuracies[member_name(int(made.score_P.argmax()))][-1])
        features = network.features([below[ordered[row]] for row in rows_S + rows_N], alpha)
        means_CD = merge.prototypes(features[: len(rows_S)], labels_S, found.ways)
        accuracies[MERGED].append(right(features[len(rows_S) :], means_CD, labels_N))
        alphas.append(alpha)  # type: ignore[arg-type]
        scores.append(made.score_P.tolist())
    chosen = torch.tensor(alphas) > 0
    return {
        "classifiers": {name: summary(each) for name, each in accuracies.items()},
        "alpha_mean": torch.tensor(alphas).mean(0).tolist(),
        "chosen_share": chosen.float().mean(0).tolist(),
        "score_mean": torch.tensor(scores).mean(0).tolist(),
    }


def under_attack(network: Network, found: Domain) -> dict[str, Any]:
    """Every classifier on clean supports, its queries moved by its own gradient."""
    accuracies: dict[str, dict[str, list[float]]] = {f"{strength:g}": {} for strength in STRENGTHS}
    for support, every in found.episodes(ATTACKED_EPISODES):
        queries = [row for place, row in enumerate(every) if place % QUERIES < ATTACKED_QUERIES]
        labels_S, labels_N = numbered(support), numbered(queries)
        below = network.below([text for text, _ in support])
        near = [below[text] for text, _ in support]
        names: dict[str, Alpha] = {BASE: None}
        names |= {member_name(member): network.alone(member) for member in range(network.members)}
        names[UNIFORM] = tuple(merge.uniform(network.members).tolist())
        features = {name: network.features(near, alpha) for name, alpha in names.items()}
        means = {name: merge.prototypes(every, labels_S, found.ways) for name, every in features.items()}
        members = [features[member_name(member)] for member in range(network.members)]
        made = weighed(members, labels_S, found.ways)
        names[MERGED] = tuple(made.alpha_P.tolist())
        means[MERGED] = merge.prototypes(network.features(near, names[MERGED]), labels_S, found.ways)
        attacked = network.attacked(
            [text for text, _ in queries],
            labels_N,
            [(alpha, means[name]) for name, alpha in names.items()],
            STRENGTHS,
        )
        best = member_name(int(made.score_P.argmax()))
        for (name, _), moved in zip(names.items(), attacked, strict=True):
            for strength, features_ND in zip(accuracies, moved, strict=True):
                share = right(features_ND, means[name], labels_N)
                accuracies[strength].setdefault(name, []).append(share)
                if name == best:
                    accuracies[strength].setdefault(BEST_SCORE, []).append(share)
    return {
        strength: {"classifiers": {name: summary(each) for name, each in by_name.items()}}
        for strength, by_name in accuracies.items()
    }


async def agreement(network: Network, found: Domain, server: Served) -> dict[str, Any]:
    """The largest differences from what a server says of clean episodes.

    Raises:
        AssertionError: a label differs, or a number by more than PARITY.
    """
    apart_alpha, apart_probability, asked = 0.0, 0.0, 0
    for support, queries in found.episodes(SERVED_EPISODES):
        texts = [text for text, _ in queries]
        alpha, labels, probabilities_NC = await server.classified(support, texts)
        below = network.below([*(text for text, _ in support), *texts])
        near, labels_S = [below[text] for text, _ in support], numbered(support)
        members = [network.features(near, network.alone(member)) for member in range(network.members)]
        made = weighed(members, labels_S, found.ways)
        ours = tuple(made.alpha_P.tolist())
        means_CD = merge.prototypes(network.features(near, ours), labels_S, found.ways)
        features_ND = network.features([below[text] for text in texts], ours)
        expected_NC = merge.classify(features_ND, means_CD, network.scale)
        names = list(dict.fromkeys(label for _, label in support))
        assert labels == [names[number] for number in expected_NC.argmax(1).tolist()], found.name
        apart_alpha = max(apart_alpha, float((torch.tensor(alpha) - made.alpha_P).abs().max()))
        apart_probability = max(apart_probability, float((probabilities_NC - expected_NC).abs().max()))
        asked += len(texts)
    assert max(apart_alpha, apart_probability) <= PARITY, (found.name, apart_alpha, apart_probability)
    return {
        "texts": asked,
        "largest_alpha_difference": apart_alpha,
        "largest_probability_difference": apart_probability,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="amt", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("MOTET_DATA", "../shared/data"))
    parser.add_argument("--model", type=Path, help="folder of the base model; by default the default model")
    parser.add_argument("--pool", type=Path, default=POOL, help="folder of the pool")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to append to")
    options = parser.parse_args(argv)
    if (model := options.model) is None:
        from motet.server.model.default_model import ensure_default_model

        model = ensure_default_model()
    torch.set_num_threads(THREADS)
    asyncio.run(measured(model, options.pool, options.data, options.results))
    return 0


async def measured(model: Path, pool: Path, data: Path, out: Path) -> None:
    """Append a line for each domain that the results do not hold yet."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = Network(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer, pool)
    known = [json.loads(line)["arguments"] for line in out.read_text().splitlines()] if out.exists() else []
    async with served(model, pool) as server:
        for name in (VALIDATION, *HELD_OUT):
            if (shape := arguments(name)) in known:
                continue
            head, began_s = surroundings("torch", "transformers"), time.monotonic()
            found = domain(name, data, lambda text: len(network.ids(text)))
            results: dict[str, Any] = {"served": await agreement(network, found, server)}
            results |= {noise: classified(network, found, noise) for noise in shape["noises"]}
            if name in ATTACKED:
                results["attacked"] = under_attack(network, found)
            line = {
                "label": name,
                **head,
                "arguments": shape,
                "rows": {"labels": len(found.texts), "texts": sum(map(len, found.texts.values()))},
                "duration_s": round(time.monotonic() - began_s, 1),
                "results": results,
            }
            append(out, line)
            clean = results["clean"]["classifiers"].items()
            print(name, {classifier: round(each["accuracy"], 3) for classifier, each in clean}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
