"""PoLAR: two near-orthonormal directions and a free square matrix between them.

    ΔW = (alpha/r)·B Θ A,  A [r, I], B [O, r],  Θ [r, r] made from the stored S by `parameterize_S`

The trained A and B are orthonormal only nearly and are taken as they are. Always alpha/r: the official code does not
read use_rslora.

Source: https://arxiv.org/abs/2506.03133 and the layout of its PEFT fork; PEFT itself reads such a folder as LoRA and
computes B A.
"""

from __future__ import annotations

import dataclasses

import torch

from motet.adapters.base import BaseModel, Target
from motet.adapters.effects import Lowered, LowRank
from motet.adapters.errors import ConfigError, MissingTensorError, UnmatchedTensorError, UnsupportedError
from motet.adapters.methods.config_values import one_of
from motet.adapters.methods.peft_config import parse
from motet.adapters.methods.peft_lora import lower_folder, trained_pair
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.source import AdapterFiles

NAME = "polar"
ADAPTER_NAMES = ("polar", "rplora")
PLAIN_KEY, PARAMETRISED_KEY = ".lora_S.weight", ".lora_S.parametrizations.weight.original"


def claims(files: AdapterFiles) -> bool:
    """Whether the folder has PoLAR's tensors or its name."""
    stored = any(name.endswith((PLAIN_KEY, PARAMETRISED_KEY)) for name in files.tensors)
    return stored or files.config.get("adapter_name") in ADAPTER_NAMES


def lower(files: AdapterFiles, base: BaseModel) -> Lowered:
    """Lower a PoLAR folder.

    Raises:
        FormatError: the folder does not describe an adapter of this base exactly.
    """
    files.require_no_start(NAME)
    name = files.config.get("adapter_name")
    if name not in ADAPTER_NAMES:
        raise ConfigError(
            f"the adapter has lora_S tensors, as PoLAR has, but adapter_name is {name!r}; set it to one of "
            f"{', '.join(ADAPTER_NAMES)} if it is PoLAR"
        )
    kind = one_of("parameterize_S", files.config.get("parameterize_S"), ("identity", "diagonal", "removal"))
    config = parse(files.config, frozenset({"adapter_name", "parameterize_S"}))
    config = dataclasses.replace(config, use_rslora=False)
    if config.use_dora:
        raise UnsupportedError("use_dora=True beside PoLAR has no published meaning; train one of them")

    def read_pair(target: Target, bag: TensorBag) -> LowRank:
        pair = trained_pair(target, config, bag)
        stored_RR = _stored(target, pair.rank, bag)
        if kind == "removal":
            return pair
        theta_RR = torch.diag(torch.diag(stored_RR)) if kind == "diagonal" else stored_RR
        return LowRank(pair.a_RI, pair.b_OR @ theta_RR)

    return lower_folder(files, base, config, read_pair, method=NAME, form=f"PoLAR folder, {kind}")


def _stored(target: Target, rank: int, bag: TensorBag) -> torch.Tensor:
    stem, shape = PREFIX + target.name, (rank, rank)
    plain = bag.take_if_present(stem + PLAIN_KEY, shape)
    parametrised = bag.take_if_present(stem + PARAMETRISED_KEY, shape)
    if plain is not None and parametrised is not None:
        raise UnmatchedTensorError(f"{target.name!r} has lora_S in both spellings; keep the one that was trained")
    found = plain if plain is not None else parametrised
    if found is None:
        raise MissingTensorError(f"tensor {stem + PARAMETRISED_KEY!r} is missing; the PoLAR adapter is incomplete")
    return found
