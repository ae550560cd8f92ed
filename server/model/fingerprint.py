"""A digest of the base model: which weights adapters were lowered for and answers were computed with.

Must not know: adapters, serving.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLED_ELEMENTS = 4096
"""Weights per tensor that are hashed, evenly spaced: tells fine-tunes apart, and is cheap at any model size."""


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over every parameter's name, shape, dtype and evenly spaced values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // SAMPLED_ELEMENTS)][:SAMPLED_ELEMENTS]
        digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
