"""What a PEFT folder says of the embedding and the head beside LoRA: layers saved whole, trained token rows.

    {module}.weight, or {module}[.token_adapter].base_layer.weight     the layer as it was in training
    {module}.token_adapter.trainable_tokens_delta [S, D]               new rows, not differences

Must not know: LoRA pairs, scales.

Source: PEFT's `save_embedding_layers`, and `TrainableTokensLayer`; what it ties, it ties only where the base is tied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from motet.adapters.base import BaseModel
from motet.adapters.errors import ConfigError, UnsupportedError, listed
from motet.adapters.methods.peft_config import PeftLoraConfig
from motet.adapters.methods.tensors import PREFIX, TensorBag
from motet.adapters.methods.vocabulary import end_paths

LAYERS = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
TOKENS = ".token_adapter.trainable_tokens_delta"


def new_ends(
    config: PeftLoraConfig, bag: TensorBag, base: BaseModel, expected: frozenset[str]
) -> dict[str, torch.Tensor]:
    """Take what is there out of the bag, rows that only pad too.

    Args:
        expected: targets with a pair.

    Returns:
        Path of the embedding or the head → its weight [N, D] in training; only of those the folder has something of.

    Raises:
        FormatError: what is there contradicts the configuration or the base.
    """
    ends = _saved_layers(bag, base)
    rows = _trained_rows(config, bag, base)
    for paths, tokens, row_SD in rows:
        if both := expected & set(paths):
            raise UnsupportedError(f"{listed(both, 1)} has a LoRA pair and trained token rows, which PEFT cannot run")
        own_ND = ends.get(paths[0], base.parameter(f"{paths[0]}.weight"))
        if missing := set(range(len(own_ND), max(tokens) + 1)).difference(tokens):
            raise ConfigError(
                f"trainable_token_indices adds token {max(tokens)}, but the adapter has no row for {min(missing)}; "
                "train all added tokens, or save the adapter with save_embedding_layers=True"
            )
        values_ND = F.pad(own_ND, (0, 0, 0, max(0, max(tokens) + 1 - len(own_ND))))
        values_ND = values_ND.clone() if values_ND is own_ND else values_ND
        values_ND[torch.tensor(tokens)] = row_SD
        ends |= dict.fromkeys(paths, values_ND)
    return ends


def _saved_layers(bag: TensorBag, base: BaseModel) -> dict[str, torch.Tensor]:
    """Layers saved whole; PEFT loads them into the base's parameter, which tied modules share."""
    saved: dict[str, torch.Tensor] = {}
    by_parameter: dict[str, torch.Tensor] = {}
    for path in end_paths(base):
        name = f"{path}.weight"
        for key in (f"{PREFIX}{path}{ending}" for ending in LAYERS):
            if (rows := bag.rows(key)) is None:
                continue  # before the base's layer is copied to float32 for its shape
            vocabulary, width = base.parameter(name).shape
            values_VD = bag.take(key, (max(vocabulary, rows), width))
            other_VD = by_parameter.setdefault(base.tied.get(name, name), values_VD)
            if not torch.equal(values_VD, other_VD):
                raise ConfigError(
                    f"tensor {key!r} differs from that of the layer it is tied to in {base.name!r}; which of the "
                    "two was trained cannot be told: save the adapter again"
                )
    for path in end_paths(base):
        name = f"{path}.weight"
        if (first := base.tied.get(name, name)) in by_parameter:
            saved[path] = by_parameter[first]
    return saved


def _trained_rows(
    config: PeftLoraConfig, bag: TensorBag, base: BaseModel
) -> list[tuple[list[str], tuple[int, ...], torch.Tensor]]:
    """(paths the rows go to, tokens, rows [S, D]) of every token adapter."""
    ends = end_paths(base)
    wanted = {path: tokens for name, tokens in config.trained_tokens.items() for path in [_path(name, base)]}
    found: list[tuple[list[str], tuple[int, ...], torch.Tensor]] = []
    first, others = ends[:1], ends[1:]
    tied = [path for path in others if base.tied.get(f"{path}.weight") == f"{first[0]}.weight"]
    if first and first[0] in wanted:
        # PEFT ties the head's rows to the embedding's, unless the configuration names others for it.
        tied = [path for path in tied if wanted.get(path, wanted[first[0]]) == wanted[first[0]]]
        wanted = {path: tokens for path, tokens in wanted.items() if path not in tied}
    else:
        tied = []
    for path, tokens in wanted.items():
        _, width = base.parameter(f"{path}.weight").shape
        row_SD = bag.take(f"{PREFIX}{path}{TOKENS}", (len(tokens), width))
        partners = tied if path in first else []
        for partner in partners:
            copy_SD = bag.take_if_present(f"{PREFIX}{partner}{TOKENS}", (len(tokens), width))
            if copy_SD is not None and not torch.equal(copy_SD, row_SD):
                raise ConfigError(
                    f"{partner!r} has other trained rows than {path!r}, to which it is tied; save it again"
                )
        found.append(([path, *partners], tokens, row_SD))
    return found


def _path(name: str | None, base: BaseModel) -> str:
    """The embedding or head that a name in `trainable_token_indices` means."""
    ends = end_paths(base)
    matching = ends[:1] if name is None else [path for path in ends if path == name or path.endswith(f".{name}")]
    if len(matching) != 1:
        raise UnsupportedError(
            f"trainable_token_indices names {name!r}, which is neither the embedding nor the head of {base.name!r}; "
            "trained rows of other modules are not served"
        )
    return matching[0]
