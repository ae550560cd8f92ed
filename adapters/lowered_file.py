"""A lowered adapter as bytes and back, bit by bit: safetensors, with the facts in its metadata.

Must not know: where the bytes are kept or sent. safetensors has no checksum, so the metadata holds one over everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from safetensors.torch import save

from motet.adapters.bounded import Limits, parse_tensors
from motet.adapters.effects import (
    ColumnSparse,
    GateSpec,
    Lowered,
    LowRank,
    OutputBias,
    OutputScale,
    RowSparse,
    SignDelta,
    TargetEffects,
)
from motet.adapters.errors import CorruptSourceError

FORMAT = 3
"""Raise it when the names or facts below change their meaning."""
WHAT = "the lowered adapter"
PARTS: Mapping[str, tuple[Callable[..., Any], Mapping[str, str]]] = {
    "low_rank": (LowRank, {"A": "a_RI", "B": "b_OR"}),
    "scale": (OutputScale, {"scale": "delta_O"}),
    "bias": (OutputBias, {"bias": "bias_O"}),
    "columns": (ColumnSparse, {"columns.idx": "index_S", "columns.V": "v_OS"}),
    "rows": (RowSparse, {"rows.idx": "index_S", "rows.V": "v_SI"}),
    "sign": (SignDelta, {"sign.words": "word_OP", "sign.alpha": "alpha_1"}),
}
"""Field of TargetEffects → its type, and name in the file → operand. An effect that is not here cannot be written."""
OVERLAY = "overlay:"
"""Before the path of a replaced parameter; one that two modules share is written once."""
GATE_TENSOR, GATE_GROUPS = "gate:", "gate-groups:"
"""Before the name of a tensor that gate factors are computed from; before the target of a list of groups."""
FACTS = ("method", "form", "scaling", "expected_targets", "exact", "vocabulary")
_LIMITS = Limits(header_bytes=64 << 20, weights_bytes=1 << 40, tensors=1_000_000)
"""Room for anything that was lowered: the source was limited already."""


def dump(lowered: Lowered) -> bytes:
    """The same bytes for the same adapter."""
    tensors: dict[str, torch.Tensor] = {}
    for target, effects in lowered.effects.items():
        for part, tensor in _parts(effects).items():
            tensors[f"{target}.{part}"] = tensor.clone(memory_format=torch.contiguous_format)
    first_paths: dict[int, str] = {}
    shared = {path: first_paths.setdefault(id(values), path) for path, values in lowered.overlays.items()}
    for path in sorted(set(shared.values())):
        tensors[OVERLAY + path] = lowered.overlays[path].clone(memory_format=torch.contiguous_format)
    facts = {name: getattr(lowered, name) for name in FACTS}
    facts |= {"targets": list(lowered.effects), "overlays": shared, "gate": None}
    if lowered.gate is not None:
        gate, parts = _gate_parts(lowered.gate)
        facts["gate"] = gate
        tensors |= parts
    text = json.dumps({"format": FORMAT, **facts})
    # One entry only: safetensors writes several in random order.
    metadata = {"motet": json.dumps({"facts": text, "sha256": _checksum(text, tensors)})}
    return save(tensors, metadata)


def parse(content: bytes) -> Lowered:
    """What `dump` was given.

    Raises:
        CorruptSourceError: the content is damaged, or something else.
    """
    tensors = parse_tensors(WHAT, content, _LIMITS)
    text, checksum = _metadata(content)
    if checksum != _checksum(text, tensors):
        raise CorruptSourceError(f"{WHAT} does not have the checksum it was written with; lower the adapter again")
    try:
        facts = json.loads(text)
        if facts["format"] != FORMAT:
            raise CorruptSourceError(f"{WHAT} is not of format {FORMAT}; lower the adapter again with this version")
        effects = {target: _effects(target, tensors) for target in facts["targets"]}
        overlays = {path: tensors[OVERLAY + first] for path, first in facts["overlays"].items()}
        gate = _gate(facts["gate"], tensors)
        return Lowered(effects=effects, overlays=overlays, gate=gate, **{name: facts[name] for name in FACTS})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{WHAT} has other facts than motet writes; lower the adapter again") from error


def _parts(effects: TargetEffects) -> dict[str, torch.Tensor]:
    """Name in the file → tensor."""
    parts: dict[str, torch.Tensor] = {}
    for field in fields(effects):
        if (effect := getattr(effects, field.name)) is not None:
            parts |= {part: getattr(effect, operand) for part, operand in PARTS[field.name][1].items()}
    return parts


def _effects(target: str, tensors: Mapping[str, torch.Tensor]) -> TargetEffects:
    found = {
        name: kind(**{operand: tensors[f"{target}.{part}"] for part, operand in parts.items()})
        for name, (kind, parts) in PARTS.items()
        if any(f"{target}.{part}" in tensors for part in parts)
    }
    return TargetEffects(**found)


def _gate_parts(gate: GateSpec) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What is said of a gate in the facts, and its tensors by their names in the file."""
    tensors = {GATE_TENSOR + name: tensor for name, tensor in gate.tensors.items()}
    tensors |= {GATE_GROUPS + target: group_R for target, group_R in gate.groups.items()}
    contiguous = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    facts = {"kind": gate.kind, "size": gate.size, "facts": dict(gate.facts)}
    return {**facts, "groups": list(gate.groups), "tensors": list(gate.tensors)}, contiguous


def _gate(facts: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor]) -> GateSpec | None:
    if facts is None:
        return None
    return GateSpec(
        kind=facts["kind"],
        size=facts["size"],
        groups={target: tensors[GATE_GROUPS + target] for target in facts["groups"]},
        tensors={name: tensors[GATE_TENSOR + name] for name in facts["tensors"]},
        facts=facts["facts"],
    )


def _metadata(content: bytes) -> tuple[str, str]:
    """Facts and checksum; the header was checked already."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        metadata: dict[str, Any] = json.loads(header["__metadata__"]["motet"])
        return str(metadata["facts"]), str(metadata["sha256"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptSourceError(
            f"{WHAT} has no facts: it was not written by motet; give the file motet wrote"
        ) from error


def _checksum(facts: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the facts, and the name, shape and bytes of every tensor."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
