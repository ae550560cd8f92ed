"""A checkpoint that is not EMTAL's, not of the base, not faded or not harmless is refused, and nothing is left."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from motet.adapters.convert.emtal import convert
from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
    UnsafeFormatError,
    UnsupportedError,
)
from tests.support.emtal_vit import CHANNELS, HIDDEN, RANK, Official, official, tiny_vit


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_vit().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def found() -> Official:
    return official(tiny_vit())


def written(found: Official, base: Path, **options: Any) -> None:
    convert(found.save(base.parent / "model_best.pth.tar"), base, base.parent / "out", **options)


@pytest.mark.parametrize(
    ("rest", "options", "error", "message"),
    [
        (
            {"epoch": 53},
            {},
            UnsupportedError,
            r"epoch 53, where the fading is 0\.982: below 1, the router still .* 55 ",
        ),
        ({"epoch": 54, "version": 1}, {}, UnsupportedError, r"epoch 54, where the fading is 0\.982"),
        ({"epoch": 0}, {}, UnsupportedError, r"0\.018: .* --fading-epochs"),
        ({"epoch": 99}, {"fading_epochs": 101}, UnsupportedError, r"epoch 99, where the fading is 0\.990"),
        ({"epoch": None}, {}, ConfigError, "epoch=None"),
        ({"epoch": -1}, {}, ConfigError, "epoch=-1"),
        ({"epoch": True}, {}, ConfigError, "epoch=True"),
    ],
)
def test_a_router_that_had_not_faded(
    found: Official, base: Path, rest: dict[str, Any], options: dict[str, Any], error: type[AdapterError], message: str
) -> None:
    found.rest |= rest
    refused(found, base, error, message, **options)


@pytest.mark.parametrize("option", [{"resume": "last.pth.tar"}, {"start_epoch": 40}])
@pytest.mark.parametrize("kind", [Namespace, dict], ids=["namespace", "dictionary"])
def test_a_run_that_was_resumed(found: Official, base: Path, option: dict[str, Any], kind: Callable[..., Any]) -> None:
    """The official code counts the steps of the fading from 0 whenever it starts."""
    found.rest["args"] = kind(**{**vars(found.rest["args"]), **option})
    refused(found, base, UnsupportedError, "the run was resumed")


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("code of a pickle was run",))


@pytest.mark.parametrize("where", ["args", "state_dict", "whole", "in the namespace"])
def test_a_pickle_that_runs_code(found: Official, base: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = base.parent / "model_best.pth.tar"
    if where == "whole":
        file.write_bytes(pickle.dumps(Hostile()))
    elif where == "in the namespace":
        found.rest["args"].model = Hostile()
        found.save(file)
    else:
        torch.save({"state_dict": found.state, **found.rest, where: Hostile()}, file)
    with pytest.raises(UnsafeFormatError, match=r"model_best\.pth\.tar is no checkpoint of tensors") as caught:
        convert(file, base, base.parent / "out")
    assert "weights_only" not in str(caught.value)
    assert "was run" not in capsys.readouterr().out
    assert not (base.parent / "out").exists()


def test_a_class_of_no_harm_is_named(found: Official, base: Path) -> None:
    found.rest["args"] = Path("x")
    refused(found, base, UnsafeFormatError, r"it names pathlib\.\w+; save its tensors and options alone")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([1], UnsafeFormatError, "holds a list"),
        ({1: 2}, UnsafeFormatError, "not a dictionary of names"),
        ({"epoch": 99, "version": 2}, ConfigError, "the checkpoint has no state_dict of tensors"),
        ({"state_dict": {"x": 1}, "epoch": 99}, ConfigError, "the checkpoint has no state_dict of tensors"),
    ],
)
def test_what_is_no_checkpoint_of_timm(base: Path, content: Any, error: type[AdapterError], message: str) -> None:
    torch.save(content, base.parent / "model_best.pth.tar")
    with pytest.raises(error, match=message):
        convert(base.parent / "model_best.pth.tar", base, base.parent / "out")


State = dict[str, torch.Tensor]
WRONG: dict[str, tuple[Callable[[State], Any], type[AdapterError], str]] = {
    "another patch embedding": (
        lambda s: s["patch_embed.proj.weight"].add_(1),
        ConfigError,
        r"'patch_embed\.proj\.weight' of the checkpoint is not that of the base 'base'",
    ),
    "another norm": (lambda s: s["blocks.1.norm2.bias"].add_(1), ConfigError, r"'blocks\.1\.norm2\.bias' of"),
    "a changed bias of q": (lambda s: s["blocks.0.attn.qkv.bias"][:1].add_(1), ConfigError, r"0\.attn\.qkv\.bias' of"),
    "another projection": (lambda s: s["blocks.0.attn.proj.weight"].neg_(), ConfigError, r"0\.attn\.proj\.weight' of"),
    "other channels": (lambda s: s["blocks.1.mlp.fc1.weight"].add_(1), ConfigError, r"1\.mlp\.fc1\.weight' of"),
    "one other channel": (
        lambda s: s["blocks.1.mlp.fc1.weight"][7].add_(1),
        ConfigError,
        r"the rows of 'blocks\.1\.mlp\.fc1\.weight' are reordered, but 1 of 36 cannot be recognised",
    ),
    "a bias left in its place": (
        lambda s: s["blocks.0.mlp.fc1.bias"].copy_(s["blocks.0.mlp.fc1.bias"].flip(0)),
        ConfigError,
        r"0\.mlp\.fc1\.bias' of",
    ),
    "columns left in their places": (
        lambda s: s["blocks.0.mlp.fc2.weight"].copy_(s["blocks.0.mlp.fc2.weight"].flip(1)),
        ConfigError,
        r"0\.mlp\.fc2\.weight' of",
    ),
    "no pair": (lambda s: s.pop("blocks.1.attn.lora_qkv2"), MissingTensorError, r"blocks\.1\.attn\.lora_qkv2"),
    "no first pair": (lambda s: s.pop("blocks.0.mlp.lora_fc1_a"), MissingTensorError, "not one of EMTAL's"),
    "no router": (lambda s: s.pop("blocks.1.mlp.gate_weight_lora.weight"), MissingTensorError, "gate_weight_lora"),
    "no head": (lambda s: s.pop("head.weight"), MissingTensorError, r"head\.weight"),
    "no bias of the head": (lambda s: s.pop("head.bias"), MissingTensorError, r"head\.bias"),
    "no norm": (lambda s: s.pop("norm.weight"), MissingTensorError, r"'norm\.weight' is missing"),
    "half of the blocks": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.")],
        MissingTensorError,
        r"blocks\.1\.norm1\.weight",
    ),
    "a block too many": (
        lambda s: s.update({"blocks.2.norm1.weight": torch.ones(1)}),
        UnmatchedTensorError,
        "blocks.2",
    ),
    "a task router": (
        lambda s: s.update({"dataset_router_lora.conv.weight": torch.ones(1)}),
        UnmatchedTensorError,
        "dataset_router_lora",
    ),
    "another rank": (
        lambda s: s.update({"blocks.1.attn.lora_proj": torch.ones(HIDDEN, RANK + 1)}),
        ShapeError,
        r"lora_proj' has shape \[24, 4\], expected \[24, 3\]",
    ),
    "a pair transposed": (
        lambda s: s.update({"blocks.0.mlp.lora_fc2_a": torch.ones(RANK, CHANNELS)}),
        ShapeError,
        r"\[3, 36\], expected \[36, 3\]",
    ),
    "a first pair of no matrix": (
        lambda s: s.update({"blocks.0.mlp.lora_fc1_a": torch.ones(3)}),
        ShapeError,
        "a matrix",
    ),
    "a router that does not divide": (
        lambda s: s.update({"blocks.0.mlp.gate_weight_lora.weight": torch.ones(5, HIDDEN)}),
        ShapeError,
        "has 5 rows, which do not divide the 36 channels",
    ),
    "NaN": (lambda s: s["blocks.0.attn.lora_qkv"].fill_(torch.nan), NonFiniteError, "lora_qkv"),
    "NaN in the head": (lambda s: s["head.bias"].fill_(torch.nan), NonFiniteError, "head.bias"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_belong_together(
    found: Official, base: Path, change: Callable[[State], Any], error: type[AdapterError], message: str
) -> None:
    change(found.state)
    refused(found, base, error, message)


def test_another_base_is_named_by_its_first_difference(found: Official, tmp_path: Path) -> None:
    tiny_vit(seed=5).save_pretrained(tmp_path / "base")
    refused(
        found, tmp_path / "base", ConfigError, "tensor 'cls_token' of the checkpoint is not that of the base 'base'"
    )


def change_base(base: Path, change: Callable[[State], Any]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")


def test_a_base_of_fewer_digits(found: Official, base: Path) -> None:
    change_base(base, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    refused(found, base, ConfigError, "saved with fewer digits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinov2"}, "model_type='dinov2'; give a ViT"),
        ({"layer_norm_eps": 1e-12}, r"layer_norm_eps=1e-12, .* 1e-06, .* set it in the base's config\.json"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None"),
    ],
)
def test_a_base_that_computes_otherwise(found: Official, base: Path, changes: dict[str, Any], message: str) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(found, base, ConfigError, message)


def test_a_base_that_lacks_a_tensor(found: Official, base: Path) -> None:
    change_base(base, lambda tensors: tensors.pop("vit.layernorm.bias"))
    refused(found, base, MissingTensorError, r"the base has no tensor 'vit\.layernorm\.bias'")


def test_nothing_is_overwritten(found: Official, base: Path) -> None:
    (base.parent / "out").mkdir()
    with pytest.raises(AdapterExistsError, match="'out' is there already"):
        written(found, base)
    assert list((base.parent / "out").iterdir()) == []


def refused(found: Official, base: Path, error: type[AdapterError], message: str, **options: Any) -> None:
    """Refused, and nothing is left behind."""
    with pytest.raises(error, match=message):
        written(found, base, **options)
    assert sorted(path.name for path in base.parent.iterdir()) == ["base", "model_best.pth.tar"]
