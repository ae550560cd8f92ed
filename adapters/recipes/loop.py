"""The training loop that all methods share: warm-up and cosine, clipping, AdamW, one state that can be kept.

Must not know: methods, tasks, files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.episodes import Episodes
from motet.adapters.recipes.forward import answer_losses, answer_states
from motet.adapters.recipes.trainee import Trainee

WARMUP_SHARE = 0.05
"""Of the steps; at least one step."""
LARGEST_NORM = 1.0
"""The gradient of all trained tensors together is clipped to it."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of each tensor."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, how fast, in which order.

    Attributes:
        learning_rate: at its highest.
        seed: of the order of the rows.
    """

    steps: int
    learning_rate: float
    batch: int
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a line up, then half a cosine down."""
        warmup = max(1, round(WARMUP_SHARE * self.steps))
        return self.learning_rate * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, slots=True)
class State:
    """All that the next step depends on, beside the schedule.

    Attributes:
        losses: of each step that is done.
        tensors: the trained tensors, what else the trainee keeps, and the optimiser's moments, by name.
    """

    losses: tuple[float, ...]
    tensors: Mapping[str, torch.Tensor]


class Loop:
    """One training run. Iterating does the steps that are left, and yields the loss of each once it is done."""

    def __init__(self, trainee: Trainee, corpus: Corpus | Episodes, schedule: Schedule, autocast: bool = True) -> None:
        """Nothing is computed yet.

        Args:
            corpus: of episodes where the trainee has a loss of its own.
            autocast: products in bfloat16, 1.7 times as fast on a processor that has them. Weights, of PiSSA's and
                CorDA's remainder too, trained tensors and the optimiser's state stay float32: only the rounding of
                each product differs.
        """
        self._trainee, self.corpus, self._schedule, self._autocast = trainee, corpus, schedule, autocast
        by_share: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in trainee.trainable.items():
            by_share.setdefault(trainee.rates.get(name, 1.0), []).append(parameter)
        groups = [{"params": parameters, "share": share} for share, parameters in by_share.items()]
        self._optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, weight_decay=0.0)
        self._losses: list[float] = []

    @property
    def done(self) -> int:
        """Steps done."""
        return len(self._losses)

    @property
    def losses(self) -> tuple[float, ...]:
        """Of each step done: the mean loss of an answer token, or the trainee's own."""
        return tuple(self._losses)

    def __iter__(self) -> Iterator[float]:
        schedule = self._schedule
        draws = self.corpus.draws(-(-schedule.steps // self._trainee.turns), schedule.batch, schedule.seed)
        repeated = (numbers for numbers in draws for _ in range(self._trainee.turns))
        for numbers in islice(repeated, self.done, schedule.steps):
            for group in self._optimizer.param_groups:
                group["lr"] = group["share"] * schedule.rate(self.done)
            self._trainee.before_step(self.done, schedule.steps)
            self._forget_frozen()
            self._trainee.model.train()
            if self._trainee.for_users is not None:
                assert isinstance(self.corpus, Corpus), "episodes have no users"
                self._trainee.for_users(self.corpus.users_of(numbers))
            loss, total = self._losses_of(numbers)
            total.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self._trainee.trainable.values(), LARGEST_NORM)
            self._trainee.correct_gradients()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._losses.append(loss.item())
            yield self._losses[-1]

    def _losses_of(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What is reported of a step's rows, and what is minimised."""
        trainee = self._trainee
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            if trainee.own_loss is not None:
                loss = trainee.own_loss(numbers)
                return loss, loss
            assert isinstance(self.corpus, Corpus), "only a trainee with a loss of its own learns from episodes"
            states_ND, labels_N = answer_states(trainee.model, self.corpus.prefix, self.corpus.batch(numbers))
            if trainee.objective is None:
                logits_NV = trainee.model.lm_head(states_ND).float()
                loss = torch.nn.functional.cross_entropy(logits_NV, labels_N)
                further = trainee.further_loss
                return loss, loss if further is None else loss + further(logits_NV, labels_N)
        loss = trainee.objective(states_ND.float(), labels_N)
        return loss, loss

    def _forget_frozen(self) -> None:
        """The optimiser keeps no moments of what does not train: no memory for them, no push when it trains again."""
        for parameter in self._trainee.trainable.values():
            if not parameter.requires_grad:
                self._optimizer.state.pop(parameter, None)

    def state(self) -> State:
        """A copy of what the next step depends on."""
        tensors = {name: tensor.clone() for name, tensor in self._trainee.kept.items()}
        for name, parameter in self._trainee.trainable.items():
            tensors[name] = parameter.detach().clone()
            kept = self._optimizer.state[parameter]
            tensors |= {f"{name}@{moment}": kept[moment].clone() for moment in MOMENTS if moment in kept}
        return State(self.losses, tensors)

    def restore(self, state: State) -> None:
        """Go on from a state of a run with the same schedule, corpus and start."""
        with torch.no_grad():
            for name, tensor in {**self._trainee.trainable, **self._trainee.kept}.items():
                tensor.copy_(state.tensors[name])
        for name, parameter in self._trainee.trainable.items():
            if f"{name}@{MOMENTS[0]}" in state.tensors:
                self._optimizer.state[parameter] = {
                    moment: state.tensors[f"{name}@{moment}"].clone() for moment in MOMENTS
                }
        self._losses = list(state.losses)


@torch.inference_mode()
def held_out_losses(
    trainee: Trainee, corpus: Corpus, size: int, autocast: bool = False
) -> tuple[list[float], list[int]]:
    """Summed loss and number of answer tokens of every row, without training.

    Args:
        size: rows of a batch; rows of like length go together.
    """
    trainee.model.eval()
    order = sorted(range(len(corpus.rows)), key=lambda number: sum(map(len, corpus.rows[number])))
    sums, counts = [0.0] * len(order), [len(told) for _, told in corpus.rows]
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        if trainee.for_users is not None:
            trainee.for_users(corpus.users_of(numbers))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = answer_losses(trainee.model, corpus.prefix, corpus.batch(numbers))
        parts = torch.split(losses, [counts[number] for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            sums[number] = float(part.sum())
    return sums, counts


@torch.inference_mode()
def question_states(trainee: Trainee, corpus: Corpus, size: int) -> torch.Tensor:
    """The state after the final norm at the end of every row's question, float32 [rows, D]; by the model as it stands.

    Args:
        size: rows of a batch; rows of like length go together.
    """
    order = sorted(range(len(corpus.rows)), key=lambda number: sum(map(len, corpus.rows[number])))
    found: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        if trainee.for_users is not None:
            trainee.for_users(corpus.users_of(numbers))
        states_ND, _ = answer_states(trainee.model, corpus.prefix, corpus.batch(numbers))
        first = 0
        for number in numbers:
            found[number] = states_ND[first]
            first += len(corpus.rows[number][1])
    return torch.stack([found[number] for number in range(len(order))])
