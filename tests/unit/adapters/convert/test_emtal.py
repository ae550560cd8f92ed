"""An official EMTAL checkpoint becomes a LoRA folder with which PEFT computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification, ViTModel

from motet.adapters.convert.emtal import convert
from tests.support.emtal_vit import CHANNELS, CLASSES, IMAGE, RANK, Official, official, timm_forward, tiny_vit
from tests.support.tolerances import TOLERANCES

IMAGES = torch.randn(5, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(3))
CLOSE = TOLERANCES["logits of a converted ViT", torch.float32]


@pytest.fixture(scope="module")
def vit() -> Any:
    return tiny_vit()


@pytest.fixture
def base(vit: Any, tmp_path: Path) -> Path:
    """The folder that transformers itself writes."""
    vit.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def found(vit: Any) -> Official:
    return official(vit)


@torch.no_grad()
def peft_logits(folder: Path, adapter: Path) -> torch.Tensor:
    """What PEFT computes with the adapter on the base as transformers loads it."""
    model = ViTForImageClassification.from_pretrained(folder, num_labels=CLASSES)
    return PeftModel.from_pretrained(model, str(adapter)).eval()(pixel_values=IMAGES).logits


def written(found: Official, base: Path, **options: Any) -> Path:
    """The converted folder; the checkpoint lies beside it."""
    out = base.parent / "out"
    convert(found.save(base.parent / "model_best.pth.tar"), base, out, **options)
    return out


def test_peft_computes_what_the_checkpoint_does(found: Official, base: Path) -> None:
    """Its raw weights with a faded router; averaged ones beside them would be far off."""
    expected = timm_forward(found.state, IMAGES)
    assert 1 < expected.abs().max() < 4
    CLOSE.assert_close(peft_logits(base, written(found, base)), expected)


def test_the_comparison_means_something(vit: Any, found: Official) -> None:
    """The base alone, a router that has not faded, and channels left in clusters are all far above the tolerance."""
    expected = timm_forward(found.state, IMAGES)
    head = {name: found.state[f"head.{name}"] for name in ("weight", "bias")}
    base_alone = torch.nn.functional.linear(vit.vit(pixel_values=IMAGES).last_hidden_state[:, 0], **head)
    assert (base_alone - expected).abs().max() > 0.1
    assert (timm_forward(found.state, IMAGES, fading=0.9) - expected).abs().max() > 100 * CLOSE.atol
    for name in ("lora_fc1_b", "lora_fc2_a"):
        moved = dict(found.state)
        pair = moved[f"blocks.0.mlp.{name}"]
        moved[f"blocks.0.mlp.{name}"] = pair.flip(pair.shape.index(CHANNELS))
        assert (timm_forward(moved, IMAGES) - expected).abs().max() > 100 * CLOSE.atol


def test_what_is_written(found: Official, base: Path) -> None:
    out = written(found, base)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (RANK, RANK, ["classifier"])
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 6 + 2
    stem = "base_model.model.vit.layers.1."
    shared = [tensors[f"{stem}attention.{part}_proj.lora_A.weight"] for part in "qkv"]
    assert all(torch.equal(each, found.state["blocks.1.attn.lora_qkv"].T) for each in shared)
    assert torch.equal(tensors["base_model.model.classifier.weight"], found.state["head.weight"])
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in base.parent.iterdir()) == ["base", "model_best.pth.tar", "out"]


NEW_NAMES = {
    "vit.encoder.layer.": "vit.layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def renamed(base: Path, change: Callable[[str], str | None]) -> Path:
    """The base with its tensors under other names, in a folder of its own."""
    folder = base.parent / "renamed"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({new: t for name, t in tensors.items() if (new := change(name))}, folder / "model.safetensors")
    return folder


def as_in_transformers_5(name: str) -> str:
    for old, new in NEW_NAMES.items():
        name = name.replace(old, new)
    return name


def as_before(name: str) -> str:
    for old, new in reversed(NEW_NAMES.items()):
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize(
    ("spelling", "query"),
    [
        (as_in_transformers_5, "vit.layers.0.attention.q_proj.weight"),
        (as_before, "vit.encoder.layer.0.attention.attention.query.weight"),
    ],
)
def test_either_spelling_of_the_base(found: Official, base: Path, spelling: Callable[[str], str], query: str) -> None:
    folder = renamed(base, spelling)
    assert query in load_file(folder / "model.safetensors")
    convert(found.save(base.parent / "model_best.pth.tar"), folder, base.parent / "out")
    CLOSE.assert_close(peft_logits(base, base.parent / "out"), timm_forward(found.state, IMAGES))


def test_a_base_without_a_head(vit: Any, found: Official, base: Path) -> None:
    """As most are published; its pooler means nothing here."""
    bare = ViTModel(vit.config, add_pooling_layer=True)
    bare.load_state_dict(vit.vit.state_dict(), strict=False)
    bare.save_pretrained(base.parent / "bare")
    convert(found.save(base.parent / "model_best.pth.tar"), base.parent / "bare", base.parent / "out")
    CLOSE.assert_close(peft_logits(base, base.parent / "out"), timm_forward(found.state, IMAGES))


def test_a_base_without_biases_of_q_k_v(tmp_path: Path) -> None:
    model = tiny_vit(qkv_bias=False)
    model.save_pretrained(tmp_path / "base")
    found = official(model)
    assert "blocks.0.attn.qkv.bias" not in found.state
    CLOSE.assert_close(
        peft_logits(tmp_path / "base", written(found, tmp_path / "base")), timm_forward(found.state, IMAGES)
    )


def test_channels_in_the_base_s_order(vit: Any, found: Official, base: Path) -> None:
    """Without a clustered base the official code trains on the channels as they are."""
    for layer, block in enumerate(vit.vit.layers):
        found.state |= {
            f"blocks.{layer}.mlp.fc1.weight": block.mlp.fc1.weight.detach(),
            f"blocks.{layer}.mlp.fc1.bias": block.mlp.fc1.bias.detach(),
            f"blocks.{layer}.mlp.fc2.weight": block.mlp.fc2.weight.detach(),
        }
    CLOSE.assert_close(peft_logits(base, written(found, base)), timm_forward(found.state, IMAGES))


@pytest.mark.parametrize(
    ("rest", "options"),
    [
        ({"epoch": 54}, {}),
        ({"epoch": 55, "version": 1}, {}),
        ({"epoch": 9}, {"fading_epochs": 10}),
        ({"args": None}, {}),
    ],
    ids=["exactly faded", "epochs counted from 1", "a shorter run", "without options"],
)
def test_a_faded_router(found: Official, base: Path, rest: dict[str, Any], options: dict[str, Any]) -> None:
    found.rest |= rest
    assert written(found, base, **options).is_dir()
