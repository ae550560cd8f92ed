"""Lossy forms are the best of their kind, touch only whole weights of linears, and say what they miss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from motet.adapters.approximate import approximate, digest, offer, outline, remaining
from motet.adapters.base import BaseModel, Kind
from motet.adapters.dense import merge
from motet.adapters.effects import Lowered, OutputBias, TargetEffects
from motet.adapters.errors import ConfigError
from motet.adapters.methods import lower
from motet.adapters.source import read
from motet.adapters.spec import LossyForm
from motet.adapters.version import Digest
from tests.support.bases import base_of, residency_of
from tests.support.layouts_full import fine_tuned
from tests.support.layouts_s2ft import s2ft_fused
from tests.support.models import tiny_llama, tiny_qwen2
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench

FORMS = [LossyForm(), LossyForm(1), LossyForm(5)]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return base_of(tiny_llama())


@pytest.fixture(scope="module")
def exact(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Everything was trained."""
    layout = fine_tuned("")(tiny_llama(), tmp_path_factory.mktemp("full") / "model", 1)
    return lower(read(layout.folder), base)


def change(exact: Lowered, base: BaseModel, target: str) -> np.ndarray:
    return (exact.overlays[f"{target}.weight"].double() - base.weight(target).double()).numpy()


def made(lossy: Lowered, base: BaseModel, target: str) -> np.ndarray:
    weight_OI = base.weight(target)
    merged_OI, _ = merge(lossy.effects[target], torch.zeros_like(weight_OI), None)
    return merged_OI.double().numpy()


def linears(base: BaseModel) -> list[str]:
    return [name for name, target in base.targets.items() if target.kind is Kind.LINEAR]


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_pairs_are_the_best_of_their_rank(exact: Lowered, base: BaseModel, rank: int) -> None:
    lossy = approximate(exact, base, LossyForm(rank))
    for name in linears(base):
        u_OK, s_K, vt_KI = np.linalg.svd(change(exact, base, name), full_matrices=False)
        best_OI = torch.from_numpy((u_OK[:, :rank] * s_K[:rank]) @ vt_KI[:rank])
        effects = lossy.effects[name]
        assert effects.low_rank is not None
        assert effects.low_rank.rank == rank
        largest = best_OI.abs().max().expand_as(best_OI)
        TOLERANCES["lowered", torch.float32].assert_close(torch.from_numpy(made(lossy, base, name)), best_OI, largest)


def test_one_bit_is_bitdeltas_formula(exact: Lowered, base: BaseModel) -> None:
    lossy = approximate(exact, base, LossyForm())
    for name in linears(base):
        delta_OI = change(exact, base, name)
        expected_OI = np.abs(delta_OI).mean() * np.where(delta_OI >= 0, 1, -1)
        np.testing.assert_allclose(made(lossy, base, name), expected_OI, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_but_whole_weights_of_linears_stays(exact: Lowered, base: BaseModel, form: LossyForm) -> None:
    lossy = approximate(exact, base, form)
    weights = {f"{name}.weight" for name in linears(base)}
    assert lossy.overlays.keys() == exact.overlays.keys() - weights
    assert {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"} <= lossy.overlays.keys()
    assert all(values is exact.overlays[path] for path, values in lossy.overlays.items())
    assert list(lossy.effects) == linears(base)
    assert (lossy.exact, lossy.method, lossy.form) == (False, exact.method, f"{exact.form}, approximate={form}")
    assert lossy.expected_targets == len(lossy.effects)
    assert exact.exact
    assert not exact.effects


def test_biases_and_sparse_changes_stay(tmp_path: Path) -> None:
    model = tiny_qwen2()
    trained = fine_tuned("layers.0.self_attn.q_proj")(model, tmp_path / "model", 1)
    base = base_of(model)
    exact = lower(read(trained.folder), base)
    ((name, effects),) = exact.effects.items()
    sparse = lower(read(s2ft_fused()(model, tmp_path / "s2ft", 1).folder), base)
    others = {target: made for target, made in sparse.effects.items() if target != name}
    lossy = approximate(replace(exact, effects={**others, name: effects}), base, LossyForm(2))
    assert effects.bias is not None
    assert lossy.effects[name].bias is effects.bias
    assert lossy.effects[name].low_rank is not None
    assert {target: lossy.effects[target] for target in others} == others
    assert list(lossy.effects) == [target for target in base.targets if target in lossy.effects]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_would_change_nothing_is_refused(llama: Bench, tmp_path: Path, form: LossyForm) -> None:
    norms = fine_tuned("norm")(llama.model, tmp_path / "norms", 1).folder
    for folder in (llama.save(tmp_path / "lora"), s2ft_fused()(tiny_llama(), tmp_path / "s2ft", 1).folder, norms):
        base = llama.base if folder.name != "s2ft" else base_of(tiny_llama())
        exact = lower(read(folder), base)
        with pytest.raises(ConfigError, match=f"approximate={form} would change nothing.*drop it"):
            approximate(exact, base, form)
        assert offer(exact, base, residency_of(base).bytes_needed) == ""


def test_a_weight_that_would_not_get_smaller_stays_exact(exact: Lowered, base: BaseModel) -> None:
    """k_proj [24, 48] has 1152 elements, a pair of rank 16 too; one of rank 15 has fewer."""
    name = "model.layers.0.self_attn.k_proj"
    assert f"{name}.weight" in approximate(exact, base, LossyForm(16)).overlays
    assert f"{name}.weight" not in approximate(exact, base, LossyForm(15)).overlays
    assert name not in remaining(exact, approximate(exact, base, LossyForm(16)), base).targets
    approximate(exact, base, LossyForm(28))
    with pytest.raises(ConfigError, match=r"would make nothing smaller.*ask for svd-28 or less"):
        approximate(exact, base, LossyForm(29))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_remains_is_what_numpy_measures(exact: Lowered, base: BaseModel, form: LossyForm) -> None:
    lossy = approximate(exact, base, form)
    found = remaining(exact, lossy, base)
    assert list(found.targets) == linears(base)
    rests, sizes = 0.0, 0.0
    for name, relative in found.targets.items():
        delta_OI = change(exact, base, name)
        if form.rank is None:
            rest = np.abs(np.abs(delta_OI) - np.abs(delta_OI).mean())
        else:
            rest = np.linalg.svd(delta_OI, compute_uv=False)[form.rank :]
        assert relative == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(delta_OI), rel=1e-4)
        rests, sizes = rests + np.linalg.norm(rest) ** 2, sizes + np.linalg.norm(delta_OI) ** 2
    assert found.relative == pytest.approx((rests / sizes) ** 0.5, rel=1e-4)
    assert 0.1 < found.relative < 1


def test_a_change_of_low_rank_is_not_lost(base: BaseModel) -> None:
    name = "model.layers.1.mlp.up_proj"
    delta_OI = torch.outer(torch.randn(72), torch.randn(48))
    exact = Lowered("full-model", "x", "none", {}, 0, overlays={f"{name}.weight": base.weight(name) + delta_OI})
    assert remaining(exact, approximate(exact, base, LossyForm(3)), base).relative < 1e-4


def test_a_weight_that_did_not_change_is_no_division_by_zero(base: BaseModel) -> None:
    name = "model.layers.1.mlp.up_proj"
    exact = Lowered("lora", "x", "none", {}, 0, overlays={f"{name}.weight": base.weight(name)})
    for form in FORMS:
        lossy = approximate(exact, base, form)
        assert remaining(exact, lossy, base).relative == 0
        assert not made(lossy, base, name).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_outline_takes_what_the_form_takes(
    exact: Lowered, base: BaseModel, form: LossyForm, dtype: torch.dtype
) -> None:
    residency = residency_of(base, 4 << 20, dtype)
    needed = residency.bytes_needed(approximate(exact, base, form))
    assert residency.bytes_needed(outline(exact, base, form)) == needed < residency.bytes_needed(exact)
    residency.place(approximate(exact, base, form))
    assert residency.used_bytes == needed


def test_one_bit_takes_one_bit(base: BaseModel) -> None:
    """Of 32 inputs; the tiny model's 48 take two words, its 72 three."""
    names = linears(base)
    exact = Lowered("m", "x", "none", {}, 0, overlays={f"{name}.weight": base.weight(name) + 1 for name in names})
    needed = residency_of(base).bytes_needed(approximate(exact, base, LossyForm()))
    assert needed == sum(base.targets[n].out_width * -(-base.targets[n].in_width // 32) * 4 for n in names)


def test_the_offer_names_the_smaller_forms_and_their_bytes(exact: Lowered, base: BaseModel) -> None:
    bytes_needed = residency_of(base).bytes_needed
    said = offer(exact, base, bytes_needed)
    assert said.startswith("; or ask for a lossy form of it with approximate: 1bit takes ")
    for form in (LossyForm(), LossyForm(8)):
        assert f"{form} takes {bytes_needed(approximate(exact, base, form)):,} bytes" in said
    assert "svd-32" not in said, "no pair of that rank is smaller than a weight of the tiny model"


def test_every_form_has_a_digest_of_its_own() -> None:
    digests = {digest(Digest("a" * 64), form) for form in (LossyForm(), LossyForm(1), LossyForm(16))}
    assert len(digests | {"a" * 64}) == 4
    assert all(len(one) == 64 for one in digests)


@pytest.mark.parametrize(("text", "form"), [("1bit", LossyForm()), ("svd-1", LossyForm(1)), ("svd-16", LossyForm(16))])
def test_forms_by_name(text: str, form: LossyForm) -> None:
    assert (LossyForm.parse(text), str(form)) == (form, text)


@pytest.mark.parametrize(
    "text", ["", "svd", "svd-", "svd-0", "svd-01", "svd--1", "svd-1.5", "svd-999999", "2bit", "1BIT"]
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write svd-R") as refusal:
        LossyForm.parse(text)
    assert repr(text) in str(refusal.value)


def test_effects_beside_a_replaced_weight_are_our_bug(exact: Lowered, base: BaseModel) -> None:
    name = linears(base)[0]
    pair = approximate(exact, base, LossyForm(1)).effects[name]
    with pytest.raises(AssertionError, match="replaced as a whole and has"):
        approximate(replace(exact, effects={name: pair}), base, LossyForm(1))
    approximate(replace(exact, effects={name: TargetEffects(bias=OutputBias(torch.ones(48)))}), base, LossyForm(1))
