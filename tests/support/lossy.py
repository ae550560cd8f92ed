"""What lossy forms of a full fine-tune compute, by their formulas in NumPy: shares no code with what is served."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn


def approximated(delta_OI: np.ndarray, form: str) -> np.ndarray:
    """Δ̂ by its formula, float64."""
    if form == "1bit":
        return np.abs(delta_OI).mean() * np.where(delta_OI < 0, -1.0, 1.0)
    rank = int(form.removeprefix("svd-"))
    u_OK, s_K, vt_KI = np.linalg.svd(delta_OI, full_matrices=False)
    made_OI: np.ndarray = (u_OK[:, :rank] * s_K[:rank]) @ vt_KI[:rank]
    return made_OI


@torch.no_grad()
def dense(base: Any, trained: Any, form: str) -> Any:
    """The trained model, its linears but the head at W + Δ̂."""
    model = copy.deepcopy(trained)
    head = model.get_output_embeddings()
    for path, linear in model.named_modules():
        if type(linear) is nn.Linear and linear is not head:
            weight_OI = base.get_submodule(path).weight.double().numpy()
            delta_OI = linear.weight.double().numpy() - weight_OI
            if delta_OI.any():
                linear.weight.copy_(torch.from_numpy(weight_OI + approximated(delta_OI, form)))
    return model
