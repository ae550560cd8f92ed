"""A base model prepared for training by some method, as the loop and the files see it.

Must not know: which methods there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motet.adapters.recipes.episodes import Episodes
from motet.adapters.recipes.readers import User
from motet.adapters.recipes.table import Recipe


@dataclass(frozen=True, slots=True)
class Setup:
    """What a method starts from.

    Attributes:
        model: a float32 causal language model of transformers, the caller's to give away: methods change it.
        recipe: the row of the table; rank, alpha and targets below go before its own.
        base_name: what the saved files call the base.
        samples: [1, T] token ids to calibrate with, made when asked for.
        classes: of each task the token ids of its label words, made when asked for; none where a task has no such.
        encoder: the weights of the network that reads the histories of the task's users, made when asked for.
        markers: token ids of MARKERS, made when asked for.
        labels: the answers of the task where it is one task and has a list of them.
        n_rows: that there are to learn from.
        episodes: the rows of the task as texts with a label; None where they are questions to answer.
    """

    model: Any
    recipe: Recipe
    rank: int
    alpha: int
    targets: tuple[str, ...]
    base_name: str
    samples: Callable[[], Sequence[torch.Tensor]]
    classes: Callable[[], Sequence[Sequence[int]]] = tuple
    encoder: Callable[[], Mapping[str, torch.Tensor]] = dict
    markers: Callable[[], Sequence[int]] = tuple
    labels: tuple[str, ...] = ()
    n_rows: int = 0
    episodes: Episodes | None = None


@dataclass(frozen=True, slots=True)
class Trainee:
    """A model in training.

    Attributes:
        model: the causal language model, the adapter inside it.
        trainable: the tensors that training changes, by the names of the saved file.
        save: writes the folder in the method's own layout.
        correct_gradients: called between clipping and the optimiser's step.
        before_step: called before each step with the number of steps done and of all; may freeze tensors and unfreeze
            them. What it does depends on nothing else that changes, so that a run can be taken up.
        further_loss: of the logits float32 [N, V] and labels [N] of a step's answer tokens; added to their mean cross
            entropy.
        objective: of the states float32 [N, D] before a step's answer tokens and of those tokens [N]; descended instead
            of the vocabulary's cross entropy.
        refit: called after the last step with the state float32 [rows, D] at the end of every row's question; sets
            trained tensors once more.
        classify: of such states the logit of each label [N, C]; None where the vocabulary's head answers.
        kept: further tensors that the next step depends on, changed in place.
        rates: by the name of a trained tensor its share of the learning rate; 1 where it is absent.
        for_users: called before every forward, in training or not, with each row's user; None where the model does
            not depend on users. Where it does, it reads marked questions.
        own_loss: of the rows of a step, by their numbers, in place of the cross entropy of answers; gradients reach the
            trained tensors.
        turns: steps in a row that see the same rows.
    """

    model: Any
    trainable: Mapping[str, nn.Parameter]
    save: Callable[[Path], None]
    correct_gradients: Callable[[], None] = lambda: None
    before_step: Callable[[int, int], None] = lambda *_: None
    further_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    objective: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    refit: Callable[[torch.Tensor], None] | None = None
    classify: Callable[[torch.Tensor], torch.Tensor] | None = None
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    for_users: Callable[[Sequence[User]], None] | None = None
    own_loss: Callable[[Sequence[int]], torch.Tensor] | None = None
    turns: int = 1

    def round_as_saved(self, dtype: torch.dtype) -> None:
        """Make the trained tensors what a file of this dtype gives back."""
        with torch.no_grad():
            for parameter in self.trainable.values():
                parameter.copy_(parameter.to(dtype))
