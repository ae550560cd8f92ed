"""Which vision transformers are loaded, as what, and why others are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessorPil, ViTConfig, ViTModel

from motet.adapters.errors import ShapeError, UnmeasuredError, UnsupportedError
from motet.adapters.registry import Registry
from motet.adapters.spec import Declared, LossyForm
from motet.server import serve
from motet.server.api.measuring import no_score
from motet.server.commands import comparison
from motet.server.config import OptionError, ServeConfig
from motet.server.model.errors import ModelNotFoundError, UnsupportedModelError
from motet.server.model.vision import is_vision, load_vision, prepare_vision
from tests.support import emtal_vit
from tests.support.models import save_peft, tiny_llama
from tests.support.vision import answers, picture, pixels, processor, tiny_dinov2

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier of seven labels."""
    emtal_vit.tiny_vit().save_pretrained(tmp_path / "vit")
    processor().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def changed(folder: Path, file: str, **values: Any) -> Path:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))
    return folder


def load(folder: Path, dtype: str = "float32") -> Any:
    return load_vision(str(folder), "flowers", dtype, CPU)


def test_a_classifier(folder: Path) -> None:
    changed(folder, "config.json", id2label={str(at): f"flower {at}" for at in range(7)})
    assert is_vision(str(folder))
    loaded = load(folder)
    assert loaded.labels == tuple(f"flower {at}" for at in range(7))
    assert (loaded.tokens, loaded.pixels, loaded.dtype) == (5, (3, 16, 16), torch.float32)
    assert len(loaded.base.targets) == 2 * 6
    assert "classifier" not in loaded.base.targets
    assert {"classifier.weight", "classifier.bias", "vit.layernorm.weight"} <= loaded.base.replaceable
    assert not {"vit.embeddings.cls_token", "vit.layers.0.mlp.fc1.bias"} & loaded.base.replaceable
    with torch.inference_mode():
        feature_ND, logits_NC = loaded.forward(pixels(2))
    for index, (feature_D, logits_C) in enumerate(answers(emtal_vit.tiny_vit(), pixels(2))):
        torch.testing.assert_close(feature_ND[index], feature_D)
        torch.testing.assert_close(logits_NC[index], logits_C)


def test_bfloat16_on_request(folder: Path) -> None:
    loaded = load(folder, "bfloat16")
    assert loaded.dtype == torch.bfloat16
    with torch.inference_mode():
        assert loaded.forward(pixels(1))[0].dtype == torch.bfloat16


def test_a_pooler_is_left_out(tmp_path: Path) -> None:
    """Its linear sees one row an image; the feature is what goes into it."""
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=8)
    model = ViTModel(config, add_pooling_layer=True).eval()
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.labels == ()
    assert not [path for path in loaded.base.targets if "pooler" in path]
    with torch.inference_mode():
        feature_ND, logits = loaded.forward(pixels(1))
        expected_ND = model(pixel_values=pixels(1)).last_hidden_state[:, 0]
    assert logits is None
    torch.testing.assert_close(feature_ND, expected_ND)


def test_preprocessing_is_the_folder_s(tmp_path: Path) -> None:
    """Of DINOv2: the shorter side to 32, the middle of it, other means; positions are interpolated from 4 to 3."""
    own = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}, image_mean=[0.1] * 3)
    tiny_dinov2().save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.tokens, loaded.labels) == (10, ())
    for image in (picture(1), picture(2, 300, 40)):
        expected_NCHW = own(images=image, return_tensors="pt")["pixel_values"]
        assert torch.equal(loaded.preprocess(image), expected_NCHW[0])


def test_not_a_vision_transformer(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert not is_vision(str(tmp_path))
    assert not is_vision(str(tmp_path / "absent"))


def test_no_preprocessing(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"'flowers' has no preprocessing .*save its image processor"):
        load(folder)


def test_a_tensor_is_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 'classifier.weight', which would be random"):
        load(folder)


def test_two_labels_alike(folder: Path) -> None:
    changed(folder, "config.json", id2label={str(at): "flower" for at in range(7)})
    with pytest.raises(UnsupportedModelError, match="two classes of 'flowers' have one name"):
        load(folder)


@pytest.mark.parametrize("change", [{"problem_type": "multi_label_classification"}, {"id2label": {"0": "age"}}])
def test_a_head_that_does_not_choose_one_label(folder: Path, change: dict[str, Any]) -> None:
    changed(folder, "config.json", **change)
    tensors = load_file(folder / "model.safetensors")
    classes = len(change.get("id2label", range(7)))
    tensors |= {name: tensors[name][:classes] for name in ("classifier.weight", "classifier.bias")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="exactly one of at least two labels"):
        load(folder)


def test_images_of_several_sizes() -> None:
    uneven = BitImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False)
    with pytest.raises(UnsupportedModelError, match=r"images of several sizes, \(3, 24, 32\) and \(3, 40, 24\)"):
        prepare_vision(tiny_dinov2(), uneven, "flowers")


def test_images_of_another_size_than_the_model_takes() -> None:
    with pytest.raises(UnsupportedModelError, match="does not take what its preprocessing gives, 3 × 24 × 24"):
        prepare_vision(emtal_vit.tiny_vit(), processor(24), "flowers")


def test_a_linear_that_does_not_see_every_token() -> None:
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=8)
    with pytest.raises(UnsupportedModelError, match="do not all see every token"):
        prepare_vision(ViTModel(config, add_pooling_layer=True).eval(), processor(), "flowers")


def saved(tmp_path: Path, **options: Any) -> Path:
    return save_peft(emtal_vit.tiny_vit(), tmp_path / "adapter", LoraConfig(**options), seed=1)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"target_modules": ["fc1", "classifier"]}, UnsupportedError, "'classifier', which is not among the linear"),
        (
            {"target_modules": ["fc1"], "modules_to_save": ["embeddings"]},
            UnsupportedError,
            "embeddings.cls_token.*cannot be replaced for single rows",
        ),
        (
            {"target_modules": ["fc1"], "modules_to_save": ["o_proj"]},
            UnsupportedError,
            "o_proj.bias.*cannot be replaced for single rows",
        ),
    ],
)
def test_adapters_that_are_not_served(
    folder: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    registry = serve.new_registry(load(folder), 1 << 20)
    with pytest.raises(error, match=says):
        registry.load("refused", saved(tmp_path, **options))
    assert registry.residency.used_bytes == 0


def test_a_head_of_other_classes(folder: Path, tmp_path: Path) -> None:
    made = saved(tmp_path, target_modules=["fc1"], modules_to_save=["classifier"])
    tensors = load_file(made / "adapter_model.safetensors")
    tensors["base_model.model.classifier.weight"] = torch.ones(9, 24)
    save_file(tensors, made / "adapter_model.safetensors")
    with pytest.raises(ShapeError, match=r"classifier\.weight.*\[9, 24\]"):
        serve.new_registry(load(folder), 1 << 20).load("refused", made)


def test_the_error_of_a_lossy_form_cannot_be_measured(tmp_path: Path) -> None:
    model = emtal_vit.tiny_vit(qkv_bias=False)
    config = LoraConfig(target_modules=["fc1"], modules_to_save=["q_proj"])
    made = save_peft(model, tmp_path / "adapter", config, seed=1)
    loaded = prepare_vision(model, processor(), "flowers")
    registry = Registry(loaded.base, serve.new_residency(loaded, 1 << 20), score=no_score)
    with pytest.raises(UnmeasuredError, match="measured on texts, and the base model takes images"):
        registry.load("lossy", made, Declared(approximate=LossyForm.parse("svd-4")))
    assert registry.published() == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_memory": "8MiB"}, "--kv-memory 8MiB: 'vit' takes images and keeps no keys and values"),
        ({"block_size": 4}, "--block-size 4: 'vit' takes images"),
        ({"max_batch_rows": 4}, "--max-batch-rows 4: one image is 5 rows"),
    ],
)
def test_options_that_mean_nothing(folder: Path, options: dict[str, Any], says: str) -> None:
    threads = torch.get_num_threads()
    config = ServeConfig(str(folder), device="cpu", adapter_cache="off", adapter_memory="1MiB", **options)
    with pytest.raises(OptionError, match=says):
        serve.assemble(config, lambda _: None)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("options", "images"), [({}, 8), ({"max_batch_rows": 14}, 2), ({"max_batch_rows": 50, "max_generations": 3}, 3)]
)
def test_images_of_one_step(folder: Path, options: dict[str, Any], images: int) -> None:
    threads = torch.get_num_threads()
    config = ServeConfig(str(folder), device="cpu", adapter_cache="off", adapter_memory="1MiB", **options)
    steps = serve.assemble(config, lambda _: None).steps
    torch.set_num_threads(threads)
    assert (steps.limits.rows, steps.limits.generations) == (images, images)
    assert steps.summary == ("images", f"{images} of 5 rows in one step")


def test_there_is_nothing_to_verify(folder: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    config = ServeConfig(str(folder), device="cpu", adapter_memory="1MiB")
    with pytest.raises(OptionError, match="takes images: there are no log-probabilities"):
        comparison.of_folder(config, tmp_path, Declared(), None, ["a"], None, lambda _: None)
    torch.set_num_threads(threads)
