"""Adapter folders that must be refused: each takes an intact one and spoils it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Spoil = Callable[[Path], object]
Refusal = tuple[int, str]

REFUSED: Refusal = (400, "adapter_refused")
MISSING: Refusal = (404, "adapter_source_not_found")
FORBIDDEN: Refusal = (403, "adapter_path_forbidden")

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def header(content: bytes, body: bytes = b"\0" * 4, announced: int | None = None) -> Spoil:
    """Weights with this header."""
    size = len(content) if announced is None else announced
    return written(WEIGHTS, struct.pack("<Q", size) + content + body)


def announcing(body: bytes = b"\0" * 4, **tensors: Any) -> Spoil:
    """Weights whose header announces these tensors."""
    return header(json.dumps(tensors).encode(), body)


def written(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def configured(**changes: Any) -> Spoil:
    return lambda folder: (folder / CONFIG).write_text(
        json.dumps({**json.loads((folder / CONFIG).read_text()), **changes})
    )


def config_text(key: str, literal: str) -> Spoil:
    """A key whose value json.dumps would not write."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config.pop(key, None)
        (folder / CONFIG).write_text(json.dumps(config)[:-1] + f', "{key}": {literal}}}')

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return spoil


def value(number: float) -> Spoil:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[sorted(found)[3]].view(-1)[-1] = number

    return tensors(change)


def retyped(dtype: torch.dtype) -> Spoil:
    return tensors(lambda found: found.update({name: tensor.to(dtype) for name, tensor in found.items()}))


def renamed(old: str, new: str) -> Spoil:
    def change(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if old in name]:
            found[name.replace(old, new)] = found.pop(name)

    return tensors(change)


def widened(found: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        if "lora_A" in name:
            found[name] = torch.zeros(tensor.shape[0], 2 * tensor.shape[1])


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def linked(name: str, to: str) -> Spoil:
    return replaced(name, lambda file: file.symlink_to(to))


def moved_out(folder: Path) -> None:
    elsewhere = folder.parent.parent / f"{folder.name}-outside.safetensors"
    (folder / WEIGHTS).rename(elsewhere)
    (folder / WEIGHTS).symlink_to(elsewhere)


def many(count: int) -> bytes:
    """A header of so many empty tensors."""
    return b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count)) + b"}"


ENDLESS = "(.|.)*x"
FILES: dict[str, tuple[Spoil, Refusal]] = {
    "weights are empty": (written(WEIGHTS, b""), REFUSED),
    "weights are truncated": (cut(WEIGHTS, 0.5), REFUSED),
    "the header is truncated": (cut(WEIGHTS, 0.01), REFUSED),
    "bytes follow the weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0"),
        REFUSED,
    ),
    "the header reaches beyond the file": (header(b"{}", announced=10_000), REFUSED),
    "the header is 2^63 bytes": (header(b"{}", announced=2**63), REFUSED),
    "the header is no JSON": (header(b"{]"), REFUSED),
    "the header is a list": (header(b"[]"), REFUSED),
    "the header nests 100,000 deep": (header(b'{"a":' * 100_000), REFUSED),
    "a tensor stands twice": (header(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2)), REFUSED),
    "a field stands twice": (header(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), REFUSED),
    "offsets overlap": (announcing(a=ONE, b=ONE), REFUSED),
    "offsets reach beyond the file": (announcing(a={**ONE, "shape": [9], "data_offsets": [0, 36]}), REFUSED),
    "offsets are negative": (announcing(a={**ONE, "data_offsets": [-4, 0]}), REFUSED),
    "offsets are huge": (announcing(a={**ONE, "data_offsets": [2**62, 2**62 + 4]}), REFUSED),
    "offsets run backwards": (announcing(a={**ONE, "data_offsets": [4, 0]}), REFUSED),
    "offsets leave a hole": (announcing(b"\0" * 8, a={**ONE, "data_offsets": [4, 8]}), REFUSED),
    "a shape of 2^42 elements": (announcing(a={**ONE, "shape": [2**21, 2**21], "data_offsets": [0, 2**44]}), REFUSED),
    "a shape that overflows": (announcing(a={**ONE, "shape": [2**40, 2**40]}), REFUSED),
    "a shape of nothing and 10^18": (announcing(b"", a={**ONE, "shape": [0, 10**18], "data_offsets": [0, 0]}), REFUSED),
    "a negative shape": (announcing(a={**ONE, "shape": [-1]}), REFUSED),
    "a shape of fractions": (announcing(a={**ONE, "shape": [1.0]}), REFUSED),
    "a thousand dimensions": (announcing(a={**ONE, "shape": [1] * 1000}), REFUSED),
    "a type that needs other bytes": (announcing(a={**ONE, "dtype": "F16"}), REFUSED),
    "an unknown type": (announcing(a={**ONE, "dtype": "F33"}), REFUSED),
    "weights are whole numbers": (retyped(torch.int32), REFUSED),
    "weights are truth values": (retyped(torch.bool), REFUSED),
    "10^6 tensors": (header(many(10**6), b""), REFUSED),
    "100,001 tensors": (header(many(100_001), b""), REFUSED),
    "NaN": (value(float("nan")), REFUSED),
    "infinity": (value(float("inf")), REFUSED),
    "another base's widths": (tensors(widened), REFUSED),
    "another base's modules": (renamed("q_proj", "query_key_value"), REFUSED),
    "a tensor too many": (tensors(lambda found: found.update(extra=torch.ones(1))), REFUSED),
    "a tensor too few": (tensors(lambda found: found.pop(sorted(found)[0])), REFUSED),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), REFUSED),
    "a pickle by the safe name": (written(WEIGHTS, b"\x80\x04cos\nsystem\n(S'true'\ntR."), REFUSED),
    "a zip archive by the safe name": (written(WEIGHTS, b"PK\x03\x04" + b"\0" * 100), REFUSED),
    "the config is empty": (written(CONFIG, b""), REFUSED),
    "the config is a list": (written(CONFIG, b"[]"), REFUSED),
    "the config is no UTF-8": (written(CONFIG, b'{"r": "\xff"}'), REFUSED),
    "the config nests 100,000 deep": (written(CONFIG, b'{"a":' * 100_000), REFUSED),
    "the config has 2 MB": (written(CONFIG, b'{"r": "' + b"x" * (2 << 20) + b'"}'), REFUSED),
    "a key stands twice": (written(CONFIG, b'{"r": 4, "r": 8}'), REFUSED),
    "a number of 5,000 digits": (config_text("r", "9" * 5000), REFUSED),
    "an unknown key": (configured(invented=1), REFUSED),
    "rank 0": (configured(r=0), REFUSED),
    "rank -4": (configured(r=-4), REFUSED),
    "rank 10^9": (configured(r=10**9), REFUSED),
    "rank 4.0": (configured(r=4.0), REFUSED),
    "rank true": (configured(r=True), REFUSED),
    "alpha NaN": (config_text("lora_alpha", "NaN"), REFUSED),
    "alpha 1e400": (config_text("lora_alpha", "1e400"), REFUSED),
    "alpha in words": (configured(lora_alpha="eight"), REFUSED),
    "targets that never end": (configured(target_modules=ENDLESS), REFUSED),
    "exclusions that never end": (configured(exclude_modules="(.+)+x"), REFUSED),
    "ranks that never end": (configured(rank_pattern={"(?:.?){60}x": 4}), REFUSED),
    "a pattern of 5,000 characters": (configured(target_modules="q|" * 2500), REFUSED),
    "a pattern that is none": (configured(target_modules="("), REFUSED),
    "5,000 patterns": (configured(alpha_pattern={f"m{i}": 1 for i in range(5000)}), REFUSED),
    "no targets": (configured(target_modules=[]), REFUSED),
    "another method": (configured(peft_type="LOHA"), REFUSED),
    "a gate of nobody": (lambda folder: save_file({"g": torch.ones(1)}, folder / "gate.safetensors"), REFUSED),
    "golden values that nest deeply": (written("golden.json", b"[" * 50_000), REFUSED),
    "a head that is none": (written("uncertainty_head.json", b"{}"), MISSING),
    "a tokenizer that is none": (written("tokenizer.json", b"{}" + b" " * (65 << 20)), REFUSED),
    "weights are a pipe": (replaced(WEIGHTS, os.mkfifo), MISSING),
    "the config is a pipe": (replaced(CONFIG, os.mkfifo), MISSING),
    "golden values are a pipe": (replaced("golden.json", os.mkfifo), MISSING),
    "the tokenizer is a pipe": (replaced("tokenizer.json", os.mkfifo), MISSING),
    "the gate is a pipe": (replaced("gate.safetensors", os.mkfifo), MISSING),
    "weights are a folder": (replaced(WEIGHTS, Path.mkdir), MISSING),
    "weights are a device": (linked(WEIGHTS, "/dev/zero"), MISSING),
    "weights are a link to nowhere": (linked(WEIGHTS, "nowhere"), MISSING),
    "weights are a link to itself": (linked(WEIGHTS, WEIGHTS), MISSING),
    "the config is a link to a secret": (linked(CONFIG, "/etc/passwd"), FORBIDDEN),
    "weights are a link out of the folder": (moved_out, FORBIDDEN),
}
