"""docs/methods.md names every method and recipe that exists, and its figures are those of the committed results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import pytest

from motet.adapters.methods import METHODS
from motet.adapters.recipes.table import RECIPES
from motet.server.cli import cli

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"
CLAIMS = ROOT / "docs" / "results" / "claims-cpu.jsonl"
STEPS = ("10", "25", "50", "100", "150")
OTHER_PARAMETERS: dict[str, dict[str, Any]] = {
    "lisa": {"rank": 0, "targets": []},
    "full": {"rank": 0, "targets": []},
    "s2ft": {"targets": ["down_proj"]},
}
"""Methods that do not train q_proj and v_proj at the others' rank, and what their runs' arguments say instead."""


def runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CLAIMS.read_text().splitlines()]


def final_losses(run: dict[str, Any]) -> list[float]:
    """Summed loss of each held-out answer after the last step."""
    return run["results"]["held_out"]["150"]["row_losses"]  # type: ignore[no-any-return]


def known_cells(run: dict[str, Any]) -> str:
    """Accuracy on ARC-Easy, and the loss of its right answers."""
    known = run["results"]["knowledge"]
    accuracy = f"{known['accuracy']:.3f} ± {known['accuracy_standard_error']:.3f}"
    return f"{accuracy} | {known['answer_nll']:.2f} ± {known['answer_nll_standard_error']:.2f}"


def claims_table(results: list[dict[str, Any]]) -> str:
    """One row a run of the methods with a rank: how fast it learnt, what it forgot, the shape of its change."""
    lora = {
        (run["arguments"]["learning_rate"], run["arguments"]["seed"]): final_losses(run)
        for run in results
        if run["arguments"]["method"] == "lora"
    }
    lines = [
        "| method, learning rate | held-out loss after 10, 25, 50, 100, 150 steps | less LoRA's, per answer "
        "| ARC-Easy accuracy | loss of its right answers | stable rank |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in in_order(run for run in results if run["arguments"]["method"] not in OTHER_PARAMETERS):
        arguments, found = run["arguments"], run["results"]
        rate, seed = arguments["learning_rate"], arguments["seed"]
        is_base = arguments["method"] == "base"
        name = "base model" if is_base else f"{arguments['method']}, {rate:g}" + (f", seed {seed}" if seed else "")
        held_out = found["held_out"]
        losses = f"{held_out['0']['loss']:.2f}" if is_base else ", ".join(f"{held_out[s]['loss']:.2f}" for s in STEPS)
        paired = "" if is_base else difference(final_losses(run), lora.get((rate, seed)))
        stable = "" if is_base else f"{found['change']['stable_rank']:.2f}"
        lines.append(f"| {name} | {losses} | {paired} | {known_cells(run)} | {stable} |")
    return "\n".join(lines)


def other_parameters_table(results: list[dict[str, Any]]) -> str:
    """One row a run that trains other parameters than LoRA's targets, beside LoRA at its better rate."""
    loras = [run for run in results if run["arguments"]["method"] == "lora" and run["arguments"]["seed"] == 0]
    best = min(loras, key=lambda run: run["results"]["held_out"]["150"]["loss"])
    lines = [
        "| method, learning rate | parameters at a time | held-out loss after 10, 25, 50, 100, 150 steps | as saved "
        f"| less LoRA's at {best['arguments']['learning_rate']:g}, per answer | ARC-Easy accuracy "
        "| loss of its right answers | stable rank |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in in_order(run for run in results if run["arguments"]["method"] in OTHER_PARAMETERS):
        arguments, found = run["arguments"], run["results"]
        losses = ", ".join(f"{found['held_out'][step]['loss']:.2f}" for step in STEPS)
        cells = (
            f"{arguments['method']}, {arguments['learning_rate']:g}",
            f"{found['parameters']['at_once'] / 1e6:.1f} million",
            losses,
            f"{found['held_out_as_saved']:.2f}",
            difference(final_losses(run), final_losses(best)),
            known_cells(run),
            f"{found['change']['stable_rank']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def in_order(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By learning rate and seed; what is equal stays as it was measured."""
    return sorted(results, key=lambda run: (run["arguments"]["learning_rate"], run["arguments"]["seed"]))


def difference(ours: list[float], theirs: list[float] | None) -> str:
    """Mean difference of an answer's summed loss, in nats, with its standard error."""
    if theirs is None or ours == theirs:
        return ""
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((each - mean) ** 2 for each in differences) / (len(differences) - 1)
    return f"{mean:+.2f} ± {math.sqrt(variance / len(differences)):.2f}"


def test_every_method_has_a_row() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", PAGE.read_text(), re.M)
    named = " ".join(rows).lower().replace("-", "").replace("²", "2")
    aliases = {"full-model": "s2ft", "corda-model": "corda", "residual-lora": "residual"}
    for method in METHODS:
        assert aliases.get(method.NAME, method.NAME).replace("_", "") in named, method.NAME


def test_every_recipe_is_named_and_no_other() -> None:
    """The recipe column lists exactly the recipes, after one `motet train` per row."""
    cells = [line.split(" | ")[-1] for line in PAGE.read_text().splitlines() if "`motet train" in line and "|" in line]
    named = {name.removeprefix("motet train ") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert named == RECIPES.keys()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`motet ([a-z-]+(?: [a-z-]+)?)", PAGE.read_text()))))
def test_every_command_exists(command: str) -> None:
    group: click.Command = cli
    for word in command.split():
        if not isinstance(group, click.Group):
            break
        found = group.get_command(click.Context(group), word)
        assert found is not None, word
        group = found


def test_the_claims_are_the_committed_results() -> None:
    results = runs()
    assert {"base", "lora", "pissa", "corda-ipm", "corda-kpm", "polar"} <= {
        run["arguments"]["method"] for run in results
    }
    assert claims_table(results) in PAGE.read_text()
    assert other_parameters_table(results) in PAGE.read_text()
    assert all(not run["machine"]["git_dirty"] for run in results)
    compared = {"method": 0, "alpha": 0, "learning_rate": 0, "seed": 0}
    same = [{**run["arguments"], **compared} for run in results]
    for run, arguments in zip(results, same, strict=True):
        own = OTHER_PARAMETERS.get(run["arguments"]["method"], {})
        assert arguments == {**same[0], **own}


def test_the_decision_on_centring_quotes_the_committed_errors() -> None:
    (line,) = (ROOT / "docs" / "results" / "centred-bf16.jsonl").read_text().splitlines()
    run = json.loads(line)
    assert not run["machine"]["git_dirty"]
    page = (ROOT / "docs" / "adr" / "0007-residual-adapters-are-centred.md").read_text()
    names = {
        "stacked": "stacked",
        "centred": "centred",
        "residual": "what the trainer's own bfloat16 W − s·B0 A0 loses",
    }
    for key, name in names.items():
        cells = " | ".join(f"{row[key]:.1e}".replace("e-0", "e-") for row in run["results"])
        assert f"| {name} | {cells} |" in page
