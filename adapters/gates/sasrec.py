"""SASRec, the sequence model that turns a user's history into the state iLoRA's router reads.

    e_t = E[id_t] + P[t]                          an item where it stands
    a   = LN1(e_n)                                n: the last place, the only one that is read
    u   = a + Σ_t softmax_t(⟨Wq a + bq, Wk e_t + bk⟩ / √D) (Wv e_t + bv)
    v   = LN2(u),   z = LN3(LNf(v + W2 relu(W1 v + b1) + b2))

Keys and values are not normalised, the residual adds the normalised query, and there is no output projection. Places
after the last do not exist, so causality and masks need no code but for histories of unequal length.

Must not know: adapters, requests, routers. Every tensor is float32 on the CPU; a row does not depend on its neighbours.

Shapes: N users, T places of the longest history, D = 64.

Source: https://arxiv.org/abs/1808.09781 as LLaRA and iLoRA train it; ids are checked by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from motet.adapters.gates.weights import checked

WIDTH = 64
"""D: of item embeddings and user states, in every published checkpoint."""

_NORMS = ("ln_1", "ln_2", "ln_3", "feed_forward.layer_norm")
_ATTENTION = ("mh_attn.linear_q", "mh_attn.linear_k", "mh_attn.linear_v")
_CONVOLUTIONS = ("feed_forward.w_1", "feed_forward.w_2")


def shapes(items: int, history_length: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape; the embedding's last row is the padding's."""
    return {
        "item_embeddings.weight": (items + 1, WIDTH),
        "positional_embeddings.weight": (history_length, WIDTH),
        **{f"{name}.{part}": (WIDTH,) for name in _NORMS for part in ("weight", "bias")},
        **{f"{name}.weight": (WIDTH, WIDTH) for name in _ATTENTION},
        **{f"{name}.weight": (WIDTH, WIDTH, 1) for name in _CONVOLUTIONS},
        **{f"{name}.bias": (WIDTH,) for name in (*_ATTENTION, *_CONVOLUTIONS)},
    }


class Sasrec:
    """The encoder with one block and one head.

    Args:
        tensors: name → weight, as `shapes` says.

    Raises:
        FormatError: the tensors are not exactly those.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], items: int, history_length: int) -> None:
        self._weights = checked("sasrec", tensors, shapes(items, history_length))

    def items(self, ids: Sequence[int]) -> torch.Tensor:
        """Embeddings [n, 64] of items, without their places."""
        return self._weights["item_embeddings.weight"][list(ids)]

    def states(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """The state of each user after the last item.

        Args:
            histories: item ids, oldest first; at least one and at most `history_length`.

        Returns:
            [N, 64].
        """
        length_N = torch.tensor([len(history) for history in histories])
        longest = int(length_N.max())
        e_NTD = self._weights["positional_embeddings.weight"][:longest].repeat(len(histories), 1, 1)
        for row, history in enumerate(histories):
            e_NTD[row, : len(history)] += self.items(history)
        beyond_NT = torch.arange(longest) >= length_N[:, None]
        a_ND = self._norm("ln_1", e_NTD[torch.arange(len(histories)), length_N - 1])
        query_ND = self._linear("mh_attn.linear_q", a_ND)
        key_NTD, value_NTD = (self._linear(f"mh_attn.linear_{part}", e_NTD) for part in "kv")
        score_NT = torch.einsum("nd,ntd->nt", query_ND, key_NTD) / WIDTH**0.5
        share_NT = score_NT.masked_fill(beyond_NT, -torch.inf).softmax(-1)
        v_ND = self._norm("ln_2", a_ND + torch.einsum("nt,ntd->nd", share_NT, value_NTD))
        inner_ND = self._linear("feed_forward.w_2", self._linear("feed_forward.w_1", v_ND).relu())
        return self._norm("ln_3", self._norm("feed_forward.layer_norm", v_ND + inner_ND))

    def _norm(self, name: str, x_ND: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_ND, (WIDTH,), self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _linear(self, name: str, x_ND: torch.Tensor) -> torch.Tensor:
        """A linear, or a convolution of width one, which is the same."""
        weight_OI = self._weights[f"{name}.weight"].reshape(WIDTH, WIDTH)
        return F.linear(x_ND, weight_OI, self._weights[f"{name}.bias"])
