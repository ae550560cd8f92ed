"""iLoRA's router in training: batch norm is a layer, with the batch's own statistics while it trains.

What it computes in evaluation is `motet.adapters.gates.router`, by the same names of tensors.

Must not know: adapters, where the state comes from.

Shapes: N users, C channels, L samples, K experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from motet.adapters.gates.router import BLOCKS, CHANNELS


class Residual(nn.Module):
    """Two convolutions beside a shortcut; more channels than before come with half the samples."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self._stride, self._added = 1 if before == after else 2, after - before
        self.conv1 = nn.Conv1d(before, after, 3, self._stride, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(after)
        self.conv2 = nn.Conv1d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(after)

    def forward(self, x_NCL: torch.Tensor) -> torch.Tensor:
        """[N, after, L / stride]."""
        shortcut_NCL = F.pad(x_NCL[:, :, :: self._stride], (0, 0, self._added // 2, (self._added + 1) // 2))
        inner_NCL: torch.Tensor = self.bn1(self.conv1(x_NCL)).relu()
        y_NCL: torch.Tensor = self.bn2(self.conv2(inner_NCL)) + shortcut_NCL
        return y_NCL.relu()


class RouterNetwork(nn.Module):
    """The network with torch's own random start."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, CHANNELS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(CHANNELS[0])
        before = CHANNELS[0]
        for stage, after in enumerate(CHANNELS, 1):
            first, *others = Residual(before, after), *(Residual(after, after) for _ in range(BLOCKS - 1))
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
            before = after
        self.gate = nn.ModuleDict({"fc": nn.Linear(before, experts)})

    def forward(self, state_NL: torch.Tensor) -> torch.Tensor:
        """ω [N, K] of user states [N, 64]."""
        y_NCL = self.bn1(self.conv1(state_NL[:, None])).relu()
        for stage in range(1, len(CHANNELS) + 1):
            y_NCL = self.get_submodule(f"layer{stage}")(y_NCL)
        omega_NK: torch.Tensor = self.gate["fc"](y_NCL.mean(-1)).softmax(-1)
        return omega_NK
