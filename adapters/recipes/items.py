"""Items in a question: what the base reads at a marker is the projected SASRec embedding of an item of the row's user.

What the projector computes is `motet.adapters.gates.projector`, by the same names of tensors; how a prompt has markers
is the server's `placeholders`.

Must not know: adapters, tasks, gates of users.

Shapes: N rows, T positions, n items, D and S width of the base's and SASRec's embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AddedToken

from motet.adapters.gates.sasrec import WIDTH, Sasrec
from motet.adapters.recipes.readers import MARKERS, User


def with_markers(tokenizer: Any) -> Any:
    """A copy to which each marker is a token of its own."""
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS.values()])
    return marked


def marker_ids(tokenizer: Any) -> list[int]:
    """The markers' ids in `with_markers`, in the order of a user's fields."""
    marked = with_markers(tokenizer)
    return [marked.convert_tokens_to_ids(MARKERS[field]) for field in User._fields]


class ItemEmbedding(nn.Module):
    """The frozen input embedding with a projector beside it."""

    def __init__(self, base: nn.Embedding, sasrec: Sasrec, items: int, markers: Sequence[int]) -> None:
        """The projector draws torch's own random start, scaled so that items differ as the base's tokens do.

        Unscaled, they differ by 4 % of that beside SmolLM2: all would look alike for as long as a small training lasts.

        Args:
            items: how many there are.
        """
        super().__init__()
        self.base_layer, self._sasrec, self._markers = base, sasrec, markers
        width = base.embedding_dim
        first, second = nn.Linear(WIDTH, width), nn.Linear(width, width)
        self.mlp_proj = nn.Sequential(first, nn.GELU(), second)
        self._users: Sequence[User] = ()
        with torch.no_grad():
            item_nS = sasrec.items(range(items))
            first.weight /= item_nS.std()
            second.weight *= base.weight.std() / self.mlp_proj(item_nS).std(0).mean()

    def see(self, users: Sequence[User]) -> None:
        """Set the users of the rows of the next forward, in their order; those after it go on with answers."""
        self._users = users

    def forward(self, id_NT: torch.Tensor) -> torch.Tensor:
        """[N, T, D]; without users, and at any other token, as the base."""
        users, self._users = self._users, ()
        marked_NT = torch.isin(id_NT, torch.tensor(self._markers)) & bool(users)
        x_NTD: torch.Tensor = self.base_layer(id_NT.masked_fill(marked_NT, 0))
        for field, marker in enumerate(self._markers if users else ()):
            if len(place_n2 := (id_NT == marker).nonzero()):
                items = [item for user in users for item in user[field]]
                assert len(items) == len(place_n2), (len(items), len(place_n2))
                row_nD = self.mlp_proj(self._sasrec.items(items))
                x_NTD = x_NTD.index_put(tuple(place_n2.T), row_nD.to(x_NTD.dtype))
        return x_NTD
