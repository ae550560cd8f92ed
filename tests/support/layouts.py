"""Every layout that is served: the official files for a tiny base, beside a model that knows what they mean.

Must not know: how Motet reads them. Oracles are PEFT's own models, hand-written modules or dense float32 sums.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.layout import Layout
from tests.support.layouts_corda import corda_cache, corda_converted, corda_native, corda_official, corda_residual
from tests.support.layouts_emtal import FEED_FORWARD, emtal
from tests.support.layouts_full import fine_tuned
from tests.support.layouts_peft import eva, lora, saved_layers
from tests.support.layouts_polar import polar
from tests.support.layouts_residual import converted, lora_ga, native, on_residual, recomputed
from tests.support.layouts_s2ft import s2ft_fused, s2ft_selection

Maker = Callable[[Any, Path, int], Layout]

QV = ["q_proj", "v_proj"]

PEFT_LAYOUTS: dict[str, Maker] = {
    "lora-all": lora(),
    "lora-qv-r3": lora(r=3, lora_alpha=5, target_modules=QV),
    "lora-r1": lora(r=1, lora_alpha=1, target_modules=["down_proj"]),
    "rslora": lora(r=4, lora_alpha=4, use_rslora=True),
    "patterns": lora(
        rank_pattern={"down_proj": 2, r"layers\.1\..*": 5},
        alpha_pattern={r"self_attn\.(q|k)_proj": 3, "v_proj": 24},
    ),
    "rslora-patterns": lora(
        use_rslora=True, rank_pattern={"q_proj": 12, "layers.0.mlp.up_proj": 1}, alpha_pattern={"up_proj": 2}
    ),
    "some-layers": lora(layers_to_transform=[0, 2], target_modules=["k_proj", "o_proj", "up_proj"]),
    "regex": lora(target_modules=r".*\.1\.mlp\.(gate|down)_proj"),
    "dora": lora(r=4, lora_alpha=8, use_dora=True),
    "dora-qv": lora(r=2, use_dora=True, target_modules=QV),
    "dora-rslora": lora(r=6, use_dora=True, use_rslora=True, target_modules=["k_proj", "down_proj"]),
    "bias-lora-only": lora(bias="lora_only"),
    "bias-all": lora(bias="all", target_modules=["v_proj", "o_proj"]),
    "lora-bias": lora(lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"]),
    "dora-bias": lora(use_dora=True, bias="lora_only", target_modules=["q_proj", "v_proj", "up_proj"]),
    "eva": eva(),
    "lora-ends": lora(r=5, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "lora-embedding": lora(r=3, target_modules=["embed_tokens", "v_proj"]),
    "rslora-embedding": lora(r=4, use_rslora=True, target_modules=["embed_tokens"]),
    "dora-ends": lora(r=4, use_dora=True, target_modules=["embed_tokens", "lm_head", "k_proj"]),
    "dora-head": lora(r=2, use_dora=True, target_modules=["lm_head"]),
    "lora-ends-patterns": lora(
        target_modules=["embed_tokens", "lm_head", "up_proj"],
        rank_pattern={"embed_tokens": 2, "lm_head": 11},
        alpha_pattern={"embed_tokens": 3},
    ),
    "trained-tokens": lora(r=2, target_modules=QV, trainable_token_indices=[7, 3, 250]),
    "trained-tokens-embedding-and-head": lora(
        r=2, target_modules=QV, trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [5, 6, 200]}
    ),
    "trained-tokens-same": lora(
        r=2, target_modules=QV, trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [9, 4]}
    ),
    "trained-tokens-head": lora(r=2, target_modules=QV, trainable_token_indices={"lm_head": list(range(30, 60))}),
    "saved-layers": saved_layers(20),
    "saved-layers-dense": saved_layers(250),
    "saved-layers-lora": saved_layers(12, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "saved-layers-dora": saved_layers(240, target_modules=["embed_tokens", "lm_head"], use_dora=True),
    "saved-head": lora(r=2, target_modules=QV, modules_to_save=["lm_head"]),
    "saved-embedding-and-head": lora(r=2, target_modules=QV, modules_to_save=["embed_tokens", "lm_head"]),
    "saved-norms": lora(r=2, target_modules=QV, modules_to_save=["input_layernorm", "norm"]),
}
"""Forms of which the pair is the whole change."""

RESIDUAL_LAYOUTS: dict[str, Maker] = {
    "pissa": recomputed("pissa"),
    "pissa-rslora-patterns": recomputed(
        "pissa",
        use_rslora=True,
        rank_pattern={r"layers\.1\.mlp\..*": 3, "q_proj": 5},
        alpha_pattern={r"layers\.0\..*": 11, "v_proj": 3},
    ),
    "pissa-dora": recomputed("pissa", use_dora=True, r=4, lora_alpha=6),
    "pissa-layers-bias": recomputed("pissa", r=3, layers_to_transform=[0, 2], bias="lora_only"),
    "pissa-subfolder": native("pissa_niter_4", "pissa_init"),
    "pissa-subfolder-dora": native("pissa_niter_2", "pissa_init", r=4, use_dora=True, target_modules=QV),
    "pissa-residual-initial": on_residual("pissa_niter_4", "initial", "pissa", name="pissa_init"),
    "pissa-residual": on_residual("pissa", "residual", "residual-lora", r=5, use_rslora=True),
    "pissa-converted": converted("pissa", "lora", rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 3}),
    "pissa-converted-rslora": converted("pissa_niter_4", "rslora", use_rslora=True),
    "olora": recomputed("olora"),
    "olora-rslora": recomputed(
        "olora", use_rslora=True, r=3, lora_alpha=2, target_modules=["k_proj", "o_proj", "down_proj"]
    ),
    "lora-ga": lora_ga(),
    "corda-ipm": corda_native("ipm"),
    "corda-kpm": corda_native("kpm"),
    "corda-residual-initial": corda_residual("initial", "corda"),
    "corda-residual": corda_residual("residual", "residual-lora"),
    "corda-converted": corda_converted(),
    "corda-cache": corda_cache(),
    "corda-official": corda_official(),
}
"""Forms that were trained on W minus a part of itself."""

# Patterns that overlap stand in the order of their names: PEFT sorts them when it saves, and the first match wins.

POLAR_LAYOUTS: dict[str, Maker] = {
    "polar": polar("identity", parametrised=True),
    "polar-diagonal": polar("diagonal", parametrised=True, r=3),
    "polar-removal": polar("removal", parametrised=True, lora_alpha=2),
    "polar-bare": polar("identity", parametrised=False, target_modules=QV),
    "polar-bare-diagonal": polar("diagonal", parametrised=False),
    "polar-bare-removal": polar("removal", parametrised=False, lora_alpha=1),
    "rplora": polar("identity", parametrised=True, adapter_name="rplora", r=1),
    "polar-rslora-patterns": polar(
        "identity", parametrised=True, use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 8}
    ),
}

SPARSE_LAYOUTS: dict[str, Maker] = {
    "s2ft": s2ft_fused(),
    "s2ft-selection": s2ft_selection(),
    "s2ft-in-order": s2ft_fused(reorder=False, channels=(1, 20, 0)),
    "s2ft-heads": s2ft_fused(channels=(0, 0, 0)),
    "s2ft-padded": s2ft_fused(heads=(0, 1, 0), padded_rows=8),
}
"""Of which a few channels and heads were trained."""

FULL_LAYOUTS: dict[str, Maker] = {
    "lisa": fine_tuned("layers.1.", "embed_tokens", "model.norm", "lm_head"),
    "lisa-frozen-embedding": fine_tuned("layers.0.", "layers.2."),
    "full-fine-tune": fine_tuned(""),
    "norms": fine_tuned("norm"),
}
"""Whole models of which some parameters were trained throughout."""

EMTAL_LAYOUTS: dict[str, Maker] = {
    "emtal": emtal(),
    "emtal-feed-forward": emtal(FEED_FORWARD, experts=12),
    "emtal-attention": emtal(("q_proj", "v_proj", "o_proj")),
    "emtal-no-router": emtal(router=False, rank=3),
}
"""Pairs over feed-forward channels in clustered order."""

LAYOUTS: dict[str, Maker] = {
    **PEFT_LAYOUTS,
    **RESIDUAL_LAYOUTS,
    **POLAR_LAYOUTS,
    **SPARSE_LAYOUTS,
    **FULL_LAYOUTS,
    **EMTAL_LAYOUTS,
}

_NEEDS: dict[str, str] = {"lora-bias": "qwen2", "corda-official": "llama"}
"""The only family a layout exists for: `lora_bias` needs biases, CorDA's architecture is Llama's."""


def layouts_of(family: str) -> list[str]:
    """Names of the layouts that exist for a family, in the order of the table."""
    return [name for name in LAYOUTS if _NEEDS.get(name, family) == family]


def make(name: str, model: Any, folder: Path, seed: int = 1) -> Layout:
    """Write one layout for an untouched base model.

    Args:
        model: the base; never changed.
        folder: where everything is written; the adapter itself may lie in a sub-folder.
        seed: of the random "training".
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of `bias`, of conversions and of deprecations in transformers
        return LAYOUTS[name](model, folder, seed)
