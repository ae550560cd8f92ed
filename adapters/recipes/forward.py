"""The logits and the loss of a batch's answers, the common prefix computed once for all rows.

Must not know: optimisers, methods, data sets.

Shapes: B rows of a batch, T positions, N answer tokens of the whole batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from motet.adapters.recipes.corpus import IGNORED, Batch


def answer_logits(model: Any, prefix: Sequence[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 [N, V] and labels [N] of each answer token, row after row; gradients flow through the prefix too.

    Args:
        model: a causal language model of transformers; its two halves are called apart, to leave out the logits of
            the questions.
        prefix: token ids that precede every row.
        batch: padded to the right. No mask is needed: attention is causal, so no token sees a pad.
    """
    ids_BT, labels_BT = batch
    wanted = labels_BT[:, 1:] != IGNORED
    past = None
    if prefix:
        past = model.model(input_ids=torch.tensor([list(prefix)]), use_cache=True).past_key_values
        past.batch_repeat_interleave(len(ids_BT))
    hidden = model.model(input_ids=ids_BT, past_key_values=past, use_cache=past is not None).last_hidden_state
    return model.lm_head(hidden[:, :-1][wanted]).float(), labels_BT[:, 1:][wanted]


def answer_losses(model: Any, prefix: Sequence[int], batch: Batch) -> torch.Tensor:
    """Cross entropy of each answer token, float32 [N]; arguments as `answer_logits` takes them."""
    return torch.nn.functional.cross_entropy(*answer_logits(model, prefix, batch), reduction="none")
