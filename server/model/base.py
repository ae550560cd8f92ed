"""What adapters see of a loaded model: its targets, and its parameters on the CPU.

Must not know: adapters, steps, requests.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from motet.adapters.base import BaseModel, Kind, Target
from motet.adapters.tokens import Tokenizers

SMALLEST_UNIT = 8
"""Elements: 16 bytes in bfloat16, the widest load a GPU thread has. The arena's unit divides every target's width."""


class Linear(Protocol):
    """What is asked of a linear layer."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def bias(self) -> Any: ...


def targets_of(
    linears: Mapping[str, Linear], embedding: tuple[str, nn.Embedding] | None, head: str | None
) -> tuple[dict[str, Target], dict[str, str]]:
    """The targets of a model, and why its output head and embedding are none where they are not.

    Args:
        linears: path → module, the head too.
        embedding: path and module of the input embedding; None where it does more than look up.
        head: path of the output head; None where none is a target.

    Returns:
        Targets by path, in the order of their index: linears, embedding, head. Path of what is no target → the reason.
    """
    shapes = {path: (one.in_features, one.out_features, one.bias is not None) for path, one in linears.items()}
    body = {path: Target(i, path, *shapes[path]) for i, path in enumerate(path for path in shapes if path != head)}
    ends: list[tuple[str, Kind, tuple[int, int, bool]]] = []
    if embedding is not None:
        path, module = embedding
        ends.append((path, Kind.EMBEDDING, (module.num_embeddings, module.embedding_dim, False)))
    if head is not None and head in shapes:
        ends.append((head, Kind.HEAD, shapes[head]))
    unit = math.gcd(*(width for target in body.values() for width in (target.in_width, target.out_width)))
    with_ends = math.gcd(unit, *(width for _, _, (*widths, _) in ends for width in widths))
    if with_ends != unit and with_ends % SMALLEST_UNIT:
        vocabulary = max(max(widths) for _, _, (*widths, _) in ends)
        reason = (
            f"the vocabulary of {vocabulary:,} and the widths of the linear layers have the greatest common divisor "
            f"{with_ends}, and adapter memory needs a multiple of {SMALLEST_UNIT}"
        )
        return body, {path: reason for path, _, _ in ends}
    return body | {path: Target(len(body) + i, path, *shape, kind) for i, (path, kind, shape) in enumerate(ends)}, {}


def base_model(
    name: str,
    fingerprint: str,
    model: Any,
    targets: tuple[Mapping[str, Target], Mapping[str, str]],
    replaceable_modules: Collection[str],
    tokenizers: Tokenizers | None = None,
    kept_elsewhere: Mapping[str, Callable[[], torch.Tensor]] = MappingProxyType({}),
) -> BaseModel:
    """The model as adapters see it.

    Args:
        targets: what `targets_of` found.
        replaceable_modules: paths of the modules of which every parameter can be replaced for single rows; of the other
            targets only the weight can be.
        kept_elsewhere: parameter → its values, where the module does not have them any more.
    """
    found, no_targets = targets
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    first_names = {id(parameter): path for path, parameter in model.named_parameters()}
    tied = {path: first for path, p in parameters.items() if (first := first_names[id(p)]) != path}
    weights = {f"{path}.weight" for path in (*found, *no_targets)}
    replaceable = weights | {path for path in parameters if path.rpartition(".")[0] in replaceable_modules}

    def parameter(path: str) -> torch.Tensor:
        own = kept_elsewhere[path]() if path in kept_elsewhere else parameters[path].detach()
        values: torch.Tensor = own.to("cpu", torch.float32)
        return values

    def weight(path: str) -> torch.Tensor:
        values = parameter(f"{path}.weight")
        return values.T if found[path].kind is Kind.EMBEDDING else values

    @functools.cache
    def weight_norm(path: str) -> float:
        return float(torch.linalg.vector_norm(weight(path)))

    config = model.config.get_text_config()

    def read_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
        read: dict[str, Any] = type(config).from_dict(copy.deepcopy(dict(values))).to_dict()  # it changes what it reads
        return read

    return BaseModel(
        name=name,
        fingerprint=fingerprint,
        targets=found,
        other_modules=frozenset(path.rpartition(".")[0] for path in parameters) - found.keys(),
        weight=weight,
        bias=lambda path: parameter(f"{path}.bias"),
        weight_norm=weight_norm,
        parameter_names=frozenset(parameters.keys() - tied.keys()),
        parameter=parameter,
        tied=tied,
        replaceable=frozenset(replaceable),
        no_targets=no_targets,
        tokenizers=tokenizers,
        config=config.to_dict(),
        read_config=read_config,
    )
