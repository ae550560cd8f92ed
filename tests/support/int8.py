"""Weights rounded to int8 by torch, an oracle for what the native backend multiplies with."""

from __future__ import annotations

import torch
from torch import nn


def rounded(weight_OI: torch.Tensor) -> torch.Tensor:
    """[O, I] float32; each output has as its scale a 127th of its largest weight."""
    weight_OI = weight_OI.detach().float()
    scale_O = weight_OI.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    nowhere_O = torch.zeros(len(weight_OI), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight_OI, scale_O, nowhere_O, 0, -127, 127)


@torch.no_grad()
def round_linears(model: nn.Module) -> None:
    """Every linear's weight becomes a rounded one of its own; a tied embedding keeps the exact one."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(rounded(module.weight).to(module.weight.dtype))
