"""The tables of AMT's claim in docs/methods.md are those of the committed results."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

from tests.unit.test_methods_results import PAGE, results

MEMBERS = [f"member {number}" for number in range(4)]
NOISES = ("clean", "words dropped", "misspelt")
VALIDATION = "subjects-dev"

Classifiers = dict[str, dict[str, Any]]


def chosen(lines: list[dict[str, Any]]) -> str:
    """The member that is best on other questions of the subjects of the training."""
    (line,) = (line for line in lines if line["label"] == VALIDATION)
    found = line["results"]["clean"]["classifiers"]
    return max(MEMBERS, key=lambda name: found[name]["accuracy"])


def conditions(line: dict[str, Any]) -> dict[str, Classifiers]:
    """What was done to the texts → the classifiers."""
    found = {noise: line["results"][noise]["classifiers"] for noise in NOISES if noise in line["results"]}
    for strength, attacked in line["results"].get("attacked", {}).items():
        found[f"attacked, ε = {strength}"] = attacked["classifiers"]
    return found


def best(found: Classifiers) -> str:
    """The member that turned out best."""
    return max(MEMBERS, key=lambda name: found[name]["accuracy"])


def accuracy_table(lines: list[dict[str, Any]]) -> str:
    """Accuracy by domain and what was done to its texts."""
    single = chosen(lines)
    table = [
        f"| domain, texts | base | {single} | best member | all alike | highest score | merged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        for condition, found in conditions(line).items():
            names = ("base", single, best(found), "uniform", "best by score", "merged")
            cells = [f"{found[name]['accuracy']:.3f} ± {found[name]['standard_error']:.3f}" for name in names]
            cells[2] += f" ({best(found).removeprefix('member ')})"
            table.append(f"| {line['label']}, {condition} | {' | '.join(cells)} |")
    return "\n".join(table)


def difference_table(lines: list[dict[str, Any]]) -> str:
    """The merge less the others, episode by episode over all held-out domains."""
    single = chosen(lines)
    others = ("base", single, "uniform", "best by score")
    held_out = [line for line in lines if line["label"] != VALIDATION]
    table = [
        f"| merged less | base | {single} | all alike | highest score |",
        "| --- | --- | --- | --- | --- |",
    ]
    for noise in NOISES:
        cells = []
        for other in others:
            apart = [
                ours - theirs
                for line in held_out
                for ours, theirs in zip(
                    line["results"][noise]["classifiers"]["merged"]["episodes"],
                    line["results"][noise]["classifiers"][other]["episodes"],
                    strict=True,
                )
            ]
            cells.append(f"{fmean(apart):+.3f} ± {stdev(apart) / math.sqrt(len(apart)):.3f}")
        table.append(f"| {noise} | {' | '.join(cells)} |")
    return "\n".join(table)


def choice_table(lines: list[dict[str, Any]]) -> str:
    """How often each member is among the two that are merged."""
    table = ["| domain | " + " | ".join(NOISES) + " |", "| --- | --- | --- | --- |"]
    for line in lines:
        if line["label"] != VALIDATION:
            cells = (" · ".join(f"{share:.2f}" for share in line["results"][noise]["chosen_share"]) for noise in NOISES)
            table.append(f"| {line['label']} | {' | '.join(cells)} |")
    return "\n".join(table)


def test_the_tables_are_the_committed_results() -> None:
    lines, page = results("amt-cpu.jsonl"), PAGE.read_text()
    for table in (accuracy_table(lines), difference_table(lines), choice_table(lines)):
        assert table in page


def test_what_was_measured_is_what_is_served() -> None:
    for line in results("amt-cpu.jsonl"):
        assert line["results"]["served"]["texts"] > 0
        assert line["results"]["served"]["largest_alpha_difference"] <= 1e-4
        assert line["results"]["served"]["largest_probability_difference"] <= 1e-4
