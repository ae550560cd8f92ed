"""Tiny vision transformers with adapters, served in one process and stepped by hand; and images made from nothing.

What each adapter means is computed by PEFT, or by the hand-written forwards of `amt_vit` and `emtal_vit`.
"""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model, ViTImageProcessorPil

from motet.adapters.convert import amt, emtal
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.server.api.image_inputs import PLACE
from motet.server.api.scoring import FEATURE
from motet.server.bases import vision_steps
from motet.server.config import ServeConfig
from motet.server.engine.blocks import BlockPool
from motet.server.engine.engine import Engine
from motet.server.engine.scheduler import Scheduler
from motet.server.engine.types import Applied, GenerationId, GivenInput, TokenEvent
from motet.server.model.vision import prepare_vision
from motet.server.serve import new_residency
from tests.support import amt_vit, emtal_vit
from tests.support.models import save_peft

Using = tuple[str, tuple[float, ...] | None] | None
"""An adapter and its gate, or the base."""
Answer = tuple[torch.Tensor, torch.Tensor | None]
"""Feature [D], and logits [C] of a classifier."""

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
LORAS: dict[str, dict[str, Any]] = {
    "narrow": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 8, "lora_alpha": 8, "target_modules": LINEARS, "bias": "lora_only"},
    "dora": {"r": 4, "lora_alpha": 4, "use_dora": True, "target_modules": ["o_proj", "fc1"]},
}
"""Of any base."""
SAVED: dict[str, dict[str, Any]] = {
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["fc2"], "modules_to_save": ["classifier"]},
    "norms": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["k_proj"],
        "modules_to_save": ["layernorm", "projection", "classifier"],
    },
}
"""Of a classifier."""


def processor(size: int = emtal_vit.IMAGE) -> Any:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def tiny_dinov2(seed: int = 0, head: bool = False, **changes: Any) -> Any:
    """DINOv2 with layer scales that matter and a grid of positions that is interpolated: 3 × 3 patches of 4 × 4."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_labels=5,
        **changes,
    )
    model = Dinov2ForImageClassification(config) if head else Dinov2Model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if "lambda" in name or "norm" in name:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def picture(seed: int, width: int = 21, height: int = 17) -> Image.Image:
    """Smooth random colours."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def data_url(image: Image.Image, kind: str = "png", **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def pixels(count: int, size: int = emtal_vit.IMAGE) -> torch.Tensor:
    """[N, 3, H, W], as preprocessed images are."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(11))


def save_loras(model: Any, root: Path, configs: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """PEFT's own folders of adapters with random weights."""
    return {
        name: save_peft(model, root / name, LoraConfig(**options), seed, strength=0.3)
        for seed, (name, options) in enumerate(configs.items(), 50)
    }


@torch.no_grad()
def answers(model: Any, pixels_NCHW: torch.Tensor) -> list[Answer]:
    """What transformers computes, one image at a time; PEFT's model too."""
    whole = model.base_model.model if isinstance(model, PeftModel) else model
    found: list[Answer] = []
    for pixels_CHW in pixels_NCHW:
        backbone = getattr(whole, whole.base_model_prefix, whole)
        feature_D = backbone(pixel_values=pixels_CHW[None]).last_hidden_state[0, 0]
        output = model(pixel_values=pixels_CHW[None])
        found.append((feature_D, output.logits[0] if "logits" in output else None))
    return found


def peft_answers(model: Any, folder: Path, pixels_NCHW: torch.Tensor) -> list[Answer]:
    return answers(PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval(), pixels_NCHW)


def write_pool(model: Any, root: Path) -> tuple[Path, amt_vit.Official]:
    """A pool of three members as AMT's authors save it, converted for the model; and what it was converted from."""
    state = amt_vit.dino_names(model)
    official, base = amt_vit.official(state, members=3), amt_vit.save(state, root / "dino.pth")
    prefix = "vit." if hasattr(model, "vit") else ""
    amt.convert([amt_vit.save(official.packed(), root / "merge.pth")], base, root / "pool", prefix=prefix)
    return root / "pool", official


def write_emtal(model: Any, root: Path) -> tuple[Path, emtal_vit.Official]:
    """A faded adapter as EMTAL's authors save it, converted; and what it was converted from."""
    official = emtal_vit.official(model)
    model.save_pretrained(root / "vit")
    emtal.convert(official.save(root / "model_best.pth.tar"), root / "vit", root / "emtal")
    return root / "emtal", official


class VisionHarness:
    """The real engine, runner and registry in one process, stepped by hand."""

    def __init__(self, model: Any, size: int = emtal_vit.IMAGE, images: int = 64) -> None:
        self.loaded = prepare_vision(model, processor(size), "base")
        residency = new_residency(self.loaded, 64 << 20)
        self.registry = Registry(self.loaded.base, residency)
        config = ServeConfig(max_batch_rows=images * self.loaded.tokens)
        self.steps = vision_steps(config, self.loaded, residency)
        self.blocks = BlockPool(self.steps.blocks, self.steps.block_size)
        scheduler = Scheduler(self.blocks, self.steps.limits, self.registry.tiers)
        self.engine = Engine(scheduler, self.steps.runner, self._publish, self._end_lease)
        self.events: dict[GenerationId, TokenEvent] = {}
        self._next = 0

    def ask(self, requests: Sequence[tuple[torch.Tensor, Using]]) -> list[TokenEvent]:
        """The events of images and what each is computed with, all submitted at once."""
        asked: list[GenerationId] = []
        for pixels_CHW, using in requests:
            generation = GenerationId(self._next)
            self._next += 1
            applied = [] if using is None else [Applied(self.registry.acquire(using[0]), using[1])]
            given = {PLACE: GivenInput(self._next, pixels_CHW)}
            self.engine.submit(generation, [PLACE], FEATURE, applied, given)
            asked.append(generation)
        for _ in asked:  # each step ends at least one
            self.engine.step()
        return [self.events.pop(generation) for generation in asked]

    def answers(self, requests: Sequence[tuple[torch.Tensor, Using]]) -> list[Answer]:
        events = self.ask(requests)
        assert all(event.error is None for event in events), events
        return [(event.feature, event.class_logits) for event in events]

    def nothing_is_held(self) -> None:
        assert self.blocks.spare == self.blocks.size
        assert all(info.leases == 0 for info in self.registry.published())

    def _publish(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            assert event.finish is not None
            assert event.generation not in self.events
            self.events[event.generation] = event

    def _end_lease(self, lease: Any) -> None:
        assert isinstance(lease, Lease)
        self.registry.release(lease)


Oracle = Callable[[torch.Tensor], list[Answer]]
