"""AMT: a pool of LoRAs, each meta-trained against texts perturbed more than the last, all against perturbed factors.

The last layers only: the states below them are the same for all members, and computed once an episode. The pairs start
as the principal part of each weight, which is taken out of it.

Must not know: the other starts, data, loops. Source: https://openreview.net/forum?id=HxGdbAmYYr and the authors' code
(vision transformers), carried over to causal language models.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from motet.adapters.methods.amt import PEFT_TYPE, START
from motet.adapters.methods.tensors import PREFIX
from motet.adapters.recipes import halves, pool_network
from motet.adapters.recipes.adversary import Adversary
from motet.adapters.recipes.errors import TargetError
from motet.adapters.recipes.folder import write
from motet.adapters.recipes.trainee import Setup, Trainee

LAYERS = 6
STRENGTHS = (0.0, 0.1, 0.2, 0.4)
"""How far the members' texts are perturbed, as a share of the mean norm of the token embeddings."""
SCALE_CLS_RATE = 20.0
"""AdamW moves everything by about its rate, whatever its size: without this, 10 would stay 10."""


def start(setup: Setup) -> Trainee:
    """Put the pool into the last layers.

    Raises:
        TargetError: the base is no decoder that can be cut.
    """
    assert setup.episodes is not None
    decoder = getattr(setup.model, "model", None)
    if not all(hasattr(decoder, part) for part in ("layers", "norm", "embed_tokens")):
        raise TargetError(f"a {type(setup.model).__name__} has no row of layers to cut; choose another base")
    assert decoder is not None
    top = min(LAYERS, len(decoder.layers))
    lower, upper = halves.cut(decoder, top)
    members = len(STRENGTHS)
    pool = pool_network.put_into(setup.model, setup.targets, top, setup.rank, setup.alpha, members)
    unit = float(torch.linalg.vector_norm(decoder.embed_tokens.weight.detach(), dim=1).mean())
    epsilons = [strength * unit for strength in STRENGTHS]
    adversary = Adversary(pool, decoder.embed_tokens, lower, upper, setup.episodes, epsilons)
    trainable: dict[str, nn.Parameter] = {}
    starts: dict[str, torch.Tensor] = {}
    for path, module in pool.linears.items():
        starts[f"{PREFIX}{path}.lora_A.{START}.weight"], starts[f"{PREFIX}{path}.lora_B.{START}.weight"] = module.start
        for member in range(members):
            trainable[f"{PREFIX}{path}.lora_A.{member}.weight"] = module.a_PRI[member]
            trainable[f"{PREFIX}{path}.lora_B.{member}.weight"] = module.b_POR[member]

    def save(folder: Path) -> None:
        config = {
            "peft_type": PEFT_TYPE,
            "base_model_name_or_path": setup.base_name,
            "task_type": "FEATURE_EXTRACTION",
            "inference_mode": True,
            "r": setup.rank,
            "lora_alpha": setup.alpha,
            "members": members,
            "strengths": list(STRENGTHS),
            "scale_cls": float(pool.scale_cls.detach()),
        }
        write(folder, {**trainable, **starts}, config, getattr(torch, setup.recipe.saved_dtype))

    return Trainee(
        setup.model,
        {**trainable, "scale_cls": pool.scale_cls},
        save,
        before_step=adversary.before_step,
        rates={"scale_cls": SCALE_CLS_RATE},
        own_loss=adversary.loss,
        turns=members,
    )
