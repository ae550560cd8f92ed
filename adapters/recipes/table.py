"""RECIPES: what each method trains with unless told otherwise. Plain data.

Must not know: torch, PEFT, or how a method starts (`starts.py` has one function for each row).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Calibration = Literal["task", "knowledge"]
"""Texts that an initialisation looks at: those of the task to learn, or those of the knowledge to keep."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults of one method.

    Attributes:
        learning_rate: at its highest, after the warm-up.
        targets: last names of the linear layers that are adapted; none where the base's own parameters are trained, of
            which rank and alpha, then 0, say nothing either.
        saved_dtype: of the saved tensors. Where the initial pair is part of the base, the change is a difference of
            two pairs and bfloat16 would round most of it away.
        episodes: whether a step's rows are an episode, texts to tell apart by examples, and not questions to answer.
        peft: further fields of PEFT's LoraConfig.
    """

    summary: str
    learning_rate: float
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 150
    batch: int = 8
    saved_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    calibration: Calibration | None = None
    episodes: bool = False
    peft: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


RECIPES: Mapping[str, Recipe] = {
    "lora": Recipe("low-rank adaptation", 2e-3),
    "rslora": Recipe("LoRA scaled by alpha/sqrt(r)", 1e-3, alpha=8, peft={"use_rslora": True}),
    "dora": Recipe("LoRA with trained row norms", 1e-3, peft={"use_dora": True}),
    "eva": Recipe(
        "LoRA that starts in the directions of the task's activations",
        1e-3,
        calibration="task",
        peft={"init_lora_weights": "eva"},
    ),
    "pissa": Recipe(
        "the principal singular values, trained on the rest",
        1e-3,
        alpha=8,
        saved_dtype="float32",
        peft={"init_lora_weights": "pissa"},
    ),
    "olora": Recipe(
        "the first rows of a QR decomposition, trained on the rest",
        1e-3,
        alpha=8,
        saved_dtype="float32",
        peft={"init_lora_weights": "olora"},
    ),
    "corda-ipm": Recipe(
        "the directions most used by the task, trained on the rest",
        1e-3,
        alpha=8,
        saved_dtype="float32",
        calibration="task",
        peft={"init_lora_weights": "corda"},
    ),
    "corda-kpm": Recipe(
        "the directions least used by what the model knows, trained on the rest",
        1e-3,
        alpha=8,
        saved_dtype="float32",
        calibration="knowledge",
        peft={"init_lora_weights": "corda"},
    ),
    "polar": Recipe("orthonormal factors around a free core, trained on the landing field", 4e-3, alpha=32),
    "s2ft": Recipe("some channels and heads as they are, the rest without gradient", 1e-3, targets=("down_proj",)),
    "emtal": Recipe(
        "LoRA of several label-word tasks, learnt beside a router that fades",
        4e-3,
        rank=4,
        alpha=4,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "llara": Recipe(
        "LoRA that reads the items of a question beside their names",
        1e-3,
        alpha=32,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "ilora": Recipe(
        "LLaRA whose parts of the rank are weighed by the history of each row's user",
        1e-3,
        alpha=32,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "lora-head": Recipe(
        "LoRA with dropout and a plain head over the task's words",
        2e-3,
        saved_dtype="float32",
        peft={"lora_dropout": 0.1},
    ),
    "polar-vbll": Recipe(
        "PoLAR and a head whose weights have a covariance, learnt with it", 4e-3, alpha=32, saved_dtype="float32"
    ),
    "polar-vbll-diagonal": Recipe("the same, with variances alone", 4e-3, alpha=32, saved_dtype="float32"),
    "polar-vbll-lowrank": Recipe(
        "the same, with variances and three directions", 4e-3, alpha=32, saved_dtype="float32"
    ),
    "polar-laplace": Recipe(
        "polar-vbll, its covariance computed anew after training by Laplace's approximation",
        4e-3,
        alpha=32,
        saved_dtype="float32",
    ),
    "amt": Recipe(
        "a pool of LoRAs that tell texts apart by examples, each against stronger perturbations",
        2e-3,
        rank=4,
        alpha=4,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        steps=160,
        batch=40,
        saved_dtype="float32",
        episodes=True,
    ),
    "lisa": Recipe("whole layers, a few at a time, and the embedding: a whole model", 3e-4, 0, 0, targets=()),
    "full": Recipe("every parameter all the time: a whole model", 1e-4, 0, 0, targets=()),
}
"""Rank, targets, steps and batch are small enough for minutes on two cores."""
