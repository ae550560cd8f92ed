"""What the output head reads: the state after the last norm, kept where a request asks for it.

Must not know: what a feature is used for.

Shapes: n rows whose logits are needed, D width.
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
        self._rows_nD: torch.Tensor | None = None

    def listen(self, wanted: bool) -> None:
        """Whether the step that runs next asks for features; forgets those of the last."""
        self._rows_nD, self._wanted = None, wanted
        if wanted and not self._installed:
            self._head.register_forward_pre_hook(self._keep)
            self._installed = True

    def row(self, index: int) -> torch.Tensor:
        """[D] float32 on the CPU: what the head read at one of the n rows of the step that ran."""
        assert self._rows_nD is not None, "no feature was asked for"
        return self._rows_nD[index].to("cpu", torch.float32, copy=True)

    def _keep(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._wanted:
            self._rows_nD = inputs[0].reshape(-1, inputs[0].shape[-1])
