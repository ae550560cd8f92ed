"""A start that is given must be the one that training began with; everything else is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from motet.adapters.errors import (
    AdapterError,
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    SourceNotFoundError,
    UnsafeFormatError,
    UnsafePathError,
    UnsupportedError,
)
from motet.adapters.spec import Declared
from tests.support.layout import Layout
from tests.support.layouts import PEFT_LAYOUTS
from tests.support.layouts_residual import configured, train
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench, Tensors, edit, product
from tests.unit.adapters.methods.changes import drop, poison, put, replace_with

Q0 = "model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"


def _initial(layout: Layout) -> Path:
    assert layout.declared.initial is not None
    return layout.declared.initial


# ------------------------------------------------------------------------------------ what looks plain and is not plain


@pytest.mark.parametrize("name", ["pissa-residual-initial", "pissa-residual", "corda-residual-initial"])
def test_an_adapter_that_counts_the_principal_part_twice_is_refused(llama: Bench, tmp_path: Path, name: str) -> None:
    """It looks like plain LoRA, and on the original base it answers garbage."""
    layout = llama.layout(name, tmp_path / "made")
    with pytest.raises(UnsupportedError, match=r"initial.*residual.*trained_on_base"):
        llama.lower(layout.folder)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("alpha", [3, 6, 12, 24])
def test_whatever_its_scale(llama: Bench, tmp_path: Path, init: str, alpha: int) -> None:
    """OLoRA's start is s·Q R, not Q R: its scale must not hide it."""
    trained = train(llama.model, configured(init_lora_weights=init, lora_alpha=alpha), seed=1)
    trained.peft_model.peft_config["default"].init_lora_weights = True
    trained.peft_model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="trained_on_base"):
        llama.lower(tmp_path)


@pytest.mark.parametrize("name", [*PEFT_LAYOUTS, "pissa-converted", "pissa-converted-rslora", "corda-converted"])
def test_what_is_plain_is_not_taken_for_it(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    bench: Bench = request.getfixturevalue("qwen2")
    assert bench.lower(bench.layout(name, tmp_path / "made").folder).effects


def test_unless_it_was_trained_on_the_base_after_all(llama: Bench, begun: Layout) -> None:
    tensors = load_file(begun.folder / "adapter_model.safetensors")
    lowered = llama.lower(begun.folder, Declared(trained_on_base=True))
    assert lowered.method == "lora"
    expected_OI = 1.5 * tensors[Q0_B].double() @ tensors[Q0_A].double()
    torch.testing.assert_close(product(lowered, Q0), expected_OI, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["initial", "residual"])
def test_trained_on_base_contradicts_a_start(llama: Bench, begun: Layout, residual: Path, name: str) -> None:
    start = {"initial": _initial(begun), "residual": residual}[name]
    with pytest.raises(ConfigError, match="trained_on_base contradicts"):
        llama.lower(begun.folder, Declared(trained_on_base=True, **{name: start}))


@pytest.mark.parametrize("name", ["pissa", "pissa-subfolder", "olora", "corda-ipm", "lora-ga"])
def test_trained_on_base_contradicts_the_configuration(llama: Bench, tmp_path: Path, name: str) -> None:
    folder = llama.layout(name, tmp_path / "made").folder
    for start in folder.glob("*_init"):
        shutil.rmtree(start)
    with pytest.raises(ConfigError, match="trained_on_base contradicts"):
        llama.lower(folder, Declared(trained_on_base=True))


def test_a_start_that_is_given_twice_is_refused(llama: Bench, begun: Layout, residual: Path) -> None:
    with pytest.raises(ConfigError, match="one is enough"):
        llama.lower(begun.folder, Declared(initial=_initial(begun), residual=residual))


# ----------------------------------------------------------------------------------------------------- initial adapters


def test_another_initial_adapter_is_refused(llama: Bench, begun: Layout, tmp_path: Path) -> None:
    """Of the same shapes, but training did not begin there."""
    other = llama.layout("corda-residual-initial", tmp_path / "other")
    with pytest.raises(ConfigError, match="initial adapter"):
        llama.lower(begun.folder, Declared(initial=_initial(other)))


def test_an_ordinary_initial_adapter_is_refused(llama: Bench, begun: Layout, tmp_path: Path) -> None:
    config = json.loads((begun.folder / "adapter_config.json").read_text())
    plain = llama.save(tmp_path / "plain", r=6, lora_alpha=9, target_modules=config["target_modules"])
    with pytest.raises(ConfigError, match="initial adapter"):
        llama.lower(begun.folder, Declared(initial=plain))


def test_the_trained_adapter_as_its_own_start_is_refused(llama: Bench, begun: Layout) -> None:
    """It would be served as the base, without a word."""
    with pytest.raises(ConfigError):
        llama.lower(begun.folder, Declared(initial=begun.folder))


INITIALS: dict[str, tuple[Callable[[Tensors], None], type[AdapterError], str]] = {
    "without a pair": (drop(Q0_A), MissingTensorError, "lora_A"),
    "with NaN": (poison(Q0_B, float("nan")), NonFiniteError, "lora_B"),
    "of another rank": (replace_with(Q0_A, (5, 48)), ShapeError, r"\[5, 48\], expected \[6, 48\]"),
    "of another width": (replace_with(Q0_B, (49, 6)), ShapeError, r"\[49, 6\], expected \[48, 6\]"),
    "of more targets": (
        put("base_model.model.model.layers.9.x.lora_A.weight", torch.ones(6, 48)),
        ConfigError,
        "layers.9",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), INITIALS.values(), ids=INITIALS.keys())
def test_an_initial_adapter_that_does_not_fit_is_refused(
    llama: Bench, begun: Layout, change: Callable[[Tensors], None], error: type[AdapterError], message: str
) -> None:
    edit(_initial(begun), change)
    with pytest.raises(error, match=message):
        llama.lower(begun.folder, begun.declared)


def test_an_initial_adapter_of_fewer_targets_is_refused(llama: Bench, tmp_path: Path) -> None:
    layout = llama.layout("pissa-subfolder", tmp_path / "made")
    edit(layout.folder / "pissa_init", _without("v_proj"), {"target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match=r"v_proj|k_proj"):
        llama.lower(layout.folder)


def _without(word: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if word in name]:
            del tensors[name]

    return change


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", True, "gaussian"])
def test_an_initial_adapter_may_name_the_method_or_not(llama: Bench, begun: Layout, init: Any) -> None:
    """PEFT's conversion rewrites the initial folder's configuration to `true`; without it the name stays."""
    edit(_initial(begun), config={"init_lora_weights": init})
    found_OI = product(llama.lower(begun.folder, begun.declared), Q0)
    expected_OI = begun.deltas_OI[Q0]
    largest = expected_OI.abs().max().expand_as(expected_OI)
    TOLERANCES["lowered", torch.float32].assert_close(found_OI, expected_OI, magnitude=largest)


def test_an_initial_adapter_with_a_scale_of_its_own(llama: Bench, begun: Layout) -> None:
    """Its pair is scaled by its own configuration: half of B0 at twice the alpha is the same start."""
    tensors = load_file(_initial(begun) / "adapter_model.safetensors")
    save_file(
        {k: v / 2 if "lora_B" in k else v for k, v in tensors.items()}, _initial(begun) / "adapter_model.safetensors"
    )
    edit(_initial(begun), config={"lora_alpha": 18})
    found_OI, expected_OI = product(llama.lower(begun.folder, begun.declared), Q0), begun.deltas_OI[Q0]
    largest = expected_OI.abs().max().expand_as(expected_OI)
    TOLERANCES["lowered", torch.float32].assert_close(found_OI, expected_OI, magnitude=largest)


def test_an_initial_adapter_as_a_pickle_is_refused(llama: Bench, begun: Layout) -> None:
    (_initial(begun) / "adapter_model.safetensors").rename(_initial(begun) / "adapter_model.bin")
    with pytest.raises(UnsafeFormatError, match="pickle"):
        llama.lower(begun.folder, begun.declared)


def test_a_sub_folder_that_leaves_the_adapter_is_refused(llama: Bench, begun: Layout) -> None:
    (begun.folder / "pissa_init").symlink_to(_initial(begun), target_is_directory=True)
    with pytest.raises(UnsafePathError, match="pissa_init"):
        llama.lower(begun.folder)


def test_an_absent_initial_adapter_is_refused(llama: Bench, begun: Layout, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError) as caught:
        llama.lower(begun.folder, Declared(initial=tmp_path / "nowhere"))
    assert str(tmp_path) not in str(caught.value)


def test_declarations_of_the_wrong_kind_are_refused(llama: Bench, begun: Layout, residual: Path) -> None:
    with pytest.raises(ConfigError, match="initial adapter 'whole'"):
        llama.lower(begun.folder, Declared(initial=residual))
    with pytest.raises(ConfigError, match="residual model"):
        llama.lower(begun.folder, Declared(residual=_initial(begun)))
