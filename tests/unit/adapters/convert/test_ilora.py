"""iLoRA's checkpoint and SASRec become a folder that means the same; neither pickle runs code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.convert.ilora import SASREC_CLASSES, Converted, ilora_checkpoint
from motet.adapters.convert.inert_pickle import read_module
from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    CorruptSourceError,
    MissingTensorError,
    NonFiniteError,
    UnmatchedTensorError,
    UnsafeFormatError,
    UnsupportedError,
)
from motet.adapters.gates.instance import InstanceGate, UserInput
from tests.support.layouts_ilora import GatedLayout, ilora
from tests.support.official_ilora import checkpoint, save_sasrec
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench

HISTORIES = [[5], [36, 0], list(range(10))]


@pytest.fixture
def layout(llama: Bench, tmp_path: Path) -> GatedLayout:
    """A folder that the official files below must become again; its router has batch norm with 0 and 1."""
    return ilora(llama.model, tmp_path / "expected", statistics=False, linears=["q_proj", "down_proj"])


def convert(layout: GatedLayout, content: object, base_name: str | None = None) -> Converted:
    folder = layout.folder.parent
    torch.save(content, folder / "last.ckpt")
    if not (folder / "sasrec.pt").exists():
        save_sasrec(layout.networks.sasrec, folder / "sasrec.pt")
    return ilora_checkpoint(folder / "last.ckpt", folder / "sasrec.pt", folder / "out", base_name=base_name)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "gate.safetensors")


def test_the_official_files_become_the_folder(llama: Bench, layout: GatedLayout) -> None:
    found = convert(layout, checkpoint(layout))
    assert found == Converted(
        pairs=4,
        projected=True,
        statistics=False,
        left_out={"gates of single layers, which the shared router replaces": 4, "layers of SASRec that rank items": 2},
    )
    out = layout.folder.parent / "out"
    expected, actual = tensors_of(layout.folder), tensors_of(out)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    config = json.loads((layout.folder / "adapter_config.json").read_text())
    written = json.loads((out / "adapter_config.json").read_text())
    assert written == {**config, "base_model_name_or_path": "llama2_7b_hf"}
    lowered = llama.lower(out)
    assert lowered.form == "iLoRA folder, batch-norm statistics 0 and 1"
    assert lowered.gate is not None
    factors_NK = InstanceGate(lowered.gate).factors([UserInput(history=history) for history in HISTORIES])
    expected_NK = torch.stack([layout.networks.weights(history) for history in HISTORIES])
    TOLERANCES["gate factors", torch.float32].assert_close(factors_NK, expected_NK)


def test_a_checkpoint_of_everything(llama: Bench, layout: GatedLayout) -> None:
    """Its statistics of batch norm are kept; the base, SASRec's copy and counters are left out."""
    found = convert(layout, checkpoint(layout, save_all=True), base_name="meta-llama/Llama-2-7b-hf")
    assert found.statistics
    assert found.left_out["weights of the base model"] == 4
    assert found.left_out["counters of batch norm"] == 19
    out = layout.folder.parent / "out"
    assert (
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "meta-llama/Llama-2-7b-hf"
    )
    assert llama.lower(out).form == "iLoRA folder, stored batch-norm statistics"


def test_a_checkpoint_without_a_projector(llama: Bench, layout: GatedLayout) -> None:
    assert not convert(layout, checkpoint(layout, projector=False)).projected
    assert llama.lower(layout.folder.parent / "out").form.endswith(", no projector")


def settings(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["hyper_parameters"].update(changes)


def state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: change(content["state_dict"])


def without(start: str) -> Callable[[dict[str, Any]], None]:
    return state(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(start)])


LORA_A = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[AdapterError], str]] = {
    "no settings": (lambda c: c.pop("hyper_parameters"), CorruptSourceError, "no checkpoint of Lightning"),
    "no state": (lambda c: c.pop("state_dict"), CorruptSourceError, "no checkpoint of Lightning"),
    "a state of other things": (
        lambda c: c["state_dict"].update(x=3),
        CorruptSourceError,
        "something else than tensors in its state_dict",
    ),
    "a gate for every layer": (settings(router="unshare"), UnsupportedError, "router='unshare'; only 'share' is read"),
    "plain LoRA": (settings(llm_tuning="lora"), UnsupportedError, "llm_tuning='lora'; only 'moelora' is read"),
    "another sequence model": (settings(rec_embed="GRU"), UnsupportedError, "rec_embed='GRU'; only 'SASRec' is read"),
    "a rank elsewhere": (settings(peft_config="x.json"), UnsupportedError, "stand in another file, peft_config"),
    "no rank": (lambda c: c["hyper_parameters"].pop("lora_r"), ConfigError, "have no 'lora_r'"),
    "half a rank": (settings(lora_r=8.5), ConfigError, "lora_r=8.5 is not a whole number"),
    "another rank": (settings(lora_r=4.0), ConfigError, r"shape \[8, 48\]; lora_r=4 does not fit it"),
    "experts that do not divide": (settings(num_moe=3), ConfigError, "num_moe=3 does not divide r=8"),
    "no router": (without("router."), MissingTensorError, "tensors of the router are missing"),
    "half a router": (without("router.layer2.1"), MissingTensorError, r"6 tensors of the router are missing"),
    "no pairs": (without("llama_model."), MissingTensorError, "has no tensor llama_model"),
    "half a pair": (
        without(LORA_A),
        MissingTensorError,
        r"without 'base_model.*q_proj\.lora_A\.weight'; it is incompl",
    ),
    "an adapter of the embedding": (
        state(lambda t: t.update({"llama_model.x.lora_embedding_A.default": torch.ones(1)})),
        UnmatchedTensorError,
        "match no rule: 'llama_model.x.lora_embedding_A.default'",
    ),
    "another part": (state(lambda t: t.update(other=torch.ones(1))), UnmatchedTensorError, "match no rule: 'other'"),
    "NaN": (
        state(lambda t: t["router.gate.fc.bias"].copy_(torch.tensor(torch.nan))),
        NonFiniteError,
        r"router\.gate\.fc\.bias",
    ),
    "another SASRec": (
        state(lambda t: t.update({"rec_model.ln_1.bias": torch.ones(64)})),
        ConfigError,
        r"'ln_1\.bias' of the SASRec module is not the one in the checkpoint",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_other_checkpoints_are_refused(
    layout: GatedLayout, change: Callable[[dict[str, Any]], Any], error: type[AdapterError], message: str
) -> None:
    content = checkpoint(layout)
    content["state_dict"] = {name: tensor.clone() for name, tensor in content["state_dict"].items()}
    change(content)
    with pytest.raises(error, match=message):
        convert(layout, content)
    assert not (layout.folder.parent / "out").exists()


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


def test_a_checkpoint_that_runs_code_is_refused(layout: GatedLayout, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = {**checkpoint(layout), "callbacks": Hostile(marker)}
    with pytest.raises(UnsafeFormatError, match=r"posix\.system"):
        convert(layout, content)
    torch.save(Hostile(marker), tmp_path / "sasrec.pt")
    with pytest.raises(UnsafeFormatError, match=r"posix\.system"):
        convert(layout, checkpoint(layout))
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: setattr(module.mh_attn, "num_heads", 2), "has mh_attn.num_heads=2; only 1 is served"),
        (lambda module: setattr(module.ln_2, "eps", 1e-6), "has ln_2.eps=1e-06; only 1e-05 is served"),
    ],
)
def test_a_sasrec_of_another_kind_is_refused(layout: GatedLayout, change: Callable[[Any], None], message: str) -> None:
    change(layout.networks.sasrec)
    with pytest.raises(UnsupportedError, match=message):
        convert(layout, checkpoint(layout))


def test_another_module_than_sasrec_is_refused(layout: GatedLayout, tmp_path: Path) -> None:
    save_sasrec(layout.networks.sasrec, tmp_path / "sasrec.pt", "__main__.GRU")
    with pytest.raises(UnsafeFormatError, match=r"names '__main__\.GRU'"):
        convert(layout, checkpoint(layout))
    torch.save(layout.networks.sasrec.ln_1, tmp_path / "sasrec.pt")
    with pytest.raises(UnsupportedError, match=r"the module is a 'torch\.nn\.modules\.normalization\.LayerNorm'"):
        convert(layout, checkpoint(layout))


def test_nothing_is_overwritten(layout: GatedLayout, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterExistsError, match="'out' is there already"):
        convert(layout, checkpoint(layout))


def test_the_official_pickle_has_the_tensors_of_its_conversion(lastfm: Path) -> None:
    found = read_module(lastfm / "sasrec_lastfm.pt", SASREC_CLASSES)
    expected = load_file(lastfm / "sasrec_lastfm.safetensors")
    assert found.name == "__main__.SASRec"
    assert found.values["mh_attn.num_heads"] == 1
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())
