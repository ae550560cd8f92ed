"""What clients may know of the base model.

Must not know: adapters, the engine, tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What is said of it.

    Attributes:
        max_length: prompt and generated tokens together.
        created_s: Unix time the server loaded it.
    """

    name: str
    fingerprint: str
    max_length: int
    vocabulary: int
    end_tokens: frozenset[int]
    dtype: str
    device: str
    created_s: int
