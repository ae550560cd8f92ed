"""Writes a lowered adapter as a plain PEFT LoRA folder, which other servers and PEFT itself read.

Must not know: the method it came from, where it is served. The scale is in B already, so alpha = r everywhere; only
what a LoRA pair can say is written, and the rest is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from motet.adapters.effects import Lowered, LowRank
from motet.adapters.errors import ExportError, UnsupportedError
from motet.adapters.source import CONFIG_FILE, WEIGHTS_FILE

PREFIX = "base_model.model."
PAIR, EMBEDDING_PAIR = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
"""PEFT's names of A and B."""


def export_peft(
    lowered: Lowered,
    folder: Path,
    modules: Iterable[str],
    *,
    embedding: str | None = None,
    dtype: torch.dtype = torch.float32,
    base_name: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the folder appears whole or not at all.

    Args:
        folder: must not exist, or be empty.
        modules: paths of the base's modules, targets and others, so that target_modules names no other one.
        embedding: path of the input embedding, where that is a target; its tensors have other names.
        dtype: of the tensors, float32 or bfloat16.
        base_name, task_type: for the configuration's keys of these meanings.

    Raises:
        UnsupportedError: the adapter has an effect that a LoRA pair cannot say.
        ExportError: the folder is not empty or cannot be written.
    """
    pairs = _pairs(lowered)
    config = _config(pairs, modules)
    config |= {"base_model_name_or_path": base_name, "task_type": task_type}
    tensors: dict[str, torch.Tensor] = {}
    for target, pair in pairs.items():
        a_name, b_name = EMBEDDING_PAIR if target == embedding else PAIR
        tensors[f"{PREFIX}{target}.{a_name}"] = pair.a_RI.to(dtype, memory_format=torch.contiguous_format, copy=True)
        tensors[f"{PREFIX}{target}.{b_name}"] = pair.b_OR.to(dtype, memory_format=torch.contiguous_format, copy=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder.name!r} exists and is not an empty folder; choose another or remove it")
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        os.rename(unfinished, folder)  # takes the place of an empty folder, and of nothing else
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the disk is full or went away"
        raise ExportError(f"{folder.name!r} cannot be written: {reason}; choose another place") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def target_modules(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The shortest path endings by which PEFT finds exactly these targets among the modules.

    A module matches an ending that is its path, or stands after a dot at its end.

    Raises:
        UnsupportedError: a target's whole path is the ending of another module's.
    """
    wanted = frozenset(targets)
    others = {ending for module in _with_parents(wanted, modules) - wanted for ending in _endings(module)}
    found: set[str] = set()
    for target in sorted(wanted):
        ending = next((ending for ending in _endings(target) if ending not in others), None)
        if ending is None:
            raise UnsupportedError(f"{target!r} is the end of another module's path, so PEFT cannot name it alone")
        found.add(ending)
    return sorted(found)


def _endings(path: str) -> list[str]:
    """What PEFT finds a module by, shortest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _with_parents(targets: Iterable[str], modules: Iterable[str]) -> set[str]:
    """The modules and those that hold them, which may have no parameters of their own."""
    paths = [path.split(".") for path in (*targets, *modules)]
    return {".".join(parts[:stop]) for parts in paths for stop in range(1, len(parts) + 1)}


def _pairs(lowered: Lowered) -> dict[str, LowRank]:
    pairs: dict[str, LowRank] = {}
    if lowered.gate is not None:
        raise UnsupportedError(
            f"the adapter weighs its rank rows anew for each request (gate {lowered.gate.kind!r}), which a plain LoRA "
            "pair cannot say; export it with the gate fixed to one request's factors (--gate)"
        )
    if lowered.overlays:
        raise UnsupportedError(
            f"the adapter replaces {next(iter(lowered.overlays))!r} as a whole, which a plain LoRA pair cannot say; "
            "serve the adapter itself"
        )
    for target, effects in lowered.effects.items():
        for effect, name in (
            (effects.scale, "an output scale (as DoRA's)"),
            (effects.bias, "an output bias"),
            (effects.columns, "changed columns (as S²FT's)"),
            (effects.rows, "changed rows (as S²FT's)"),
            (effects.sign, "one bit a weight (approximate=1bit)"),
        ):
            if effect is not None:
                raise UnsupportedError(
                    f"target {target!r} has {name}, which a plain LoRA pair cannot say; serve the adapter itself"
                )
        if effects.low_rank is not None and effects.low_rank.rank:
            pairs[target] = effects.low_rank
    if not pairs:
        raise UnsupportedError("the adapter changes nothing, and PEFT has no such LoRA folder; train it first")
    return pairs


def _config(pairs: Mapping[str, LowRank], modules: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration; ranks that are not the most frequent one stand in the patterns, under whole paths."""
    ranks = Counter(pair.rank for pair in pairs.values())
    rank = min(ranks, key=lambda one: (-ranks[one], one))
    pattern = {f"^{re.escape(target)}": pair.rank for target, pair in pairs.items() if pair.rank != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": target_modules(pairs, modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }
