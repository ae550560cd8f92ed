"""What the output head reads: the state after the last norm, kept where a request asks for it.

Must not know: what a feature is used for.

Shapes: n rows whose logits or features are needed, D width.
"""

from __future__ import annotations

import torch
from torch import nn


class HeadInput:
    """Listens to the head while a step runs that asks for features.

    Note: the hook is put in when the first feature is asked for, by the thread that runs the steps.
    """

    def __init__(self, head: nn.Module) -> None:
        self._head = head
        self._installed = self._wanted = False
        self._read: torch.Tensor | None = None
        self._rows_nD: torch.Tensor | None = None

    def listen(self, wanted: bool, read: torch.Tensor | None = None) -> None:
        """Whether the step that runs next asks for features; forgets those of the last.

        Args:
            read: int64, which of the n rows the head computes; None is all of them.
        """
        self._rows_nD, self._wanted, self._read = None, wanted, read
        if wanted and not self._installed:
            self._head.register_forward_pre_hook(self._keep)
            self._installed = True

    def row(self, index: int) -> torch.Tensor:
        """[D] float32 on the CPU: what one of the n rows of the step that ran gave the head to read."""
        assert self._rows_nD is not None, "no feature was asked for"
        return self._rows_nD[index].to("cpu", torch.float32, copy=True)

    def _keep(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not self._wanted:
            return None
        self._rows_nD = inputs[0].reshape(-1, inputs[0].shape[-1])
        return None if self._read is None else (inputs[0].index_select(-2, self._read), *inputs[1:])
