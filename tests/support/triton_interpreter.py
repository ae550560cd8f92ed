"""Makes Triton kernels run without a GPU, under Triton's interpreter.

Triton decides when a kernel is decorated, its own library's included, so this must run before its first import.
"""

from __future__ import annotations

import os
import sys

import torch


def interpret_triton() -> None:
    """Choose the interpreter where there is no CUDA device; harmless when called again."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    assert "triton" not in sys.modules, "triton was imported before its interpreter could be chosen; call this earlier"
    os.environ["TRITON_INTERPRET"] = "1"
