"""Makes iLoRA's folder of what its official training leaves: a Lightning checkpoint and a SASRec module, both pickles.

Must not know: the base model, the registry. Nothing here is reached from a running server.

    llama_model.base_model.model.{module}.lora_{A,B}.default.weight  →  base_model.model.{module}.lora_{A,B}.weight
    router.*, projector.*                                            →  the same names in gate.safetensors
    the SASRec module's weights                                      →  sasrec.*

Left out, and counted: what decides nothing (the gate of its own that every layer has and the shared router replaces,
SASRec's ranking layer, batch norm's counters) and, of checkpoints that save all, the base model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from motet.adapters.convert.folder import new_folder, require_new
from motet.adapters.convert.inert_pickle import InertModule, read_module
from motet.adapters.convert.plain_pickle import read_plain_pickle
from motet.adapters.effects import GateSpec
from motet.adapters.errors import (
    ConfigError,
    CorruptSourceError,
    MissingTensorError,
    UnmatchedTensorError,
    UnsupportedError,
    listed,
)
from motet.adapters.gates import router
from motet.adapters.gates.instance import KIND, InstanceGate, part
from motet.adapters.methods.config_values import number
from motet.adapters.methods.ilora import parse
from motet.adapters.source import CONFIG_FILE, GATE_FILE, WEIGHTS_FILE

MODEL, SASREC = "llama_model.", "rec_model."
PAIR = re.compile(r"llama_model\.(base_model\.model\..+\.lora_[AB])\.[^.]+\.(weight)")
OWN_GATE = ".gating."
RANKING = ("s_fc.weight", "s_fc.bias")
PLACEHOLDERS = {"history": "[HistoryEmb]", "candidates": "[CansEmb]"}
"""What the official code adds to the tokenizer."""
REQUIRED: Mapping[str, object] = {"llm_tuning": "moelora", "router": "share", "rec_embed": "SASRec", "rec_size": 64}
"""Settings of the official code under which the gate is the one that is served; others crash or mean another model."""

SASREC_CLASSES = frozenset(
    {
        "__main__.SASRec",
        "recommender.A_SASRec_final_bce_llm.SASRec",
        "SASRecModules_ori.MultiHeadAttention",
        "SASRecModules_ori.PositionwiseFeedForward",
        *(
            f"torch.nn.modules.{name}"
            for name in "activation.Softmax conv.Conv1d dropout.Dropout linear.Linear normalization.LayerNorm "
            "sparse.Embedding".split()
        ),
    }
)
"""Classes that the official SASRec modules are made of."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was found in a checkpoint.

    Attributes:
        pairs: linears with an adapter.
        projected: whether items can stand for placeholder tokens.
        statistics: whether batch norm's statistics were saved; they are 0 and 1 otherwise.
        left_out: what kind of tensors → how many.
    """

    pairs: int
    projected: bool
    statistics: bool
    left_out: Mapping[str, int]


def ilora_checkpoint(
    checkpoint_file: Path, sasrec_file: Path, out_folder: Path, *, base_name: str | None = None
) -> Converted:
    """Write the folder that the checkpoint and its SASRec are.

    Args:
        checkpoint_file: Lightning's `.ckpt`; only tensors and plain values are read.
        sasrec_file: the whole module the checkpoint was trained with; none of its code runs.
        out_folder: is made.
        base_name: for the configuration; by default what the checkpoint says, without the folders before it.

    Raises:
        UnsafeFormatError, CorruptSourceError: a file holds more than tensors and plain values, or is damaged.
        UnsupportedError: the checkpoint was trained in a way whose gate is another.
        FormatError: the tensors are not those of iLoRA.
        AdapterExistsError: `out_folder` is there already.
    """
    require_new(out_folder)
    settings, state = _read_checkpoint(checkpoint_file)
    left_out: Counter[str] = Counter()
    pairs, trained = _sorted(state, left_out)
    sasrec = _sasrec(sasrec_file, state, left_out)
    gate = {**trained, **{f"sasrec.{name}": tensor for name, tensor in sasrec.items()}}
    config = {
        "peft_type": "ILORA",
        "base_model_name_or_path": base_name or _base_name(settings),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": _whole("lora_r", settings),
        "lora_alpha": number("lora_alpha", _setting("lora_alpha", settings)),
        "num_moe": _whole("num_moe", settings),
        "history_length": _rows(sasrec, "positional_embeddings.weight"),
        "items": _rows(sasrec, "item_embeddings.weight") - 1,
        "placeholders": PLACEHOLDERS,
    }
    _check(config, pairs, gate)
    _write(out_folder, config, pairs, gate)
    statistics = any(router.is_statistic(name) for name in gate)
    return Converted(len(pairs) // 2, bool(part(gate, "projector")), statistics, dict(left_out))


def _read_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings of the training, and the state."""
    content = read_plain_pickle(file)
    settings, state = (content.get(key) for key in _PARTS)
    if not isinstance(settings, dict) or not isinstance(state, dict):
        raise CorruptSourceError(f"{file.name} is no checkpoint of Lightning: it lacks {' or '.join(_PARTS)}")
    if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CorruptSourceError(f"{file.name} has something else than tensors in its state_dict")
    for key, value in REQUIRED.items():
        if settings.get(key) != value:
            raise UnsupportedError(
                f"the checkpoint was trained with {key}={settings.get(key)!r}; only {value!r} is read"
            )
    for key in ("peft_dir", "peft_config"):
        if settings.get(key) is not None:
            raise UnsupportedError(f"the checkpoint's rank and alpha stand in another file, {key}; train without it")
    return settings, state


_PARTS = ("hyper_parameters", "state_dict")


def _sorted(
    state: Mapping[str, torch.Tensor], left_out: Counter[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The pairs and the router's and projector's tensors by their new names; counts what is left out."""
    pairs: dict[str, torch.Tensor] = {}
    gate: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        if match := PAIR.fullmatch(name):
            pairs[f"{match[1]}.{match[2]}"] = tensor
        elif name.endswith(router.COUNTER):
            left_out["counters of batch norm"] += 1
        elif name.startswith(("router.", "projector.")):
            gate[name] = tensor
        elif name.startswith(MODEL) and OWN_GATE in name:
            left_out["gates of single layers, which the shared router replaces"] += 1
        elif name.startswith(MODEL) and ".lora_" not in name:
            left_out["weights of the base model"] += 1
        elif not name.startswith(SASREC):
            unknown.append(name)
    if unknown:
        raise UnmatchedTensorError(f"{len(unknown)} tensors of the checkpoint match no rule: {listed(unknown)}")
    return pairs, gate


def _sasrec(file: Path, state: Mapping[str, torch.Tensor], left_out: Counter[str]) -> dict[str, torch.Tensor]:
    """SASRec's weights; where the checkpoint has them too, they must be the same."""
    module = read_module(file, SASREC_CLASSES)
    if not module.name.endswith(".SASRec"):
        raise UnsupportedError(f"the module is a {module.name!r}; the gate reads SASRec's states only")
    _require_settings(module)
    for name, tensor in module.tensors.items():
        if SASREC + name in state and not torch.equal(state[SASREC + name].float(), tensor.float()):
            raise ConfigError(
                f"tensor {name!r} of the SASRec module is not the one in the checkpoint; give the module it was "
                "trained with"
            )
    left_out["layers of SASRec that rank items"] += sum(name in RANKING for name in module.tensors)
    return {name: tensor for name, tensor in module.tensors.items() if name not in RANKING}


def _require_settings(module: InertModule) -> None:
    """What the weights do not tell: one head, torch's epsilon."""
    expected: dict[str, object] = {"mh_attn.num_heads": 1}
    expected |= {name: 1e-5 for name in module.values if name.endswith(".eps")}
    for name, value in expected.items():
        if module.values.get(name) != value:
            raise UnsupportedError(
                f"the SASRec module has {name}={module.values.get(name)!r}; only {value!r} is served"
            )


def _setting(key: str, settings: Mapping[str, Any]) -> object:
    if key not in settings:
        raise ConfigError(f"the checkpoint's hyper_parameters have no {key!r}; it is no iLoRA checkpoint")
    return settings[key]


def _whole(key: str, settings: Mapping[str, Any]) -> int:
    """A whole number, which the official command line may have read as 8.0."""
    value = number(key, _setting(key, settings))
    if value != int(value):
        raise ConfigError(f"{key}={value!r} is not a whole number")
    return int(value)


def _base_name(settings: Mapping[str, Any]) -> str | None:
    """The base's name as the training knew it; of a path of the machine it ran on only the last part."""
    name = settings.get("llm_path")
    if not isinstance(name, str):
        return None
    return Path(name).name if Path(name).is_absolute() else name


def _rows(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    if name not in tensors or tensors[name].dim() != 2:
        raise MissingTensorError(f"the SASRec module has no matrix {name!r}; give the module of the official code")
    return tensors[name].shape[0]


def _check(config: Mapping[str, Any], pairs: Mapping[str, torch.Tensor], gate: Mapping[str, torch.Tensor]) -> None:
    """Refuse here what loading would refuse, as far as that needs no base."""
    experts = parse(config).experts
    if not pairs:
        raise MissingTensorError(f"the checkpoint has no tensor {MODEL}….lora_A.…; it is no iLoRA checkpoint")
    for name, tensor in pairs.items():
        partner = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if partner not in pairs:
            raise MissingTensorError(f"the checkpoint has {name!r} without {partner!r}; it is incomplete")
        if tensor.dim() != 2 or tensor.shape[0 if ".lora_A." in name else 1] != config["r"]:
            raise ConfigError(f"tensor {name!r} has shape {list(tensor.shape)}; lora_r={config['r']} does not fit it")
    last = gate.get("projector.mlp_proj.2.bias")
    facts = {name: config[name] for name in ("items", "history_length", "placeholders")}
    InstanceGate(GateSpec(KIND, experts, {}, gate, {**facts, "width": 0 if last is None else len(last)}))


def _write(
    out_folder: Path, config: Mapping[str, Any], pairs: Mapping[str, torch.Tensor], gate: Mapping[str, torch.Tensor]
) -> None:
    with new_folder(out_folder) as made:
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(_owned(pairs), made / WEIGHTS_FILE)
        save_file(_owned(gate), made / GATE_FILE)


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In memory of their own, which safetensors asks for."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
