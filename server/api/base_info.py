"""What clients may know of the base model.

Must not know: adapters, the engine, tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Modality = Literal["text", "image"]


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What is said of it.

    Attributes:
        max_length: prompt and generated tokens together.
        created_s: Unix time the server loaded it.
        weights: "exact" or "int8", as the base's linears multiply with them.
        modality: of what it takes; an image stands at one position.
        labels: of its classes, where it is a classifier.
    """

    name: str
    fingerprint: str
    max_length: int
    vocabulary: int
    end_tokens: frozenset[int]
    dtype: str
    device: str
    created_s: int
    weights: str = "exact"
    modality: Modality = "text"
    labels: tuple[str, ...] = ()
