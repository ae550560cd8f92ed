"""PoLAR: the matrix in the middle is never forgotten, and nothing is made orthonormal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.errors import (
    AdapterError,
    ConfigError,
    FormatError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from motet.adapters.spec import Declared
from tests.unit.adapters.conftest import Bench, edit, product
from tests.unit.adapters.methods.changes import Tensors, drop, poison, put, rename, replace_with

Q0 = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{Q0}"
LONG, SHORT = ".lora_S.parametrizations.weight.original", ".lora_S.weight"


@pytest.fixture(params=["polar", "polar-bare"])
def folder(llama: Bench, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """In either spelling of Θ's key."""
    return llama.layout(request.param, tmp_path / "made").folder


def _key(folder: Path) -> str:
    """Name of the first target's Θ."""
    return next(name for name in load_file(folder / "adapter_model.safetensors") if name.startswith(f"{PREFIX}.lora_S"))


def test_upstream_peft_would_leave_theta_out(llama: Bench, folder: Path) -> None:
    """The trap itself: an upstream PEFT loads the folder, and computes B A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    found_OI = product(llama.lower(folder), Q0)
    without_OI = 8 * tensors[f"{PREFIX}.lora_B.weight"].double() @ tensors[f"{PREFIX}.lora_A.weight"].double()
    assert torch.linalg.vector_norm(found_OI - without_OI) > 0.5 * torch.linalg.vector_norm(without_OI)


@pytest.mark.parametrize("name", [None, "lora", "Polar", "", 3])
def test_lora_s_without_polars_name_is_refused(llama: Bench, folder: Path, name: Any) -> None:
    edit(folder, config={"adapter_name": name})
    with pytest.raises(FormatError, match=r"lora_S|PoLAR|polar"):
        llama.lower(folder)


def test_lora_s_in_a_folder_of_upstream_peft_is_refused(llama: Bench, folder: Path) -> None:
    _remove(folder, "adapter_name", "parameterize_S")
    with pytest.raises(FormatError, match=r"lora_S|PoLAR|polar"):
        llama.lower(folder)


def _remove(folder: Path, *keys: str) -> None:
    path = folder / "adapter_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
    path.write_text(json.dumps(config))


def test_polars_name_without_lora_s_is_refused(llama: Bench, folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".lora_S" in name]:
            del tensors[name]

    edit(folder, change)
    with pytest.raises(MissingTensorError, match="lora_S"):
        llama.lower(folder)


def test_how_theta_is_stored_must_be_said(llama: Bench, folder: Path) -> None:
    _remove(folder, "parameterize_S")
    with pytest.raises(ConfigError, match="parameterize_S"):
        llama.lower(folder)


@pytest.mark.parametrize("value", [None, "orthogonal", "Identity", "", True, ["identity"]])
def test_an_unknown_way_to_store_theta_is_refused(llama: Bench, folder: Path, value: Any) -> None:
    edit(folder, config={"parameterize_S": value})
    with pytest.raises(ConfigError, match="parameterize_S"):
        llama.lower(folder)


SPOILT: dict[str, tuple[Callable[[str], Callable[[Tensors], None]], type[AdapterError], str]] = {
    "one theta missing": (drop, MissingTensorError, "lora_S"),
    "both spellings at once": (
        lambda key: put(PREFIX + (SHORT if key.endswith(LONG) else LONG), torch.eye(4)),
        FormatError,
        "lora_S",
    ),
    "the adapter's name in the key": (lambda key: rename("lora_S.", "lora_S.default."), FormatError, "lora_S"),
    "theta of another rank": (lambda key: replace_with(key, (3, 3)), ShapeError, r"\[3, 3\], expected \[4, 4\]"),
    "theta not square": (lambda key: replace_with(key, (4, 48)), ShapeError, r"\[4, 48\], expected \[4, 4\]"),
    "theta as a vector": (lambda key: replace_with(key, (4,)), ShapeError, r"\[4\], expected \[4, 4\]"),
    "theta of NaN": (lambda key: poison(key, float("nan")), NonFiniteError, "lora_S"),
    "theta of infinity": (lambda key: poison(key, float("inf")), NonFiniteError, "lora_S"),
    "theta of integers": (lambda key: put(key, torch.ones(4, 4, dtype=torch.int8)), ShapeError, "int8"),
    "a theta too many": (
        lambda key: put("base_model.model.model.layers.9.x.lora_S.weight", torch.eye(4)),
        FormatError,
        "layers.9",
    ),
    "A of another rank": (lambda key: replace_with(f"{PREFIX}.lora_A.weight", (3, 48)), ShapeError, r"\[3, 48\]"),
    "a bias of B": (lambda key: put(f"{PREFIX}.lora_B.bias", torch.ones(48)), FormatError, "bias"),
    "a DoRA magnitude": (lambda key: put(f"{PREFIX}.lora_magnitude_vector", torch.ones(48)), FormatError, "DoRA"),
}


@pytest.mark.parametrize(("change", "error", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_tensors_that_do_not_fit_are_refused(
    llama: Bench,
    folder: Path,
    change: Callable[[str], Callable[[Tensors], None]],
    error: type[AdapterError],
    message: str,
) -> None:
    llama.lower(folder)
    edit(folder, change(_key(folder)))
    with pytest.raises(error, match=message):
        llama.lower(folder)


def test_a_theta_that_is_not_used_must_be_finite_all_the_same(llama: Bench, tmp_path: Path) -> None:
    """`removal` ignores what is stored; NaN there still means that training diverged."""
    folder = llama.layout("polar-removal", tmp_path / "made").folder
    edit(folder, poison(_key(folder), float("nan")))
    with pytest.raises(NonFiniteError, match="lora_S"):
        llama.lower(folder)


@pytest.mark.parametrize("key", ["use_dora", "lora_bias"])
def test_what_the_fork_does_not_combine_is_refused(llama: Bench, folder: Path, key: str) -> None:
    edit(folder, config={key: True})
    with pytest.raises(FormatError, match=r"DoRA|dora|bias"):
        llama.lower(folder)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "loftq"])
def test_a_start_taken_out_of_the_base_beside_polar_is_refused(llama: Bench, folder: Path, init: str) -> None:
    edit(folder, config={"init_lora_weights": init})
    with pytest.raises(FormatError):
        llama.lower(folder)


@pytest.mark.parametrize("name", ["initial", "residual", "sub-folder"])
def test_a_declared_start_beside_polar_is_refused(llama: Bench, folder: Path, tmp_path: Path, name: str) -> None:
    """It would be ignored, although somebody meant something by it."""
    other = llama.layout("pissa-residual-initial", tmp_path / "other")
    initial = other.declared.initial
    assert initial is not None
    declared = {
        "initial": Declared(initial=initial),
        "residual": Declared(residual=tmp_path / "other" / "residual"),
        "sub-folder": Declared(),
    }[name]
    if name == "sub-folder":
        shutil.copytree(initial, folder / "pissa_init")
    with pytest.raises(FormatError):
        llama.lower(folder, declared)


def test_factors_are_never_made_orthonormal(llama: Bench, folder: Path) -> None:
    """Trained factors are orthonormal only nearly; here they are not at all, and are taken as they are."""
    generator = torch.Generator().manual_seed(4)
    a_RI, b_OR = torch.randn(4, 48, generator=generator), torch.randn(48, 4, generator=generator)
    theta_RR = torch.randn(4, 4, generator=generator)
    key = _key(folder)

    def change(tensors: Tensors) -> None:
        tensors |= {f"{PREFIX}.lora_A.weight": a_RI, f"{PREFIX}.lora_B.weight": b_OR, key: theta_RR}

    edit(folder, change)
    expected_OI = 32 / 4 * b_OR.double() @ theta_RR.double() @ a_RI.double()
    torch.testing.assert_close(product(llama.lower(folder), Q0), expected_OI, atol=1e-5, rtol=1e-5)


def test_rank_stabilised_scaling_is_ignored_as_the_fork_ignores_it(llama: Bench, folder: Path) -> None:
    before = llama.lower(folder)
    after = llama.lower(edit(folder, config={"use_rslora": True}))
    assert after.scaling == before.scaling == "alpha/r"
    assert all(torch.equal(product(after, name), product(before, name)) for name in before.effects)


@pytest.mark.parametrize("kind", ["diagonal", "removal"])
def test_the_same_file_means_another_change_in_each_parametrisation(llama: Bench, folder: Path, kind: str) -> None:
    before = product(llama.lower(folder), Q0)
    after = product(llama.lower(edit(folder, config={"parameterize_S": kind})), Q0)
    assert torch.linalg.vector_norm(after - before) > 0.1 * torch.linalg.vector_norm(before)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "removal"])
def test_other_peft_types_with_theta_are_refused(llama: Bench, folder: Path, kind: str) -> None:
    with pytest.raises(UnsupportedError, match="peft_type"):
        llama.lower(edit(folder, config={"peft_type": "POLAR", "parameterize_S": kind}))
