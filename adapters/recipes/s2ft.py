"""S²FT: some columns of a weight, or some rows, are trained as they are; the rest of it gets no gradient at all.

    o_proj, down_proj: y = W x + V x[idx]      others: y = W x, y[idx] += V x

Which channels, or which whole heads, is drawn at random over all layers together, so their number differs from layer to
layer. There are as many as take the parameters of LoRA of the same rank: r (I + O) / O columns, or r (I + O) / I rows.

Must not know: the other starts, data, loops. Source: https://arxiv.org/abs/2412.06289. The authors reorder what they
train to the front of the weight; here an index says where it is, which is the same change.

Shapes: I/O in and out width of the target, S selected channels, T rows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear

from motet.adapters.methods.tensors import PREFIX
from motet.adapters.recipes.folder import write
from motet.adapters.recipes.trainee import Setup, Trainee

BY_COLUMN = ("o_proj", "down_proj")
"""Targets whose inputs are the channels of a coupled structure; of all others it is their outputs."""
BY_HEAD = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Targets of which whole heads are selected."""


class S2ftLinear(nn.Module):
    """A frozen linear layer with trained columns or rows beside it."""

    def __init__(self, base: nn.Linear, index_S: torch.Tensor, by_column: bool) -> None:
        """The change is zero.

        Args:
            index_S: which columns or rows, ascending.
        """
        super().__init__()
        self.base_layer, self.index_S, self.by_column = base, index_S, by_column
        width = base.out_features if by_column else base.in_features
        self.delta = nn.Parameter(torch.zeros((width, len(index_S)) if by_column else (len(index_S), width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W x + c and the trained part, for [..., I]."""
        y: torch.Tensor = self.base_layer(x)
        if self.by_column:
            return y + linear(x[..., self.index_S], self.delta)
        return y.index_add(-1, self.index_S, linear(x, self.delta).to(y.dtype))


def start(setup: Setup) -> Trainee:
    """Draw the channels and put a delta beside every target that has some."""
    setup.model.requires_grad_(False)
    linears: dict[str, dict[str, nn.Linear]] = {}
    for path, module in setup.model.named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and leaf in setup.targets:
            linears.setdefault(leaf, {})[path] = module
    trainable: dict[str, nn.Parameter] = {}
    indices: dict[str, torch.Tensor] = {}
    for leaf, layers in linears.items():
        for path, index_S in _draw(leaf, layers, setup).items():
            parent, _, name = path.rpartition(".")
            layer = S2ftLinear(layers[path], index_S, leaf in BY_COLUMN)
            setattr(setup.model.get_submodule(parent), name, layer)
            stem = f"{PREFIX}{path}.{'columns' if layer.by_column else 'rows'}"
            trainable[f"{stem}.delta"], indices[f"{stem}.index"] = layer.delta, index_S

    def save(folder: Path) -> None:
        config = {"peft_type": "S2FT", "base_model_name_or_path": setup.base_name, "task_type": "CAUSAL_LM"}
        write(folder, {**trainable, **indices}, config, getattr(torch, setup.recipe.saved_dtype))

    return Trainee(setup.model, trainable, save)


def _draw(leaf: str, layers: dict[str, nn.Linear], setup: Setup) -> dict[str, torch.Tensor]:
    """Path → selected channels, of the layers that got some."""
    any_layer = next(iter(layers.values()))
    inner, outer = any_layer.in_features, any_layer.out_features
    selected, across = (inner, outer) if leaf in BY_COLUMN else (outer, inner)
    block = setup.model.config.head_dim if leaf in BY_HEAD else 1
    blocks = selected // block
    wanted = max(1, round(setup.rank * (inner + outer) / across * len(layers) / block))
    chosen = torch.randperm(blocks * len(layers))[:wanted].sort().values
    found: dict[str, torch.Tensor] = {}
    for layer, path in enumerate(layers):
        own = chosen[chosen // blocks == layer] % blocks
        if len(own):
            found[path] = (own[:, None] * block + torch.arange(block)).reshape(-1)
    return found
