"""docs/methods.md names every method and recipe that exists, and its figures are those of the committed results."""

from __future__ import annotations

import json
import math
import re
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


def runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CLAIMS.read_text().splitlines()]


def claims_table(results: list[dict[str, Any]]) -> str:
    """One row a run: how fast it learnt, what it forgot, the shape of its change."""
    lora = {
        (run["arguments"]["learning_rate"], run["arguments"]["seed"]): run["results"]["held_out"]["150"]["row_losses"]
        for run in results
        if run["arguments"]["method"] == "lora"
    }
    lines = [
        "| method, learning rate | held-out loss after 10, 25, 50, 100, 150 steps | less LoRA's, per answer "
        "| ARC-Easy accuracy | loss of its right answers | stable rank |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in sorted(results, key=lambda run: (run["arguments"]["learning_rate"], run["arguments"]["seed"])):
        arguments, found = run["arguments"], run["results"]
        rate, seed = arguments["learning_rate"], arguments["seed"]
        is_base = arguments["method"] == "base"
        name = "base model" if is_base else f"{arguments['method']}, {rate:g}" + (f", seed {seed}" if seed else "")
        held_out = found["held_out"]
        losses = f"{held_out['0']['loss']:.2f}" if is_base else ", ".join(f"{held_out[s]['loss']:.2f}" for s in STEPS)
        paired = "" if is_base else difference(held_out["150"]["row_losses"], lora.get((rate, seed)))
        known = found["knowledge"]
        stable = "" if is_base else f"{found['change']['stable_rank']:.2f}"
        accuracy = f"{known['accuracy']:.3f} ± {known['accuracy_standard_error']:.3f}"
        nll = f"{known['answer_nll']:.2f} ± {known['answer_nll_standard_error']:.2f}"
        lines.append(f"| {name} | {losses} | {paired} | {accuracy} | {nll} | {stable} |")
    return "\n".join(lines)


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
    assert all(not run["machine"]["git_dirty"] for run in results)
    same = [{**run["arguments"], "method": 0, "alpha": 0, "learning_rate": 0, "seed": 0} for run in results]
    assert all(arguments == same[0] for arguments in same)


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
