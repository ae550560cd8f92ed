"""One training run from an order to a folder: the order in which the parts of this package are called.

Must not know: how any of them works, the command line.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motet.adapters.checkpoint import MODEL_CONFIG
from motet.adapters.recipes import checkpoint, knowledge
from motet.adapters.recipes.corpus import Corpus, packed
from motet.adapters.recipes.episodes import Episodes
from motet.adapters.recipes.errors import OutputError, TargetError
from motet.adapters.recipes.items import marker_ids, with_markers
from motet.adapters.recipes.loop import Loop, Schedule, question_states
from motet.adapters.recipes.quality import label_tokens
from motet.adapters.recipes.starts import STARTS
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import examples, interleaved, named
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.recipes.users import encoder, users
from motet.adapters.source import CONFIG_FILE

UNFINISHED = ".training"
"""Sub-folder of the output while the run is not finished."""
SAMPLES = 128
SAMPLE_TOKENS = 128
"""Calibration: 28 times as many tokens as SmolLM2-135M has dimensions."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for. Two runs of equal orders on one machine give the same bytes.

    Attributes:
        task: a name of TASKS, or several joined by "+".
        threads: processors that torch computes on; sums split among them differently.
    """

    method: str
    task: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float
    batch: int
    seed: int
    threads: int

    def __post_init__(self) -> None:
        """Refuse what the method would have to ignore.

        Raises:
            TargetError: a rank, alpha or targets for a method that trains the base's own parameters.
        """
        given = (("--rank", self.rank), ("--alpha", self.alpha), ("--targets", ",".join(self.targets)))
        meaningless = [f"{option} {value}" for option, value in given if value]
        if meaningless and not RECIPES[self.method].targets:
            raise TargetError(f"{meaningless[0]} means nothing to {self.method!r}, which trains whole layers; drop it")


@dataclass(frozen=True, slots=True)
class Base:
    """The model to adapt, with its tokenizer, and what files call it. The model is given away: training changes it."""

    name: str
    model: Any
    tokenizer: Any

    def digest(self) -> str:
        """SHA-256 of the parameters."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().numpy().data)
        return digest.hexdigest()


def begin(order: Order, base: Base, data: Path) -> tuple[Trainee, Loop]:
    """Everything ready for the first step; a function of its arguments alone.

    Raises:
        RecipeError: the data is absent or too small, or a target cannot be adapted so.
    """
    torch.set_num_threads(order.threads)
    torch.manual_seed(order.seed)
    recipe = RECIPES[order.method]
    _check_targets(order, base)
    tasks = named(order.task)
    schedule = Schedule(order.steps, order.learning_rate, order.batch, order.seed)
    if recipe.episodes:
        episodes = Episodes.of(base.tokenizer, [examples(task, data, "train") for task in tasks])
        setup = Setup(base.model, recipe, order.rank, order.alpha, order.targets, base.name, list, episodes=episodes)
        return (trainee := STARTS[order.method](setup)), Loop(trainee, episodes, schedule)
    corpus = Corpus.of(base.tokenizer, interleaved(tasks, data, "train"))

    def samples() -> Sequence[torch.Tensor]:
        if recipe.calibration == "knowledge":
            texts = [question.statement + "\n\n" for question in knowledge.questions(data, "train")]
            pieces = [list(base.tokenizer(text)["input_ids"]) for text in texts]
        else:
            pieces = [asked + told for asked, told in corpus.rows]
        return packed(pieces, SAMPLES, SAMPLE_TOKENS, order.seed)

    def classes() -> Sequence[Sequence[int]]:
        choices = [task.choices for task in tasks if task.choices is not None]
        return label_tokens(base.tokenizer, choices) if len(choices) == len(tasks) else ()

    trainee = STARTS[order.method](
        Setup(
            base.model,
            recipe,
            order.rank,
            order.alpha,
            order.targets,
            base.name,
            samples,
            classes,
            encoder=lambda: encoder(tasks, data),
            markers=lambda: marker_ids(base.tokenizer),
            labels=(tasks[0].choices or ()) if len(tasks) == 1 else (),
            n_rows=len(corpus.rows),
        )
    )
    if trainee.for_users is not None:
        asking = users(tasks, data, "train")
        marked = [example for task in tasks for example in examples(task, data, "train", marked=True)]
        corpus = Corpus.of(with_markers(base.tokenizer), marked).personal(asking)
    return trainee, Loop(trainee, corpus, schedule)


def _check_targets(order: Order, base: Base) -> None:
    if not RECIPES[order.method].targets:
        return
    widths = {
        path: min(module.in_features, module.out_features)
        for path, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and module is not base.model.get_output_embeddings()
    }
    names = {path.rpartition(".")[2] for path in widths}
    if unknown := sorted(set(order.targets) - names):
        raise TargetError(f"--targets names {unknown[0]!r}; the base has {', '.join(sorted(names))}")
    chosen = {path: width for path, width in widths.items() if path.rpartition(".")[2] in order.targets}
    narrowest = min(chosen, key=chosen.__getitem__)
    if order.rank >= chosen[narrowest]:
        raise TargetError(
            f"--rank {order.rank} is not below {chosen[narrowest]}, the width of {narrowest!r}; lower it, or leave the "
            "target out"
        )


class Run:
    """A run with its output folder. Iterating does the steps that are left, keeping checkpoints, and then saves."""

    def __init__(self, order: Order, base: Base, data: Path, out: Path, *, resume: bool, keep_every: int) -> None:
        """Prepare, or go on from the last checkpoint.

        Args:
            keep_every: steps from one checkpoint to the next.

        Raises:
            RecipeError: the output folder is taken, or see `begin` and `checkpoint.take_up`.
        """
        self._order, self._out, self._keep_every = order, out, keep_every
        self._unfinished = out / UNFINISHED
        if (out / CONFIG_FILE).exists() or (out / MODEL_CONFIG).exists():
            raise OutputError(f"--out {out.name!r} holds an adapter already; name another folder, or remove it")
        if self._unfinished.exists() and not resume:
            raise OutputError(f"--out {out.name!r} holds an unfinished run; go on with --resume, or remove the folder")
        digest = base.digest()
        self.trainee, self.loop = begin(order, base, data)
        self._settings = {**asdict(order), "base": digest, "data": self.loop.corpus.digest()}
        if resume:
            self.loop.restore(checkpoint.take_up(self._unfinished, self._settings))

    def __iter__(self) -> Iterator[float]:
        self._unfinished.mkdir(parents=True, exist_ok=True)
        for loss in self.loop:
            if self.loop.done % self._keep_every == 0:
                checkpoint.keep(self._unfinished, self.loop.state(), self._settings)
            yield loss
        self.trainee.round_as_saved(getattr(torch, RECIPES[self._order.method].saved_dtype))
        if self.trainee.refit is not None:
            assert isinstance(self.loop.corpus, Corpus), "a head is refitted on questions"
            self.trainee.model.eval()
            self.trainee.refit(question_states(self.trainee, self.loop.corpus, self._order.batch))
        self.trainee.save(self._out)
        shutil.rmtree(self._unfinished)
