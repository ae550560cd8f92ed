"""Folders of PEFT that were trained on W - s·B0 A0: PiSSA, OLoRA, LoRA-GA, each with what says where B0 A0 is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

from motet.adapters.spec import Declared
from tests.support.layout import Layout, family_name, look_trained, products, read_back
from tests.support.layouts_peft import calibration
from tests.support.models import ALL_LINEARS, load_dense

Maker = Callable[[Any, Path, int], Layout]


@dataclass(frozen=True)
class Trained:
    """A pair that was trained on a residual model.

    Attributes:
        peft_model: PEFT's own model, which holds the residual weights.
        deltas_OI: target → s·(B A - B0 A0) [O, I] float64.
    """

    peft_model: Any
    deltas_OI: dict[str, torch.Tensor]


def configured(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": ALL_LINEARS, **options})


def train(
    model: Any,
    config: LoraConfig,
    seed: int,
    initial: Path | None = None,
    prepared: Callable[[Any], None] | None = None,
) -> Trained:
    """Let PEFT change a copy of the base, keep the initial adapter, and move the weights.

    Args:
        initial: where the adapter is saved as it begins, the way PEFT's conversion asks for it (`true`).
        prepared: run on the copy first.
    """
    changed = copy.deepcopy(model)
    if prepared is not None:
        prepared(changed)
    peft_model = get_peft_model(changed, config)
    if initial is not None:
        kept, config.init_lora_weights = config.init_lora_weights, True
        peft_model.save_pretrained(initial)
        config.init_lora_weights = kept
    before_OI = products(peft_model)
    look_trained(peft_model, model, seed)
    after_OI = products(peft_model)
    return Trained(peft_model, {name: after_OI[name] - before_OI[name] for name in after_OI})


def save_residual(peft_model: Any, folder: Path, **options: Any) -> Any:
    """Write W - s·B0 A0 as a model directory and read it back in float32."""
    copy.deepcopy(peft_model).unload().save_pretrained(folder, **options)
    return load_dense(folder, torch.float32)


def recomputed(init: Literal["pissa", "olora"], **options: Any) -> Maker:
    """The adapter alone: PEFT computes B0 A0 from the base once more when it loads it."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        trained = train(model, configured(init_lora_weights=init, **options), seed)
        trained.peft_model.save_pretrained(folder)
        method = f"{init}+dora" if options.get("use_dora") else init
        return Layout(folder, read_back(model, folder), method, deltas_OI=trained.deltas_OI)

    return write


def native(init: str, name: str, method: str = "pissa", **options: Any) -> Maker:
    """The adapter with its true configuration, and the initial adapter in a sub-folder."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        trained = train(model, configured(init_lora_weights=init, **options), seed, initial=folder / name)
        trained.peft_model.save_pretrained(folder)
        residual = copy.deepcopy(trained.peft_model).unload()
        oracle = read_back(residual, folder, init_lora_weights=True)
        reported = f"{method}+dora" if options.get("use_dora") else method
        return Layout(folder, oracle, reported, deltas_OI=trained.deltas_OI)

    return write


def on_residual(
    init: str, given: Literal["initial", "residual"], method: str, name: str = "start", **options: Any
) -> Maker:
    """The residual model beside an adapter whose configuration says `true`, as PiSSA's own repository writes them."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        trained = train(model, configured(init_lora_weights=init, **options), seed, initial=folder / name)
        return beside_residual(trained, folder, given, method, folder / name)

    return write


def beside_residual(
    trained: Trained, folder: Path, given: Literal["initial", "residual"], method: str, initial: Path
) -> Layout:
    """Write the residual model, in shards, and the trained adapter as a plain one; declare one of the two."""
    residual = save_residual(trained.peft_model, folder / "residual", max_shard_size="40KB")
    trained.peft_model.peft_config["default"].init_lora_weights = True
    trained.peft_model.save_pretrained(folder / "trained")
    declared = Declared(initial=initial) if given == "initial" else Declared(residual=folder / "residual")
    oracle = read_back(residual, folder / "trained")
    return Layout(folder / "trained", oracle, method, declared, trained.deltas_OI)


def converted(init: str, method: str, **options: Any) -> Maker:
    """PEFT's own conversion to a plain adapter of twice the rank: [A; A0] and [B, -B0]."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        initial = folder / "start"
        trained = train(model, configured(init_lora_weights=init, **options), seed, initial=initial)
        return save_converted(trained, model, folder / "converted", initial, method)

    return write


def save_converted(trained: Trained, model: Any, folder: Path, initial: Path, method: str | None = None) -> Layout:
    config = trained.peft_model.peft_config["default"]
    trained.peft_model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial))
    oracle = read_back(model, folder)
    return Layout(folder, oracle, method or family_name(config), deltas_OI=trained.deltas_OI)


def lora_ga(**options: Any) -> Maker:
    """Initial factors from the gradient, kept in a sub-folder; PEFT cannot compute them again."""

    def write(model: Any, folder: Path, seed: int) -> Layout:
        config = configured(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **options)

        def estimate_gradients(changed: Any) -> None:
            def step() -> None:
                for batch in calibration(seed, batches=2):
                    changed(**batch, labels=batch["input_ids"]).loss.backward()

            preprocess_loraga(changed, config, step)

        trained = train(model, config, seed, initial=folder / "lora_ga_init", prepared=estimate_gradients)
        trained.peft_model.save_pretrained(folder)
        residual = copy.deepcopy(trained.peft_model).unload()
        oracle = read_back(residual, folder, init_lora_weights=True)
        return Layout(folder, oracle, "lora_ga", deltas_OI=trained.deltas_OI)

    return write
