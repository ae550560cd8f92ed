"""The table of methods: how a folder becomes effects. One file per method, asked in this order.

Must not know: the registry, memory, kernels.
"""

from __future__ import annotations

from typing import Protocol

from motet.adapters.base import BaseModel
from motet.adapters.effects import Lowered
from motet.adapters.errors import UnmatchedTensorError, UnsupportedError
from motet.adapters.methods import (
    amt,
    corda,
    corda_model,
    emtal,
    full_model,
    ilora,
    lora,
    lora_ga,
    olora,
    pissa,
    polar,
    residual,
    s2ft,
)
from motet.adapters.methods.pattern_cost import require_bounded
from motet.adapters.source import GATE_FILE, AdapterFiles


class Method(Protocol):
    """A front-end: recognises its checkpoints and lowers them, once, at load."""

    NAME: str

    def claims(self, files: AdapterFiles) -> bool:
        """Whether the folder is in one of this method's layouts."""

    def lower(self, files: AdapterFiles, base: BaseModel) -> Lowered:
        """Turn the folder into effects in float32, exactly, or raise FormatError."""


METHODS: tuple[Method, ...] = (
    corda_model,
    full_model,
    s2ft,
    amt,
    emtal,
    ilora,
    polar,
    pissa,
    olora,
    corda,
    lora_ga,
    residual,
    lora,
)

GATED: tuple[Method, ...] = (ilora,)
"""Methods of which a folder may have a gate's file."""


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower the folder with the first method that claims it.

    Raises:
        UnsupportedError: no method claims it.
        UnmatchedTensorError: it has a gate's file, and the method that claims it no gate.
        FormatError: the method that claims it cannot apply it exactly.
    """
    for method in METHODS:
        if method.claims(files):
            if any(part.gate_tensors for part in (files, files.initial) if part) and method not in GATED:
                raise UnmatchedTensorError(
                    f"the folder has {GATE_FILE}, of which no tensor matches a rule of {method.NAME}; applying the "
                    "rest would give wrong answers: remove the file if it does not belong to the adapter"
                )
            for part in (files, files.initial):
                if part is not None:
                    require_bounded(part.config, (*base.targets, *base.other_modules))
            return method.lower(files, base)
    names = ", ".join(method.NAME for method in METHODS)
    raise UnsupportedError(f"peft_type {files.config.get('peft_type')!r} is not served; methods served: {names}")
