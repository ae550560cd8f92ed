"""`motet train`: makes an adapter by one of the recipes.

Must not know: how anything is trained. What needs torch or PEFT is imported when the command runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import JOINED, TASKS, named
from motet.server.commands.terminal import console, errors, facts, stage

if TYPE_CHECKING:
    from motet.adapters.recipes.run import Base

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the default model is called where it comes from."""
DEFAULT_DATA = Path("../shared/data")
PACKAGES = ("peft", "scipy")
"""The extra `train`."""

Item = TypeVar("Item")


def _methods() -> str:
    """The table of the help text."""
    width = max(map(len, RECIPES))
    return "\n".join(f"  {name:<{width}}  {recipe.summary}" for name, recipe in RECIPES.items())


def _tasks(_context: click.Context, _option: click.Parameter, value: str) -> str:
    try:
        named(value)
    except DataError as error:
        raise click.BadParameter(str(error)) from error
    return value


# \b keeps click from filling the lines of the table.
@click.command(help="Train an adapter with a recipe, on a CPU.\n\n\b\nMETHOD is one of\n" + _methods())
@click.argument("method", type=click.Choice(list(RECIPES)), metavar="METHOD")
@click.option(
    "--task",
    callback=_tasks,
    required=True,
    metavar="TASK[+TASK…]",
    help=f"What to learn: {', '.join(TASKS)}, or several of them at once.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the adapter.")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    envvar="MOTET_MODEL",
    help="Folder of the base model; by default the default model.",
)
@click.option(
    "--base-name", help="What the adapter calls its base; by default the model's public or its folder's name."
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA,
    show_default=True,
    envvar="MOTET_DATA",
    help="Folder of the tasks' data.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Rank of every target.  [default: the recipe's]")
@click.option("--alpha", type=click.IntRange(min=1), help="Scale times rank.  [default: the recipe's]")
@click.option("--targets", help="Last names of linear layers, joined by commas.  [default: the recipe's]")
@click.option("--steps", type=click.IntRange(min=1), help="[default: the recipe's]")
@click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="Highest learning rate.  [default: the recipe's]"
)
@click.option("--batch", type=click.IntRange(min=1), help="Rows of a step.  [default: the recipe's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is random.")
@click.option("--threads", type=click.IntRange(min=1), help="Processors to compute on.  [default: all]")
@click.option("--checkpoint-every", type=click.IntRange(min=1), default=25, show_default=True, metavar="STEPS")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint; the options must be the same.")
@click.option("--score", "n_rows", type=click.IntRange(min=1), help="Then answer this many test rows: scores.json.")
def train(
    method: str,
    task: str,
    out: Path,
    model: Path | None,
    base_name: str | None,
    data: Path,
    rank: int | None,
    alpha: int | None,
    targets: str | None,
    steps: int | None,
    lr: float | None,
    batch: int | None,
    seed: int,
    threads: int | None,
    checkpoint_every: int,
    resume: bool,
    n_rows: int | None,
) -> None:
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise click.ClickException(
            f'training needs the package {missing[0]}, which is not installed; pip install "motet[train]"'
        )
    from motet.adapters.recipes import run, scorecard

    recipe = RECIPES[method]
    if n_rows and recipe.episodes:
        raise click.BadParameter(
            f"{method} makes no answers: its members tell texts apart by examples; drop it", param_hint="--score"
        )
    order = run.Order(
        method=method,
        task=task,
        rank=rank or recipe.rank,
        alpha=alpha or recipe.alpha,
        targets=tuple(targets.split(",")) if targets else recipe.targets,
        steps=steps or recipe.steps,
        learning_rate=lr or recipe.learning_rate,
        batch=batch or recipe.batch,
        seed=seed,
        threads=threads or len(os.sched_getaffinity(0)),
    )
    with _quiet():
        exams = [scorecard.Exam.of(part, data, n_rows) for part in named(task)] if n_rows else []
        base = _base(model, base_name)
        track = _tracked("the base answers")
        base_results = [exam.taken_by(base.model, base.tokenizer, track, told=True) for exam in exams]
        stage(f"preparing {method}")
        running = run.Run(order, base, data, out, resume=resume, keep_every=checkpoint_every)
        _follow(running, running.loop.done, order.steps)
        track, trainee = _tracked("the adapter answers"), running.trainee
        taught = trainee.model, base.tokenizer, track
        results = [
            exam.taken_by(*taught, told=False, for_users=trainee.for_users, classify=trainee.classify) for exam in exams
        ]
        if exams:
            scorecard.write(out, order, exams, base_results, results)
    losses = running.loop.losses
    rows = [("adapter", str(out)), ("loss", f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last")]
    for part, result in zip(task.split(JOINED), results, strict=False):  # none without --score
        heading = f"{part} " if JOINED in task else ""
        rows += [(heading + name, f"{value:.4f}") for name, value in result.scores.items()]
    console.print(facts(rows))


def _base(folder: Path | None, name: str | None) -> Base:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from motet.adapters.recipes.run import Base
    from motet.server.model.default_model import ensure_default_model

    place = ensure_default_model() if folder is None else folder
    name = name or (DEFAULT_BASE if folder is None else folder.resolve().name)
    stage(f"loading {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--model {name!r} cannot be loaded: {error}") from error
    return Base(name, model, tokenizer)


def _follow(losses: Iterable[float], done: int, steps: int) -> None:
    """Do the steps with a bar, or with a line now and then where standard error is no terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("training", total=steps, completed=done)
        for step, loss in enumerate(losses, start=done + 1):
            progress.update(bar, completed=step, description=f"training  loss {loss:.3f}")
            if not errors.is_terminal and step % 25 == 0:
                stage(f"step {step} of {steps}: loss {loss:.3f}")


def _tracked(text: str) -> Callable[[Sequence[Item]], Iterator[Item]]:
    def track(items: Sequence[Item]) -> Iterator[Item]:
        with Progress(console=errors, disable=not errors.is_terminal) as progress:
            yield from progress.track(items, description=text)

    return track


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the libraries say about themselves."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT on a newer transformers
        yield
