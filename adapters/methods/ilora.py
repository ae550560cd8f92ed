"""iLoRA: LoRA of which the user's history decides, request by request, how much each part of the rank counts.

    y = W x + s Σ_k ω_k B_k A_k x,   s = alpha / (r / K),   ω = router(SASRec(history))

The K experts share the rank: expert k has rows k·r/K to (k+1)·r/K of A and those columns of B, so one pair with a gate
says it all. The scale is K times LoRA's: equal factors 1/K are plain LoRA. One ω holds for every layer and token.

The authors save pickles (`motet convert ilora` reads them); this is the small form:

    adapter_config.json         {"peft_type": "ILORA", "r": 8, "lora_alpha": 32, "num_moe": K, "history_length": 10,
                                 "items": 4606, "placeholders": {"history": "[HistoryEmb]", "candidates": "[CansEmb]"}}
    adapter_model.safetensors   base_model.model.{module}.lora_{A.weight [r, I], B.weight [O, r]}
    gate.safetensors            sasrec.*, router.*, projector.* (which may be absent)

Source: https://arxiv.org/abs/2408.10135 and the layout of the authors' code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.effects import GateSpec, Lowered, LowRank, TargetEffects
from motet.adapters.errors import (
    ConfigError,
    MissingTensorError,
    ShapeError,
    UnmatchedTensorError,
    UnsupportedError,
    listed,
)
from motet.adapters.gates.instance import KIND, InstanceGate
from motet.adapters.gates.router import COUNTER, is_statistic
from motet.adapters.methods.config_values import boolean, number, positive_int
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import GATE_FILE, AdapterFiles

NAME = "ilora"
PLACEHOLDERS = ("candidates", "history")
REQUIRED = ("history_length", "items", "lora_alpha", "num_moe", "peft_type", "placeholders", "r")
OPTIONAL = ("base_model_name_or_path", "inference_mode", "task_type")
PARTS = ("sasrec", "router", "projector")


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration.

    Attributes:
        experts: K, which divides the rank.
        items: how many there are; also the id of the padding.
        placeholders: "history" and "candidates" → the token in whose place an item's embedding stands.
    """

    rank: int
    alpha: float
    experts: int
    history_length: int
    items: int
    placeholders: Mapping[str, str]

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank // self.experts)


def claims(files: AdapterFiles) -> bool:
    """Whether the configuration names the form, or the one its authors' PEFT writes."""
    return files.config.get("peft_type") in ("ILORA", "MOELORA")


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Turn the pairs into low-rank effects, and the networks into a gate.

    Raises:
        UnsupportedError: the folder is of the authors' PEFT, which leaves out what computes the gate.
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    files.require_no_start(NAME)
    if files.config.get("peft_type") == "MOELORA":
        raise UnsupportedError(
            "a MOELORA folder has neither the router nor SASRec, so no request's gate can be computed from it; convert "
            "the Lightning checkpoint of the same training with 'motet convert ilora CHECKPOINT SASREC OUT'"
        )
    config = parse(files.config)
    bag = TensorBag(files.tensors)
    found = bag.modules_with(".lora_A.weight", ".lora_B.weight")
    linears = {name: target for name, target in base.targets.items() if target.kind is Kind.LINEAR}
    if strange := found - linears.keys():
        raise UnmatchedTensorError(f"{listed(strange, 1)} is not among the linear layers of {base.name!r}")
    effects = {name: TargetEffects(_pair(target, config, bag)) for name, target in linears.items() if name in found}
    bag.require_empty()
    if not effects:
        raise ConfigError("the folder holds no pair: the adapter would change nothing; save it again")
    tensors = {name: tensor for name, tensor in files.gate_tensors.items() if not name.endswith(COUNTER)}
    groups = {name: torch.arange(config.experts).repeat_interleave(config.rank // config.experts) for name in effects}
    return Lowered(
        method=NAME,
        form=_form(tensors),
        scaling="alpha/(r/K)",
        effects=effects,
        expected_targets=len(effects),
        gate=_gate(config, tensors, groups, width=next(iter(base.targets.values())).in_width),
    )


def parse(config: Mapping[str, Any]) -> Config:
    """Check every key of the configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value is impossible.
    """
    if unknown := config.keys() - {*REQUIRED, *OPTIONAL}:
        raise ConfigError(
            f"adapter_config.json has the unknown key {sorted(unknown)[0]!r}; an iLoRA folder has none such: remove it"
        )
    if absent := set(REQUIRED) - config.keys():
        raise ConfigError(f"adapter_config.json has no {sorted(absent)[0]!r}, which an iLoRA folder needs; add it")
    boolean(config, "inference_mode")
    for key in ("base_model_name_or_path", "task_type"):
        if not isinstance(config.get(key), str | None):
            raise ConfigError(f"{key}={config[key]!r} is neither a string nor null")
    rank, experts = (positive_int(key, config[key]) for key in ("r", "num_moe"))
    if rank % experts:
        raise ConfigError(f"num_moe={experts} does not divide r={rank}; every expert has the same share of the rank")
    return Config(
        rank,
        number("lora_alpha", config["lora_alpha"]),
        experts,
        positive_int("history_length", config["history_length"]),
        positive_int("items", config["items"]),
        _placeholders(config["placeholders"]),
    )


def _placeholders(value: object) -> dict[str, str]:
    if (
        not isinstance(value, dict)
        or sorted(value) != list(PLACEHOLDERS)
        or not all(isinstance(token, str) and token for token in value.values())
        or len(set(value.values())) != len(PLACEHOLDERS)
    ):
        raise ConfigError(f"placeholders={value!r} is not an object of two different tokens, candidates and history")
    return dict(value)


def _pair(target: Target, config: Config, bag: TensorBag) -> LowRank:
    a_RI = bag.take(f"{PREFIX}{target.name}.lora_A.weight", (config.rank, target.in_width))
    b_OR = bag.take(f"{PREFIX}{target.name}.lora_B.weight", (target.out_width, config.rank))
    return LowRank(a_RI, b_OR * config.scale)


def _gate(
    config: Config, tensors: Mapping[str, torch.Tensor], groups: Mapping[str, torch.Tensor], width: int
) -> GateSpec:
    """The gate, once its networks could be made of the tensors.

    Args:
        width: d, of the base's input embeddings: what its first linear reads.
    """
    if unknown := [name for name in tensors if name.partition(".")[0] not in PARTS]:
        raise UnmatchedTensorError(
            f"{len(unknown)} tensors of {GATE_FILE} match no rule: {listed(unknown)}; it holds {', '.join(PARTS)}"
        )
    for part in ("sasrec", "router"):
        if not any(name.startswith(f"{part}.") for name in tensors):
            raise MissingTensorError(
                f"the folder has no {part}: {GATE_FILE} has no tensor {part + '.*'!r}, so no request's gate can be "
                "computed; convert the checkpoint again, with its SASRec"
            )
    for key, value, name, rows in (
        ("items", config.items, "sasrec.item_embeddings.weight", config.items + 1),
        ("history_length", config.history_length, "sasrec.positional_embeddings.weight", config.history_length),
        ("num_moe", config.experts, "router.gate.fc.weight", config.experts),
    ):
        if name in tensors and tensors[name].dim() == 2 and tensors[name].shape[0] != rows:
            raise ShapeError(
                f"adapter_config.json says {key}={value}, so {name!r} should have {rows} rows, and has "
                f"{tensors[name].shape[0]}; they do not belong together"
            )
    facts = {
        "history_length": config.history_length,
        "items": config.items,
        "placeholders": dict(config.placeholders),
        "width": width,
    }
    spec = GateSpec(KIND, config.experts, groups, tensors, facts)
    InstanceGate(spec)
    return dataclasses.replace(spec, tensors={name: tensor.float() for name, tensor in tensors.items()})


def _form(tensors: Mapping[str, torch.Tensor]) -> str:
    stored = any(is_statistic(name) for name in tensors)
    statistics = "stored batch-norm statistics" if stored else "batch-norm statistics 0 and 1"
    projected = any(name.startswith("projector.") for name in tensors)
    return f"iLoRA folder, {statistics}{'' if projected else ', no projector'}"
