"""A digest of the base model: which weights adapters were lowered for and answers were computed with.

Must not know: adapters, serving. Every byte counts, because lowered adapters are kept on disk under this digest and
some of them are computed from the base's weights.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

MOST_THREADS = 8
"""One thread hashes about 2 GB/s; eight keep up with the copy from a GPU."""


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal SHA-256 over every parameter's name, shape, dtype and bytes; the same on any device.

    Note: hashlib releases the interpreter's lock, and these threads compute nothing with torch, so that they leave
    OpenMP's pools alone (docs/adr/0006).
    """
    parameters = sorted(model.named_parameters())
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        digests = threads.map(_digest, (parameter for _, parameter in parameters))
        whole = hashlib.sha256()
        for (name, parameter), digest in zip(parameters, digests, strict=True):
            whole.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            whole.update(digest)
    return whole.hexdigest()


def _digest(parameter: torch.Tensor) -> bytes:
    values = parameter.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().data).digest()
