"""PiSSA: the start is recomputed only where it is certain, and the base is never written to."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.errors import ConfigError, UnsupportedError
from motet.adapters.registry import Registry
from tests.support.bases import base_of, residency_of
from tests.support.layout import products
from tests.support.layouts import make
from tests.support.layouts_residual import configured, train
from tests.support.models import reference_copy, tiny_llama
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench, edit, product

Q0 = "model.layers.0.self_attn.q_proj"


def _start(init: str, weight_OI: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """s·B0 A0 by definition, in float64. PiSSA's factors divide the scale out again, OLoRA's do not."""
    matrix_OI = weight_OI.double()
    if init == "olora":
        q_OK, r_KI = torch.linalg.qr(matrix_OI)
        return scale * (q_OK[:, :rank] @ r_KI[:rank])
    u_OK, s_K, vt_KI = torch.linalg.svd(matrix_OI, full_matrices=False)
    return (u_OK[:, :rank] * s_K[:rank]) @ vt_KI[:rank]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_recomputed_start_is_the_one_of_the_definition(llama: Bench, tmp_path: Path, init: str) -> None:
    """Not only PEFT's: the decomposition in float64, up to what float32 determines of it."""
    trained = train(llama.model, configured(init_lora_weights=init), seed=3)
    trained.peft_model.save_pretrained(tmp_path)
    lowered = llama.lower(tmp_path)
    for name, trained_OI in products(trained.peft_model).items():
        start_OI = _start(init, llama.base.weight(name), rank=6, scale=1.5)
        largest = start_OI.abs().max().expand_as(start_OI)
        found_OI = trained_OI - product(lowered, name)
        TOLERANCES["recomputed start", torch.float32].assert_close(found_OI, start_OI, magnitude=largest)


@pytest.mark.parametrize("name", ["pissa-subfolder", "pissa-subfolder-dora"])
def test_niter_without_its_start_is_refused(llama: Bench, tmp_path: Path, name: str) -> None:
    """A randomised SVD cannot be repeated; PEFT repeats it, and does not even warn."""
    folder = llama.layout(name, tmp_path / "made").folder
    shutil.rmtree(folder / "pissa_init")
    with pytest.raises(UnsupportedError, match=r"niter.*initial.*residual"):
        llama.lower(folder)


@pytest.mark.parametrize("sub_folder", ["pissa_init", "initial_adapter"])
def test_the_start_beside_the_adapter_is_found(llama: Bench, tmp_path: Path, sub_folder: str) -> None:
    layout = llama.layout("pissa-subfolder", tmp_path / "made")
    expected = llama.lower(layout.folder)
    (layout.folder / "pissa_init").rename(layout.folder / sub_folder)
    found = llama.lower(layout.folder)
    assert found.method == "pissa"
    assert all(torch.equal(product(found, name), product(expected, name)) for name in found.effects)


def test_the_start_of_another_method_is_refused(llama: Bench, tmp_path: Path) -> None:
    """Not the principal components of this base: CorDA's start beside a PiSSA adapter."""
    layout = llama.layout("pissa-subfolder", tmp_path / "made")
    other = llama.layout("corda-ipm", tmp_path / "other")
    shutil.rmtree(layout.folder / "pissa_init")
    shutil.copytree(other.folder / "corda_init", layout.folder / "pissa_init")
    with pytest.raises(ConfigError, match="initial adapter"):
        llama.lower(layout.folder)


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa-dora"])
def test_an_adapter_of_another_base_is_refused(llama: Bench, tmp_path: Path, name: str) -> None:
    """What the base says the start was has nothing to do with the trained pair: every answer would be wrong."""
    other = make(name, tiny_llama(seed=5, num_hidden_layers=2), tmp_path / "made")
    with pytest.raises(ConfigError):
        llama.lower(other.folder)


def _with_values(model: Any, values_K: torch.Tensor) -> Any:
    """The model with chosen singular values in one target."""
    weight = model.get_submodule(Q0).weight
    u_OK, _, vt_KI = torch.linalg.svd(weight.detach().double())
    weight.data = ((u_OK * values_K.double()) @ vt_KI).float()
    return model


@pytest.mark.parametrize("kind", ["pissa", "pissa-dora"])
def test_equal_singular_values_at_the_rank_are_refused(tmp_path: Path, kind: str) -> None:
    """Which of two equal components PiSSA took out is not determined by the base."""
    rank = {"pissa": 6, "pissa-dora": 4}[kind]
    values_K = torch.linspace(2, 0.1, 48)
    values_K[rank] = values_K[rank - 1]
    model = _with_values(tiny_llama(), values_K)
    layout = make(kind, model, tmp_path / "made")
    with pytest.raises(UnsupportedError, match=rf"singular values {rank} and {rank + 1} of '{Q0}'"):
        Bench(model, base_of(model)).lower(layout.folder)


@pytest.mark.parametrize("equal", [(0, 1), (2, 5), (6, 7), (40, 47)])
def test_equal_singular_values_elsewhere_do_no_harm(tmp_path: Path, equal: tuple[int, int]) -> None:
    values_K = torch.linspace(2, 0.1, 48)
    values_K[equal[0] : equal[1] + 1] = values_K[equal[0]]
    model = _with_values(tiny_llama(), values_K)
    layout = make("pissa", model, tmp_path / "made")
    found_OI = product(Bench(model, base_of(model)).lower(layout.folder), Q0)
    expected_OI = layout.deltas_OI[Q0]
    largest = expected_OI.abs().max().expand_as(expected_OI)
    TOLERANCES["lowered", torch.float32].assert_close(found_OI, expected_OI, magnitude=largest)


def test_a_weight_of_less_rank_than_the_adapter_is_its_own_start(tmp_path: Path) -> None:
    """σ_r = σ_{r+1} = 0: what was taken out is all there is."""
    values_K = torch.zeros(48)
    values_K[:3] = torch.tensor([2.0, 1.5, 1.0])
    model = _with_values(tiny_llama(), values_K)
    layout = make("pissa", model, tmp_path / "made")
    found_OI = product(Bench(model, base_of(model)).lower(layout.folder), Q0)
    expected_OI = layout.deltas_OI[Q0]
    assert torch.linalg.vector_norm(found_OI - expected_OI) < 1e-5 * torch.linalg.vector_norm(
        model.get_submodule(Q0).weight
    )


def test_the_base_is_bit_identical_after_load_and_unload(tmp_path: Path) -> None:
    """PEFT overwrites the shared base when it loads such an adapter (peft#2184)."""
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    base = base_of(model)
    registry = Registry(base, residency_of(base, 8 << 20))
    for name in ("pissa", "pissa-residual", "olora", "corda-ipm"):
        layout = make(name, reference_copy(model), tmp_path / name)
        registry.load(name, layout.folder, declared=layout.declared)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), name
    for name in ("pissa", "pissa-residual", "olora", "corda-ipm"):
        registry.unload(name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("init", ["loftq", "pissa_quantised", "PiSSA", "pissa_niter_", "qpissa"])
def test_other_ways_to_change_the_base_are_refused(llama: Bench, tmp_path: Path, init: str) -> None:
    folder = edit(llama.layout("pissa", tmp_path / "made").folder, config={"init_lora_weights": init})
    with pytest.raises((UnsupportedError, ConfigError), match="init_lora_weights"):
        llama.lower(folder)
