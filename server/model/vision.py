"""Loads a vision transformer once and makes it ready to serve: linears adapted, preprocessing known to be regular.

Must not know: requests, adapters' methods, HTTP, how files become images.

Shapes: N images, T tokens of an image (the class token and the patches), D width, C classes, 3 colours, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils.logging import disable_progress_bar

from motet.adapters.base import BaseModel
from motet.server.model.base import base_model, targets_of
from motet.server.model.errors import ModelNotFoundError, UnsupportedModelError
from motet.server.model.fingerprint import fingerprint
from motet.server.model.inject import ActiveStep, inject
from motet.server.model.loader import choose_dtype
from motet.server.model.overlay import OverlaidModules, OverlayPlan

CLASSIFIER = "classifier"
"""Path of the output head in transformers' image classifiers."""
BACKBONES: Mapping[str, tuple[type[Any], type[Any], Mapping[str, Any]]] = {
    "vit": (ViTModel, ViTForImageClassification, {"add_pooling_layer": False}),
    "dinov2": (Dinov2Model, Dinov2ForImageClassification, {}),
}
"""model_type → the class without a head, the classifier, and options of the former. ViT's pooler is no feature here."""
PROBES = ((40, 30), (30, 50))
"""Width and height of the images that the preprocessing is tried with."""


class PositionStep:
    """Where modules whose rows are images find the replacements of the step that runs."""

    def __init__(self) -> None:
        self.overlays: OverlayPlan | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedVision:
    """The resident base.

    Attributes:
        base: what adapters may know of it; the classifier is no target, but its parameters can be replaced.
        step, position_step: where the linears, and the other modules, find the step that runs.
        tokens: T.
        labels: of the classes; none where the model is no classifier.
    """

    name: str
    model: nn.Module
    processor: Any
    base: BaseModel
    step: ActiveStep
    position_step: PositionStep
    overlaid: OverlaidModules
    class_token: ClassToken
    tokens: int
    pixels: torch.Size
    labels: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    parameter_bytes: int

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """[3, H, W] float32 of an RGB image, by the model folder's own preprocessing."""
        return _preprocessed(self.processor, image)

    def forward(self, pixels_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N, D] class tokens after the final norm, and [N, C] logits where the model is a classifier."""
        output = self.model(pixel_values=pixels_NCHW.to(self.device, self.dtype))
        return self.class_token.take(), output.logits if self.labels else None


class ClassToken:
    """Listens to the backbone, whose output is what the final norm gave."""

    def __init__(self, backbone: nn.Module) -> None:
        self._found_ND: torch.Tensor | None = None
        backbone.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._found_ND = output.last_hidden_state[:, 0]

    def take(self) -> torch.Tensor:
        """[N, D] of the forward that ran."""
        found_ND, self._found_ND = self._found_ND, None
        assert found_ND is not None
        return found_ND


def is_vision(path: str) -> bool:
    """Whether the model at this place is one that is loaded here; False where nobody can tell."""
    try:
        return AutoConfig.from_pretrained(path).model_type in BACKBONES
    except (OSError, ValueError):
        return False


def load_vision(path: str, name: str, dtype: str, device: torch.device) -> LoadedVision:
    """Load a ViT or DINOv2, with the classifier where it was saved with one.

    Args:
        path: a directory or a hub id.
        name: what requests call it.
        dtype: "auto" or a torch dtype's name.

    Raises:
        ModelNotFoundError: there is no such model, or no preprocessing beside it.
        UnsupportedModelError: it cannot be served exactly.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(path)
        backbone, classifier, options = BACKBONES[config.model_type]
        is_classifier = classifier.__name__ in (config.architectures or ())
        chosen, more = (classifier, {}) if is_classifier else (backbone, options)
        resolved = choose_dtype(dtype, device, config)
        model, found = chosen.from_pretrained(path, dtype=resolved, output_loading_info=True, **more)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"model {name!r} cannot be loaded as a vision transformer: {error}") from error
    if found["missing_keys"]:
        raise UnsupportedModelError(
            f"model {name!r} lacks {min(found['missing_keys'])!r}, which would be random; save the whole model again"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model {name!r} has no preprocessing that can be loaded ({error}); save its image processor beside it"
        ) from error
    return prepare_vision(model.to(device).eval(), processor, name)


def prepare_vision(model: Any, processor: Any, name: str) -> LoadedVision:
    """Make a loaded transformers model ready to serve.

    Raises:
        UnsupportedModelError: its linears do not see one row for each token of an image, or its preprocessing gives
            images of several sizes.
    """
    probes = [_preprocessed(processor, Image.new("RGB", size, (90, 20, 200))) for size in PROBES]
    shapes = sorted({tuple(pixels.shape) for pixels in probes})
    if len(shapes) != 1:
        raise UnsupportedModelError(
            f"the preprocessing of {name!r} gives images of several sizes, {shapes[0]} and {shapes[1]}; images of one "
            "step have one size: resize to a fixed one, or crop"
        )
    labels = _labels(model.config, name) if CLASSIFIER in dict(model.named_children()) else ()
    backbone = getattr(model, model.base_model_prefix) if labels else model
    class_token = ClassToken(backbone)
    linears = {path: one for path, one in model.named_modules() if type(one) is nn.Linear and path != CLASSIFIER}
    with torch.inference_mode():
        tokens = _tokens(model, name, linears, torch.stack(probes))
        step, position_step = ActiveStep(), PositionStep()
        digest = fingerprint(model)
        adapted = inject(model, step, None, step, left_out=[CLASSIFIER])
    others = {
        path: module
        for path, module in model.named_modules()
        if path not in adapted and any(True for _ in module.parameters(recurse=False)) and not any(module.children())
    }
    return LoadedVision(
        name=name,
        model=model,
        processor=processor,
        base=base_model(name, digest, model, targets_of(adapted, None, None), others),
        step=step,
        position_step=position_step,
        overlaid=OverlaidModules(others, position_step, dict.fromkeys(others, 0)),
        class_token=class_token,
        tokens=tokens,
        pixels=probes[0].shape,
        labels=labels,
        dtype=model.dtype,
        device=model.device,
        parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def _preprocessed(processor: Any, image: Image.Image) -> torch.Tensor:
    pixels_CHW: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels_CHW


def _labels(config: Any, name: str) -> tuple[str, ...]:
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise UnsupportedModelError(
            f"{name!r} has num_labels={config.num_labels} and problem_type={config.problem_type!r}; a classifier is "
            "served where exactly one of at least two labels is right"
        )
    labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    if len(set(labels)) < len(labels):
        raise UnsupportedModelError(f"two classes of {name!r} have one name; correct id2label in its config.json")
    return labels


def _tokens(model: Any, name: str, linears: Mapping[str, nn.Module], pixels_NCHW: torch.Tensor) -> int:
    """T, which every linear must see of every image, so that one plan of rows is right for all of them."""
    shapes: dict[str, torch.Size] = {}

    def look(path: str) -> Any:
        return lambda _, inputs: shapes.__setitem__(path, inputs[0].shape[:-1])

    handles = [module.register_forward_pre_hook(look(path)) for path, module in linears.items()]
    try:
        model(pixel_values=pixels_NCHW.to(model.device, model.dtype))
    except (ValueError, RuntimeError) as error:
        size = " × ".join(map(str, pixels_NCHW.shape[1:]))
        raise UnsupportedModelError(f"{name!r} does not take what its preprocessing gives, {size}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    found = set(shapes.values())
    if len(found) != 1 or len(shapes) != len(linears) or len(shape := found.pop()) != 2 or shape[0] != len(pixels_NCHW):
        raise UnsupportedModelError(f"the linear layers of {name!r} do not all see every token of an image")
    return int(shape[1])
