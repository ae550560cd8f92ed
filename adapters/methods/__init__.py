"""The table of methods: how a folder becomes effects. One file per method, asked in this order.

Must not know: the registry, memory, kernels.
"""

from __future__ import annotations

from typing import Protocol

from motet.adapters.base import BaseModel
from motet.adapters.effects import Lowered
from motet.adapters.errors import UnsupportedError
from motet.adapters.methods import corda, corda_model, full_model, lora, lora_ga, olora, pissa, polar, residual, s2ft
from motet.adapters.source import AdapterFiles


class Method(Protocol):
    """A front-end: recognises its checkpoints and lowers them, once, at load."""

    NAME: str

    def claims(self, files: AdapterFiles) -> bool:
        """Whether the folder is in one of this method's layouts."""

    def lower(self, files: AdapterFiles, base: BaseModel) -> Lowered:
        """Turn the folder into effects in float32, exactly, or raise FormatError."""


METHODS: tuple[Method, ...] = (corda_model, full_model, s2ft, polar, pissa, olora, corda, lora_ga, residual, lora)


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower the folder with the first method that claims it.

    Raises:
        UnsupportedError: no method claims it.
        FormatError: the method that claims it cannot apply it exactly.
    """
    for method in METHODS:
        if method.claims(files):
            return method.lower(files, base)
    names = ", ".join(method.NAME for method in METHODS)
    raise UnsupportedError(f"peft_type {files.config.get('peft_type')!r} is not served; methods served: {names}")
