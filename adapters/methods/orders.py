"""In which order a whole model keeps its feed-forward channels and attention heads, compared with the base.

Must not know: what was trained. A feed-forward channel is a row of gate_proj and up_proj and a column of down_proj; a
query head is a block of rows of q_proj and of columns of o_proj, a key-value head of rows of k_proj and v_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from motet.adapters.base import BaseModel
from motet.adapters.errors import ConfigError
from motet.adapters.methods.base_weights import alike, stored
from motet.adapters.methods.config_values import positive_int
from motet.adapters.methods.permutation import order_of
from motet.adapters.source import AdapterFiles

GATE, QUERY = "gate_proj", "q_proj"


@dataclass(frozen=True, slots=True, eq=False)
class Orders:
    """The orders that differ from the base's.

    Attributes:
        rows: target → for each row, its place in the base.
        columns: target → for each column, its place in the base.
    """

    rows: Mapping[str, torch.Tensor]
    columns: Mapping[str, torch.Tensor]

    def undo(self, target: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """The weight with rows and columns in the base's places."""
        if target in self.rows:
            weight_OI = weight_OI[self.rows[target].argsort()]
        if target in self.columns:
            weight_OI = weight_OI[:, self.columns[target].argsort()]
        return weight_OI

    def undo_bias(self, target: str, bias_O: torch.Tensor) -> torch.Tensor:
        """The bias with its elements in the base's places."""
        return bias_O[self.rows[target].argsort()] if target in self.rows else bias_O


def recover(model: AdapterFiles, base: BaseModel) -> Orders:
    """Recognise gate_proj's rows and the heads of q_proj and k_proj among the base's.

    Raises:
        ConfigError: something was moved and cannot be recognised, or heads no longer share the keys they did.
    """
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    for name in base.targets:
        stem, _, leaf = name.rpartition(".")
        if leaf == GATE:
            order = _order(model, base, name, block=1, what=f"the rows of {name!r}")
            if order is not None:
                rows |= {f"{stem}.gate_proj": order, f"{stem}.up_proj": order}
                columns[f"{stem}.down_proj"] = order
        elif leaf == QUERY:
            queries, keys = _head_orders(model, base, stem)
            if queries is not None:
                rows[f"{stem}.q_proj"] = columns[f"{stem}.o_proj"] = queries
            if keys is not None:
                rows |= {f"{stem}.k_proj": keys, f"{stem}.v_proj": keys}
    return Orders(rows, columns)


def _head_orders(model: AdapterFiles, base: BaseModel, stem: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Row orders of the query heads and of the key-value heads; None where unchanged."""
    heads = positive_int("num_attention_heads", model.config.get("num_attention_heads"))
    shared = positive_int("num_key_value_heads", model.config.get("num_key_value_heads") or heads)
    width = base.targets[f"{stem}.q_proj"].out_width // heads
    query = _order(model, base, f"{stem}.q_proj", block=width, what=f"the heads of '{stem}.q_proj'")
    key = _order(model, base, f"{stem}.k_proj", block=width, what=f"the heads of '{stem}.k_proj'")
    group = heads // shared
    query_place = torch.arange(heads) if query is None else query[::width] // width
    key_place = torch.arange(shared) if key is None else key[::width] // width
    if not torch.equal(query_place // group, key_place.repeat_interleave(group)):
        raise ConfigError(
            f"the query heads of {stem!r} were moved away from the key heads they share in the base: the directory is "
            "no reordered fine-tune of it"
        )
    return query, key


def _order(model: AdapterFiles, base: BaseModel, name: str, block: int, what: str) -> torch.Tensor | None:
    """Order of the rows, where whole blocks of rows were moved; None where they stand in their places."""
    target = base.targets[name]
    values_OI, own_OI = alike(stored(model, f"{name}.weight", (target.out_width, target.in_width)), base.weight(name))
    order = order_of(values_OI.reshape(-1, block * target.in_width), own_OI.reshape(-1, block * target.in_width), what)
    if order is None or torch.equal(order, torch.arange(len(order))):
        return None
    return (order[:, None] * block + torch.arange(block)).reshape(-1)
