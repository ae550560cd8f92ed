"""S²FT's fused checkpoints: a whole model with channels and heads reordered, as the authors' code leaves it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.layout import CHANGE, Layout
from tests.support.models import load_dense

Maker = Callable[[Any, Path, int], Layout]

SELECTED = {
    "mlp.down_proj": ("columns",),
    "mlp.up_proj": ("rows",),
    "self_attn.o_proj": ("columns", "rows"),
}


def s2ft_fused(
    dtype: torch.dtype = torch.float32,
    *,
    reorder: bool = True,
    channels: tuple[int, ...] = (5, 0, 9),
    heads: tuple[int, ...] = (1, 2, 0),
    padded_rows: int = 0,
) -> Maker:
    """Train slices, reorder what belongs together, save everything.

    Args:
        dtype: of the checkpoint; the oracle computes with its weights.
        channels: feed-forward channels trained per layer, of up_proj's rows and down_proj's columns.
        heads: query heads whose columns of o_proj are trained per layer; key-value heads of v_proj: at most one.
        padded_rows: rows appended to the embedding, as the authors' training pads the vocabulary.
    """

    @torch.no_grad()
    def write(model: Any, folder: Path, seed: int) -> Layout:
        generator = torch.Generator().manual_seed(seed)
        trained = copy.deepcopy(model)
        before = {name: parameter.clone().to(dtype) for name, parameter in trained.named_parameters()}
        width = model.model.layers[0].self_attn.head_dim
        for layer, block in enumerate(trained.model.layers):
            feed, attention = block.mlp, block.self_attn
            chosen = torch.randperm(model.config.intermediate_size, generator=generator)[: channels[layer]]
            _train(feed.up_proj.weight, (chosen, slice(None)), generator)
            _train(feed.down_proj.weight, (slice(None), chosen), generator)
            queries = torch.randperm(model.config.num_attention_heads, generator=generator)[: heads[layer]]
            _train(attention.o_proj.weight, (slice(None), _blocks(queries, width)), generator)
            keys = torch.randperm(model.config.num_key_value_heads, generator=generator)[: min(1, heads[layer])]
            _train(attention.v_proj.weight, (_blocks(keys, width), slice(None)), generator)
        trained = trained.to(dtype)
        deltas = {
            name.removesuffix(".weight"): parameter.double() - before[name].double()
            for name, parameter in trained.named_parameters()
            if name.endswith("_proj.weight")
        }
        if reorder:
            for block in trained.model.layers:
                _reorder(block, model.config, generator)
        if padded_rows:
            trained.resize_token_embeddings(model.config.vocab_size + padded_rows, mean_resizing=False)
        trained.save_pretrained(folder)
        oracle = load_dense(folder, torch.float32)
        if padded_rows:
            oracle.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
        return Layout(folder, oracle, "s2ft", deltas_OI={name: delta for name, delta in deltas.items() if delta.any()})

    return write


def s2ft_selection(dtype: torch.dtype = torch.float32) -> Maker:
    """Motet's own small form, beside a dense merge; the places stand in no order, and one linear has both kinds."""

    @torch.no_grad()
    def write(model: Any, folder: Path, seed: int) -> Layout:
        generator = torch.Generator().manual_seed(seed)
        oracle, tensors, deltas = copy.deepcopy(model), {}, {}
        for path, kinds in SELECTED.items():
            for layer in range(model.config.num_hidden_layers):
                name = f"model.layers.{layer}.{path}"
                weight_OI = oracle.get_submodule(name).weight
                before = weight_OI.clone()
                for kind in kinds:
                    width = weight_OI.shape[1 if kind == "columns" else 0]
                    places = torch.randperm(width, generator=generator)[: 1 + layer * 4]
                    part = (slice(None), places) if kind == "columns" else (places, slice(None))
                    shape = weight_OI[part].shape
                    delta = (CHANGE * 4 * before.std() * torch.randn(shape, generator=generator)).to(dtype)
                    weight_OI[part] += delta.float()
                    tensors[f"base_model.model.{name}.{kind}.index"] = places
                    tensors[f"base_model.model.{name}.{kind}.delta"] = delta
                deltas[name] = weight_OI.double() - before.double()
        folder.mkdir(parents=True)
        config = {"peft_type": "S2FT", "base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return Layout(folder, oracle, "s2ft", deltas_OI=deltas)

    return write


def _blocks(heads: torch.Tensor, width: int) -> torch.Tensor:
    return (heads[:, None] * width + torch.arange(width)).reshape(-1)


def _train(weight_OI: torch.Tensor, where: Any, generator: torch.Generator) -> None:
    part = weight_OI[where]
    weight_OI[where] = part + CHANGE * 4 * weight_OI.std() * torch.randn(part.shape, generator=generator)


def _reorder(block: Any, config: Any, generator: torch.Generator) -> None:
    """Channels of the feed-forward layer; key-value heads, and query heads with the keys they share."""
    feed, attention = block.mlp, block.self_attn
    channels = torch.randperm(config.intermediate_size, generator=generator)
    for linear in (feed.gate_proj, feed.up_proj):
        linear.weight.copy_(linear.weight[channels].clone())
    feed.down_proj.weight.copy_(feed.down_proj.weight[:, channels].clone())
    width, shared = attention.head_dim, config.num_key_value_heads
    group = config.num_attention_heads // shared
    keys = torch.randperm(shared, generator=generator)
    queries = torch.cat([key * group + torch.randperm(group, generator=generator) for key in keys])
    for linear, heads in ((attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys)):
        rows = _blocks(heads, width)
        linear.weight.copy_(linear.weight[rows].clone())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[rows].clone())
    attention.o_proj.weight.copy_(attention.o_proj.weight[:, _blocks(queries, width)].clone())
