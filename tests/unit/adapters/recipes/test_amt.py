"""AMT: the loss against dense models taken text by text, who trains when, what is saved and read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from motet.adapters.methods import lower
from motet.adapters.recipes import amt, halves
from motet.adapters.recipes.adversary import Adversary
from motet.adapters.recipes.episodes import Episodes
from motet.adapters.recipes.errors import TargetError
from motet.adapters.recipes.loop import Loop, Schedule
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.source import read
from tests.support.bases import base_of
from tests.support.models import ALL_LINEARS, tiny_llama
from tests.support.tolerances import TOLERANCES

IDS = torch.tensor([[5, 17, 4, 101, 33, 9, 250, 7]])
LOGITS = TOLERANCES["logits", torch.float32]
LAYERS, RANK, ALPHA = 7, 3, 6
ROWS = [[3 + label, 40 + row, 7 * row + label, 90 + label][: 2 + row % 3] for label in range(5) for row in range(7)]
EPISODES = Episodes(ROWS, [[list(range(7 * label, 7 * label + 7)) for label in range(5)]])
NUMBERS = list(range(35))


def dense() -> Any:
    return tiny_llama(num_hidden_layers=LAYERS).eval()


def begun(*targets: str) -> Trainee:
    names = targets or tuple(ALL_LINEARS)
    setup = Setup(dense(), RECIPES["amt"], RANK, ALPHA, names, "public/name", list, episodes=EPISODES)
    return amt.start(setup)


def shaken(trainee: Trainee) -> Trainee:
    """All members far from their start and from each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainee.trainable.values():
            if parameter.dim():
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return trainee


def adversary(trainee: Trainee) -> Adversary:
    owner = trainee.own_loss.__self__  # type: ignore[union-attr]
    assert isinstance(owner, Adversary)
    return owner


@torch.no_grad()
def logits(trainee: Trainee, alpha: Sequence[float]) -> torch.Tensor:
    trainee.model.pool.mix(alpha)
    return trainee.model.eval()(IDS).logits  # type: ignore[no-any-return]


def test_every_mixture_starts_as_the_base() -> None:
    before = dense()(IDS).logits.detach()
    for alpha in ([0, 0, 1, 0], [0.25] * 4, [0.5, 0, 0, 0.5]):
        LOGITS.assert_close(logits(begun(), alpha), before)


def test_what_is_taken_out_is_the_best_of_its_rank() -> None:
    trainee, model = begun("down_proj"), dense()
    for path, module in trainee.model.pool.linears.items():
        weight_OI = model.get_submodule(path).weight.detach().double()
        a_RI, b_OR = (part.double() for part in module.start)
        rest = weight_OI - ALPHA / RANK * (b_OR @ a_RI)
        LOGITS.assert_close(torch.linalg.norm(rest), torch.linalg.svdvals(weight_OI)[RANK:].square().sum().sqrt())
        LOGITS.assert_close(module.base_layer.weight, rest)


class Oracle:
    """A member as one dense weight a linear, in a plain model that reads each text alone."""

    def __init__(self, trainee: Trainee, member: int) -> None:
        self.model = dense()
        self.scale = torch.tensor(float(trainee.trainable["scale_cls"].detach()), requires_grad=True)
        self.linears = trainee.model.pool.linears
        self.factors = [
            part.detach().clone().requires_grad_()
            for module in self.linears.values()
            for part in (module.a_PRI[member], module.b_POR[member])
        ]

    def feature(self, embedded_TD: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        weights = {}
        for place, (path, module) in enumerate(self.linears.items()):
            a_RI, b_OR = factors[2 * place : 2 * place + 2]
            first_a, first_b = module.start
            plain = self.model.get_submodule(path).weight.detach()
            weights[f"{path.removeprefix('model.')}.weight"] = plain + ALPHA / RANK * (b_OR @ a_RI - first_b @ first_a)
        given = {"inputs_embeds": embedded_TD[None], "use_cache": False}
        made = functional_call(self.model.model, weights, kwargs=given)
        return made.last_hidden_state[0, -1]  # type: ignore[no-any-return]

    def embedded(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        return [self.model.model.embed_tokens(torch.tensor(ROWS[number])).detach() for number in numbers]

    def log_probabilities(self, near: Any, texts: Any, factors: Sequence[torch.Tensor]) -> torch.Tensor:
        features = [self.feature(text, factors) for text in near]
        rows = []
        for text in texts:
            mine, cosines = self.feature(text, factors), []
            for label in range(5):
                mean = sum(features[5 * label : 5 * label + 5]) / 5
                cosines.append(mine @ mean / (mine.norm() * mean.norm()))
            rows.append((self.scale * torch.stack(cosines)).log_softmax(0))
        return torch.stack(rows)

    def loss(self, epsilon: float) -> torch.Tensor:
        support = [7 * label + row for label in range(5) for row in range(5)]
        queries = [7 * label + row for label in range(5) for row in (5, 6)]
        near, texts = self.embedded(support), [text.requires_grad_() for text in self.embedded(queries)]
        labels = [number // 7 for number in queries]

        def own(found: torch.Tensor) -> torch.Tensor:
            return -sum(row[label] for row, label in zip(found, labels, strict=True)) / len(labels)  # type: ignore[no-any-return]

        gradients = torch.autograd.grad(own(self.log_probabilities(near, texts, self.factors)), texts)
        step = epsilon / near[0].shape[1] ** 0.5
        moved = [(text + step * slope.sign()).detach() for text, slope in zip(texts, gradients, strict=True)]

        def robust(factors: Sequence[torch.Tensor]) -> torch.Tensor:
            clean = self.log_probabilities(near, [text.detach() for text in texts], factors)
            other = self.log_probabilities(near, moved, factors)
            return own(clean) + 6.0 * (clean.exp() * (clean - other)).sum() / len(labels)

        slopes = torch.autograd.grad(robust(self.factors), self.factors)
        pushed = [
            factor + 0.005 * factor.norm().detach() * slope / slope.norm()
            for factor, slope in zip(self.factors, slopes, strict=True)
        ]
        return robust(pushed)


@pytest.mark.parametrize("member", [0, 2])
def test_the_loss_is_that_of_dense_models_text_by_text(member: int) -> None:
    trainee = shaken(begun())
    oracle = Oracle(trainee, member)
    norms = [float(row.norm()) for row in oracle.model.model.embed_tokens.weight.detach()]
    strength = (0.0, 0.1, 0.2, 0.4)[member] * sum(norms) / len(norms)
    expected = oracle.loss(strength)
    trainee.before_step(member, 99)
    found = trainee.own_loss(NUMBERS)  # type: ignore[misc]
    TOLERANCES["loss of an episode", torch.float32].assert_close(found, expected)
    found.backward()
    slopes = torch.autograd.grad(expected, [*oracle.factors, oracle.scale])
    factors = adversary(trainee).pool.factors(member)
    for mine, slope in zip([*factors, trainee.trainable["scale_cls"]], slopes, strict=True):
        assert mine.grad is not None
        TOLERANCES["gradient of an episode", torch.float32].assert_close(
            mine.grad, slope, slope.abs().max().expand(slope.shape)
        )
    if member:
        trainee.before_step(0, 99)
        other = trainee.own_loss(NUMBERS)  # type: ignore[misc]
        assert other.item() != pytest.approx(found.item(), rel=0.01)


def test_a_loss_moves_nothing_and_reaches_one_member_only() -> None:
    trainee = shaken(begun("q_proj", "down_proj"))
    before = {name: parameter.detach().clone() for name, parameter in trainee.trainable.items()}
    trainee.before_step(6, 99)
    trainee.own_loss(NUMBERS).backward()  # type: ignore[misc, no-untyped-call]
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainee.trainable.items())
    learning = {name for name, parameter in trainee.trainable.items() if parameter.grad is not None}
    assert learning == {name for name in trainee.trainable if name.endswith(".2.weight")} | {"scale_cls"}
    assert {id(p) for p in trainee.model.parameters() if p.grad is not None} == {
        id(trainee.trainable[name]) for name in learning
    }
    assert all(bool((trainee.trainable[name].grad != 0).any()) for name in learning)  # type: ignore[union-attr]
    assert {name.split(".")[4] for name in learning if "." in name} == {str(number) for number in range(1, LAYERS)}
    assert all(module.push is None for module in trainee.model.pool.linears.values())


def test_the_members_take_turns_on_one_episode_after_another() -> None:
    trainee = begun("q_proj")
    own, seen = adversary(trainee), []
    computed: list[int] = []
    lower_half = own.lower
    own.lower = lambda **given: computed.append(len(given["inputs_embeds"])) or lower_half(**given)

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        seen.append((own.member, tuple(numbers)))
        return own.loss(numbers)

    several = Trainee(
        trainee.model, trainee.trainable, trainee.save, before_step=trainee.before_step, own_loss=loss, turns=4
    )
    list(Loop(several, EPISODES, Schedule(6, 1e-3, 35, 0)))
    assert [member for member, _ in seen] == [0, 1, 2, 3, 0, 1]
    assert len({numbers for _, numbers in seen[:4]}) == len({numbers for _, numbers in seen[4:]}) == 1
    assert seen[0][1] != seen[4][1]
    whole, attacked = [25, 10], [10]
    assert computed == [*whole, *attacked * 3, *whole, *attacked]


def test_without_autocast_and_with_it_the_factors_are_pushed() -> None:
    """Autocast keeps the casts of factors; a push that it does not see would leave the loss as it was."""
    trainee = shaken(begun())
    trainee.before_step(0, 99)
    pushed, own = [], adversary(trainee)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pushed.append(own.loss(NUMBERS).item())
    own.pool.push = lambda *_: None  # type: ignore[method-assign, assignment]
    still = own.loss(NUMBERS).item()
    assert pushed[0] > 1.5 * still
    assert pushed[1] == pytest.approx(pushed[0], abs=0.3 * (pushed[0] - still))


@pytest.mark.parametrize("targets", [tuple(ALL_LINEARS), ("q_proj", "v_proj")])
def test_the_importer_finds_every_mixture(targets: tuple[str, ...], tmp_path: Path) -> None:
    trainee = shaken(begun(*targets))
    trainee.save(tmp_path)
    lowered = lower(read(tmp_path), base_of(dense()))
    assert lowered.form == "pool of 4 members, centred on their start"
    assert {path.rpartition(".")[2] for path in lowered.effects} == set(targets)
    assert {int(path.split(".")[2]) for path in lowered.effects} == set(range(1, LAYERS))
    assert lowered.gate is not None
    outcomes = []
    for alpha in ([0, 1, 0, 0], [0, 0, 0, 1], [0.3, 0, 0.7, 0]):
        merged = dense()
        for path, effects in lowered.effects.items():
            pair = effects.low_rank
            assert pair is not None
            gate_R = torch.tensor(alpha, dtype=torch.float32)[lowered.gate.groups[path]]
            merged.get_submodule(path).weight.data += pair.b_OR @ (gate_R[:, None] * pair.a_RI)
        with torch.no_grad():
            outcomes.append(merged(IDS).logits)
        LOGITS.assert_close(logits(trainee, alpha), outcomes[-1])
    assert float((outcomes[0] - outcomes[1]).abs().max()) > 100 * LOGITS.atol


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    trainee = begun("q_proj")
    with torch.no_grad():
        trainee.trainable["scale_cls"].fill_(12.5)
    trainee.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "AMT",
        "base_model_name_or_path": "public/name",
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "members": 4,
        "strengths": [0.0, 0.1, 0.2, 0.4],
        "scale_cls": 12.5,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_run_learns_to_tell_the_classes_apart(
    base: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    _, loop = begin(order("amt", steps=80, learning_rate=1e-2), base(), data)
    losses = list(islice(loop, 80))
    first, last = losses[:12:4], losses[-12::4]
    assert sum(last) / 3 < sum(first) / 3 - 0.2


def test_a_base_without_layers_is_refused() -> None:
    setup = Setup(torch.nn.Linear(2, 2), RECIPES["amt"], 1, 1, ("q_proj",), "x", list, episodes=EPISODES)
    with pytest.raises(TargetError, match="a Linear has no row of layers to cut; choose another base"):
        amt.start(setup)


def test_a_base_whose_halves_are_not_the_whole_is_refused() -> None:
    """As where a layer's work depends on its place."""

    class Doubled(type(dense().model)):  # type: ignore[misc]
        def forward(self, *args: Any, **given: Any) -> Any:
            made = super().forward(*args, **given)
            made.last_hidden_state = 2 * made.last_hidden_state
            return made

    decoder = dense().model
    halves.cut(decoder, 3)
    decoder.__class__ = Doubled
    with pytest.raises(TargetError, match="a Doubled cannot be cut below its last 3 layers; choose another base"):
        halves.cut(decoder, 3)
