"""Every method from its start to its folder: the official layout, read back by others."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from motet.adapters.dense import merge
from motet.adapters.methods import lower
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.starts import STARTS
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.trainee import Trainee
from motet.adapters.source import read
from motet.adapters.spec import Declared
from tests.bench.claims_measures import effective_weights
from tests.support.bases import base_of
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.recipes.conftest import HEADED

IDS = torch.tensor([[5, 17, 4, 101, 33, 9, 250, 7]])
LOGITS = TOLERANCES["logits", torch.float32]
READ_BY_PEFT = ["lora", "rslora", "dora", "eva", "pissa", "olora"]
"""PEFT needs the calibration to read CorDA's own layout, and takes PoLAR for LoRA."""
OWN_CONFIG = ("s2ft", "emtal")
"""Not a LoraConfig: test_s2ft.py, test_emtal.py."""
OF_USERS = ("llara", "ilora")
"""Their models run for users only: test_ilora.py."""
OF_EPISODES = "amt"
"""It learns from labelled texts, and saves a pool: test_amt.py."""
METHODS = [method for method in RECIPES if method not in (*OF_USERS, *HEADED, OF_EPISODES)]
ADAPTERS = [method for method in METHODS if RECIPES[method].targets]
"""The others save a whole model: test_lisa.py."""


@dataclass(frozen=True)
class Trained:
    trainee: Trainee
    folder: Path
    first: torch.Tensor
    """Logits before the first step."""

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter_config.json").read_text())  # type: ignore[no-any-return]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter_model.safetensors")

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.trainee.model.eval()(IDS).logits  # type: ignore[no-any-return]


Train = Callable[[str], Trained]


def ordered(method: str) -> Order:
    adapter = (3, 6, ("q_proj", "v_proj")) if method in ADAPTERS else (0, 0, ())
    rate = 6e-3 if method == "emtal" else 3e-3  # its scale is 1, the others' 2
    return Order(method, "wikisql", *adapter, 6, rate, 4, 0, 1)


@pytest.fixture(scope="module")
def train(base: Callable[[], Base], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Each method trained once, for a few steps."""
    done: dict[str, Trained] = {}

    def one(method: str) -> Trained:
        if method not in done:
            trainee, loop = begin(ordered(method), base(), data)
            with torch.no_grad():
                first = trainee.model.eval()(IDS).logits
            for _ in loop:
                pass
            folder = tmp_path_factory.mktemp(method)
            trainee.round_as_saved(getattr(torch, RECIPES[method].saved_dtype))
            trainee.save(folder)
            done[method] = Trained(trainee, folder, first)
        return done[method]

    return one


def test_every_recipe_has_a_start() -> None:
    assert list(STARTS) == list(RECIPES)


def test_differences_of_pairs_are_saved_in_full() -> None:
    """In bfloat16, B A - B0 A0 would be mostly rounding."""
    full = {method for method, recipe in RECIPES.items() if recipe.saved_dtype == "float32"}
    assert full == {"pissa", "olora", "corda-ipm", "corda-kpm", "amt", *HEADED}, "heads learn on the states as they are"


@pytest.mark.parametrize("method", METHODS)
def test_only_knowledge_is_calibrated_on_other_texts_than_the_tasks(
    method: str, base: Callable[[], Base], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").symlink_to(data / "text")
    expected = pytest.raises(DataError, match="ARC-Easy") if method == "corda-kpm" else contextlib.nullcontext()
    with expected:
        begin(ordered(method), base(), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_and_then_learns(method: str, train: Train, base: Callable[[], Base]) -> None:
    trained = train(method)
    LOGITS.assert_close(trained.first, base().model(IDS).logits)
    assert float((trained.logits() - trained.first).abs().max()) > 100 * LOGITS.atol


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_folder_holds_its_layout_and_no_more(method: str, train: Train) -> None:
    trained = train(method)
    files = {str(path.relative_to(trained.folder)) for path in trained.folder.rglob("*") if path.is_file()}
    pair = {"adapter_config.json", "adapter_model.safetensors"}
    initial = {f"corda_init/{name}" for name in pair} if method.startswith("corda") else set()
    assert files == pair | initial
    values = {name: tensor for name, tensor in trained.tensors.items() if tensor.is_floating_point()}
    assert {tensor.dtype for tensor in values.values()} == {getattr(torch, RECIPES[method].saved_dtype)}
    assert values.keys() == trained.trainee.trainable.keys()
    assert (len(values) == len(trained.tensors)) == (method != "s2ft"), "which channels, beside by how much"


@pytest.mark.parametrize("method", [method for method in ADAPTERS if method not in OWN_CONFIG])
def test_the_configuration_names_the_base_and_no_place(method: str, train: Train) -> None:
    config = train(method).config
    assert config["base_model_name_or_path"] == "public/name"
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True
    assert "/tmp" not in json.dumps(config)


def test_each_method_is_marked_as_its_own(train: Train) -> None:
    by_peft = [method for method in ADAPTERS if method not in ("polar", *OWN_CONFIG)]
    inits = {method: train(method).config["init_lora_weights"] for method in by_peft}
    own = {"eva": "eva", "pissa": "pissa", "olora": "olora", "corda-ipm": "corda", "corda-kpm": "corda"}
    assert inits == {"lora": True, "rslora": True, "dora": True} | own
    assert train("rslora").config["use_rslora"]
    assert train("dora").config["use_dora"]
    assert train("s2ft").config == {
        "peft_type": "S2FT",
        "base_model_name_or_path": "public/name",
        "task_type": "CAUSAL_LM",
    }
    assert train("corda-kpm").config["corda_config"]["corda_method"] == "kpm"
    assert train("corda-ipm").config["corda_config"]["corda_method"] == "ipm"


def test_the_initial_pair_of_corda_is_marked_plain_and_lies_in_the_base(train: Train) -> None:
    initial = train("corda-ipm").folder / "corda_init"
    config = json.loads((initial / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == "public/name"
    tensors = load_file(initial / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    trained = train("corda-ipm").tensors
    assert trained.keys() == tensors.keys()
    assert all(not torch.equal(trained[name], tensor) for name, tensor in tensors.items())


def test_the_two_modes_of_corda_start_elsewhere(train: Train) -> None:
    """The instruction-previewed mode takes the largest part of the base, the knowledge-preserved the smallest."""
    sizes = {}
    for method in ("corda-ipm", "corda-kpm"):
        pair = load_file(train(method).folder / "corda_init" / "adapter_model.safetensors")
        stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        sizes[method] = float((pair[f"{stem}B.weight"] @ pair[f"{stem}A.weight"]).norm())
    assert sizes["corda-ipm"] > 3 * sizes["corda-kpm"]


def test_polar_has_the_names_of_the_authors_fork(train: Train) -> None:
    stem = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    shapes = {name: tuple(tensor.shape) for name, tensor in train("polar").tensors.items() if name.startswith(stem)}
    assert shapes == {
        f"{stem}A.weight": (3, 48),
        f"{stem}B.weight": (24, 3),
        f"{stem}S.parametrizations.weight.original": (3, 3),
    }
    config = train("polar").config
    assert (config["adapter_name"], config["parameterize_S"]) == ("polar", "identity")


@pytest.mark.parametrize("method", READ_BY_PEFT)
def test_peft_reads_the_folder_as_it_was_trained(method: str, train: Train, base: Callable[[], Base]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PiSSA and OLoRA change the model they are loaded into
        model = PeftModel.from_pretrained(base().model, str(train(method).folder)).eval()
    with torch.no_grad():
        LOGITS.assert_close(model(IDS).logits, train(method).logits())


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_importer_finds_the_change_that_was_trained(method: str, train: Train, base: Callable[[], Base]) -> None:
    trained, model = train(method), base().model
    initial = trained.folder / "corda_init" if method.startswith("corda") else None
    lowered = lower(read(trained.folder, Declared(initial=initial)), base_of(model))
    after = effective_weights(trained.trainee.model, ("q_proj", "v_proj"))
    assert lowered.effects.keys() <= after.keys()
    for path, weight_OI in effective_weights(model, ("q_proj", "v_proj")).items():
        if path not in lowered.effects:  # EVA gave it rank 0
            assert torch.equal(after[path], weight_OI)
            continue
        merged_OI, _ = merge(lowered.effects[path], weight_OI, None)
        size = float((after[path] - weight_OI).abs().max())
        assert size > 1e-3
        TOLERANCES["dense merge", torch.float32].assert_close(merged_OI, after[path], torch.ones_like(weight_OI))
