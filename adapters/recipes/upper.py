"""Training of the last decoder layers only: what the frozen ones below say of every token is computed once and kept.

The model that is left reads, in place of a token id, the number of a kept state; everything else stays as it was, so
that any method can start on it. Its layers count from 0 again: it is for measuring, its adapters fit no whole model.

Must not know: methods, tasks, the loop.

Shapes: B rows of a batch, T positions, S kept states, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from motet.adapters.recipes.corpus import IGNORED, Batch, Corpus

ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class KeptCorpus(Corpus):
    """A corpus whose inputs, the prefix and `rows`, are numbers of states.

    Attributes:
        answers: the token ids of each row's answer, which the inputs no longer say.
    """

    answers: tuple[list[int], ...] = ()

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The numbers of the states, and as labels the tokens."""
        ids_BT, _ = Corpus.batch(self, numbers)
        labels = [torch.tensor([IGNORED] * len(self.rows[n][0]) + self.answers[n]) for n in numbers]
        return ids_BT, pad_sequence(labels, batch_first=True, padding_value=IGNORED)


@torch.no_grad()
def cut(model: Any, corpus: Corpus, n_layers: int) -> KeptCorpus:
    """Leave the model its last layers, and make the corpus that they read.

    Args:
        model: a causal language model of transformers without an adapter; it is changed.
        corpus: every row that the model will ever see; parts of it are made by taking rows.
        n_layers: that are left, fewer than the model has.
    """
    body = model.model
    layers, norm = body.layers, body.norm
    assert 0 < n_layers < len(layers)
    body.layers, body.norm = layers[:-n_layers], nn.Identity()
    model.eval()
    prefix_SD, rows_SD = _states(body, corpus)
    body.layers, body.norm = layers[-n_layers:], norm
    for number, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = number  # its place in the cache
    table_SD = torch.cat([prefix_SD, *rows_SD])
    body.embed_tokens = nn.Embedding(len(table_SD), table_SD.shape[1], _weight=table_SD, _freeze=True)
    prefix = list(range(len(prefix_SD)))
    rows, next_state = [], len(prefix)
    for asked, told in corpus.rows:
        middle, end = next_state + len(asked), next_state + len(asked) + len(told)
        rows.append((list(range(next_state, middle)), list(range(middle, end))))
        next_state = end
    return KeptCorpus(prefix, rows, corpus.users, tuple(told for _, told in corpus.rows))


def _states(body: Any, corpus: Corpus) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of the prefix and of every row, float32 [S, D], in the order of the rows."""
    prefix_SD = torch.empty(0, body.config.hidden_size)
    if corpus.prefix:
        prefix_SD = body(input_ids=torch.tensor([corpus.prefix])).last_hidden_state[0]
    kept: list[torch.Tensor] = [prefix_SD] * len(corpus.rows)
    order = sorted(range(len(kept)), key=lambda number: sum(map(len, corpus.rows[number])))
    for start in range(0, len(order), ROWS_AT_ONCE):
        numbers = order[start : start + ROWS_AT_ONCE]
        ids_BT, _ = corpus.batch(numbers)
        past = None
        if corpus.prefix:
            past = body(input_ids=torch.tensor([corpus.prefix]), use_cache=True).past_key_values
            past.batch_repeat_interleave(len(numbers))
        states_BTD = body(input_ids=ids_BT, past_key_values=past, use_cache=past is not None).last_hidden_state
        for number, states_TD in zip(numbers, states_BTD, strict=True):
            kept[number] = states_TD[: sum(map(len, corpus.rows[number]))].clone()
    return prefix_SD, kept
