"""LISA trains the layers whose turn it is, and what it saves is a model that differs from the base in just those."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.methods import lower
from motet.adapters.recipes.errors import OutputError, TargetError
from motet.adapters.recipes.lisa import ACTIVE_LAYERS, INTERVAL_STEPS, drawn
from motet.adapters.recipes.loop import Loop, Schedule
from motet.adapters.recipes.run import Base, Order, Run, begin
from motet.adapters.recipes.trainee import Trainee
from motet.adapters.source import read
from tests.support.bases import base_of
from tests.support.models import load_dense, tiny_llama
from tests.support.tolerances import TOLERANCES

LAYERS = 5
STEPS = INTERVAL_STEPS + 2
IDS = torch.tensor([[5, 17, 4, 101, 33, 9, 250, 7]])
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight"}
Orders = Callable[..., Order]


@pytest.fixture
def deep(base: Callable[[], Base]) -> Callable[[], Base]:
    """A base of more layers than train at a time, its weights representable in bfloat16 as a served base's are."""
    tokenizer = base().tokenizer

    def make() -> Base:
        model = tiny_llama(num_hidden_layers=LAYERS, vocab_size=320, max_position_embeddings=512)
        model.config.name_or_path = "/home/somebody/base"
        return Base("public/name", model.to(torch.bfloat16).float(), tokenizer)

    return make


@pytest.fixture
def ordered(order: Orders) -> Orders:
    """Orders that freeze once."""
    return lambda method="lisa", **changes: order(method, **{"steps": STEPS, "learning_rate": 2e-2, **changes})


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def of_layers(model: Any, numbers: set[int]) -> set[str]:
    """Names of the parameters of these layers, and of those outside of all."""
    return {
        name for name, _ in model.named_parameters() if name in OUTSIDE or int(name.split(".layers.")[1][0]) in numbers
    }


def turns(seed: int, steps: int) -> set[int]:
    """Every layer that has a turn within the steps."""
    return {number for done in range(steps) for number in drawn(seed, done // INTERVAL_STEPS, LAYERS)}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_so_many_layers_at_a_time_and_every_layer_has_its_turns() -> None:
    draws = [drawn(3, interval, 30) for interval in range(300)]
    for layers in draws:
        assert len(set(layers)) == len(layers) == ACTIVE_LAYERS
        assert layers == sorted(layers)
    counts = [sum(number in layers for layers in draws) for number in range(30)]
    expected = 300 * ACTIVE_LAYERS / 30
    assert all(abs(count - expected) < 4.5 * expected**0.5 for count in counts), counts


def test_the_draw_is_the_seeds_and_the_intervals() -> None:
    def draws(seed: int) -> list[list[int]]:
        return [drawn(seed, interval, 30) for interval in range(20)]

    assert draws(0) == draws(0) != draws(1)
    assert draws(0)[1:] != draws(1)[:-1], "nor one seed's draws shifted"
    assert len(set(map(tuple, draws(0)))) > 15


def test_a_small_model_trains_all_its_layers() -> None:
    assert drawn(0, 0, 1) == [0]


def test_each_interval_trains_its_layers_and_what_lies_outside(
    deep: Callable[[], Base], ordered: Orders, data: Path
) -> None:
    """Gradients and moments: of nothing else, not even of what trained before."""
    trainee, loop = begin(ordered(steps=2 * INTERVAL_STEPS), deep(), data)
    gradients: list[set[str]] = []

    def look() -> None:
        gradients.append({name for name, tensor in trainee.trainable.items() if tensor.grad is not None})

    schedule = Schedule(2 * INTERVAL_STEPS, 1e-2, 4, 0)
    own = Loop(dataclasses.replace(trainee, correct_gradients=look), loop.corpus, schedule)
    first, second = (set(drawn(0, interval, LAYERS)) for interval in (0, 1))
    assert first - second, "a layer is frozen again"
    for done, _ in enumerate(own):
        active = of_layers(trainee.model, second if done >= INTERVAL_STEPS else first)
        assert gradients[-1] == active
        assert {name.partition("@")[0] for name in own.state().tensors if "@" in name} == active
    assert len(gradients) == 2 * INTERVAL_STEPS


@pytest.mark.parametrize("seed", [0, 1])
def test_what_had_a_turn_differs_and_the_rest_is_the_bases_bit_for_bit(
    seed: int, deep: Callable[[], Base], ordered: Orders, data: Path
) -> None:
    trainee, loop = begin(ordered(seed=seed), deep(), data)
    list(loop)
    touched = turns(seed, STEPS)
    assert ACTIVE_LAYERS < len(touched) < LAYERS, "some layer is unfrozen later, and one never"
    assert differing(parameters(deep().model), parameters(trainee.model)) == of_layers(trainee.model, touched)


def test_full_changes_everything(deep: Callable[[], Base], ordered: Orders, data: Path) -> None:
    trainee, loop = begin(ordered("full"), deep(), data)
    list(loop)
    before = parameters(deep().model)
    assert differing(before, parameters(trainee.model)) == before.keys()


@pytest.mark.parametrize("stop", [3, INTERVAL_STEPS, INTERVAL_STEPS + 1])
def test_a_run_stopped_within_an_interval_is_resumed_bit_for_bit(
    stop: int, deep: Callable[[], Base], ordered: Orders, data: Path, tmp_path: Path
) -> None:
    whole = Run(ordered(), deep(), data, tmp_path / "whole", resume=False, keep_every=stop)
    list(whole)
    stopped = Run(ordered(), deep(), data, tmp_path / "parts", resume=False, keep_every=stop)
    list(itertools.islice(stopped, stop + 1))
    made = deep()
    torch.manual_seed(99)  # another process would be elsewhere
    resumed = Run(ordered(), made, data, tmp_path / "parts", resume=True, keep_every=stop)
    assert resumed.loop.done == stop
    list(resumed)
    assert resumed.loop.losses == whole.loop.losses
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture(params=["lisa", "full"])
def saved(
    request: pytest.FixtureRequest, deep: Callable[[], Base], ordered: Orders, data: Path, tmp_path: Path
) -> tuple[Trainee, Path]:
    running = Run(ordered(request.param), deep(), data, tmp_path / "out", resume=False, keep_every=100)
    list(running)
    return running.trainee, tmp_path / "out"


def test_the_importer_finds_the_parameters_that_were_trained(
    saved: tuple[Trainee, Path], deep: Callable[[], Base]
) -> None:
    trainee, folder = saved
    base = base_of(deep().model)
    lowered = lower(read(folder), base)
    trained = parameters(trainee.model)
    assert (lowered.method, lowered.exact, lowered.effects) == ("full-model", True, {})
    assert lowered.overlays.keys() == differing(parameters(deep().model), trained) | {"lm_head.weight"}
    for name, overlay in lowered.overlays.items():
        assert torch.equal(overlay, trained[base.tied.get(name, name)]), name


@torch.no_grad()
def test_the_folder_is_a_model_that_transformers_reads(saved: tuple[Trainee, Path]) -> None:
    trainee, folder = saved
    found = load_dense(folder, torch.float32)(IDS).logits
    TOLERANCES["logits", torch.float32].assert_close(found, trainee.model.eval()(IDS).logits)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors.keys() == parameters(trainee.model).keys()
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["_name_or_path"]) == ("bfloat16", "public/name")
    assert (config["architectures"], config["num_hidden_layers"]) == (["LlamaForCausalLM"], LAYERS)
    for path in folder.glob("*.json"):
        assert "/home" not in path.read_text()


def test_saving_changes_nothing(deep: Callable[[], Base], ordered: Orders, data: Path, tmp_path: Path) -> None:
    """The model that is scored afterwards is the one that was trained."""
    trainee, loop = begin(ordered(), deep(), data)
    list(loop)
    before, config = parameters(trainee.model), trainee.model.config.to_dict()
    trainee.save(tmp_path / "out")
    assert not differing(before, parameters(trainee.model))
    assert trainee.model.config.to_dict() == config


def test_a_finished_model_is_not_overwritten(
    saved: tuple[Trainee, Path], deep: Callable[[], Base], ordered: Orders, data: Path
) -> None:
    _, folder = saved
    for resume in (False, True):
        with pytest.raises(OutputError, match="--out 'out' holds an adapter already"):
            Run(ordered(), deep(), data, folder, resume=resume, keep_every=100)


@pytest.mark.parametrize("method", ["lisa", "full"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [({"rank": 4}, "--rank 4"), ({"alpha": 2}, "--alpha 2"), ({"targets": ("q_proj", "k_proj")}, "--targets q_proj,k")],
)
def test_what_means_nothing_is_refused(method: str, changes: dict[str, Any], named: str, order: Orders) -> None:
    with pytest.raises(TargetError, match=f"{named}.* means nothing to '{method}', which trains whole layers; drop it"):
        order(method, **changes)
