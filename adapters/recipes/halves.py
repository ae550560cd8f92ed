"""A decoder cut in two, for training that leaves its lower layers alone: their states are computed once.

Must not know: adapters, data, losses.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from motet.adapters.recipes.errors import TargetError

SAMPLE_TOKENS = 4


def cut(decoder: Any, top: int) -> tuple[Any, Any]:
    """(lower, upper): from `inputs_embeds` to the states that enter the last `top` layers, and from those to the end.

    Both share the decoder's layers; neither is a copy.

    Args:
        decoder: of transformers, with `layers`, `norm` and `embed_tokens`.

    Raises:
        TargetError: its halves in turn do not compute what the whole does.
    """
    lower, upper = _shallow(decoder), _shallow(decoder)
    lower.layers, lower.norm = decoder.layers[:-top], nn.Identity()
    upper.layers = decoder.layers[-top:]
    ids_BT = torch.arange(SAMPLE_TOKENS)[None]
    with torch.no_grad():
        whole_BTD = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        again_BTD = states(upper, states(lower, decoder.embed_tokens(ids_BT)))
    if not torch.allclose(whole_BTD, again_BTD, rtol=1e-4, atol=1e-4):
        raise TargetError(f"a {type(decoder).__name__} cannot be cut below its last {top} layers; choose another base")
    return lower, upper


def states(half: Any, given_BTD: torch.Tensor) -> torch.Tensor:
    """[B, T, D]. Rows are padded to the right: attention is causal, so no position sees a pad."""
    made: torch.Tensor = half(inputs_embeds=given_BTD, use_cache=False).last_hidden_state
    return made


def _shallow(module: Any) -> Any:
    """Another module of the same submodules and parameters."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
