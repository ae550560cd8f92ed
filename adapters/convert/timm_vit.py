"""A vision transformer in transformers' layout under the names that timm gives its tensors.

Must not know: adapters, which of the two is trained. timm keeps q, k and v in one linear, in this order; transformers
has spelled its module paths in two ways, and checkpoints of both are about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from motet.adapters.errors import ConfigError, MissingTensorError
from motet.adapters.methods.config_values import positive_int

LAYER_NORM_EPS = 1e-6
"""What timm's vision transformers compute with; transformers' default is 1e-12."""

_CURRENT: Mapping[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
_OLDER: Mapping[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}
"""timm's module of a block → transformers' modules that stand for it, before and since transformers 5."""

_SPELLINGS = (("layers", _CURRENT), ("encoder.layer", _OLDER))


def under_timm_names(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name in timm → tensor, for everything but the head; in the order in which the model computes.

    Args:
        config: config.json of the model directory.
        tensors: its tensors, of a model with or without a head.

    Raises:
        ConfigError: it is no vision transformer, or one that timm's does not compute the same as.
        MissingTensorError: a tensor is missing.
    """
    _require_alike(config)
    prefix = "vit." if any(name.startswith("vit.") for name in tensors) else ""
    blocks, spelling = next(
        ((blocks, spelling) for blocks, spelling in _SPELLINGS if any(n.startswith(prefix + blocks) for n in tensors)),
        _SPELLINGS[0],
    )

    def read(name: str) -> torch.Tensor:
        if prefix + name not in tensors:
            raise MissingTensorError(
                f"the base has no tensor {prefix + name!r}; it is incomplete: save the model again"
            )
        return tensors[prefix + name].float()

    def modules() -> Iterator[tuple[str, list[str]]]:
        yield "patch_embed.proj", ["embeddings.patch_embeddings.projection"]
        for layer in range(positive_int("num_hidden_layers", config.get("num_hidden_layers"))):
            for timm_module, parts in spelling.items():
                yield f"blocks.{layer}.{timm_module}", [f"{blocks}.{layer}.{part}" for part in parts]
        yield "norm", ["layernorm"]

    found = {"cls_token": read("embeddings.cls_token"), "pos_embed": read("embeddings.position_embeddings")}
    for timm_module, parts in modules():
        found[f"{timm_module}.weight"] = torch.cat([read(f"{part}.weight") for part in parts])
        if not (timm_module.endswith("attn.qkv") and config.get("qkv_bias") is False):
            found[f"{timm_module}.bias"] = torch.cat([read(f"{part}.bias") for part in parts])
    return found


def _require_alike(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "vit":
        raise ConfigError(f"the base has model_type={config.get('model_type')!r}; give a ViT as transformers saves it")
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise ConfigError(f"the base has hidden_act={act!r}, timm's vision transformers 'gelu'; it is another model")
    if (eps := config.get("layer_norm_eps", 1e-12)) != LAYER_NORM_EPS:
        raise ConfigError(
            f"the base has layer_norm_eps={eps!r}, timm's vision transformers {LAYER_NORM_EPS:g}, and the adapter was "
            "trained with that; set it in the base's config.json"
        )
