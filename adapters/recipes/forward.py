"""The states, the logits and the loss of a batch's answers, the common prefix computed once for all rows.

Must not know: optimisers, methods, data sets.

Shapes: B rows of a batch, T positions, N answer tokens of the whole batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from motet.adapters.recipes.corpus import IGNORED, Batch


def answer_states(model: Any, prefix: Sequence[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """State after the final norm [N, D] before each answer token, and that token [N], row after row.

    Gradients flow through the prefix too.

    Args:
        model: a causal language model of transformers; its body alone is called, to leave out the logits of the
            questions.
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
    return hidden[:, :-1][wanted], labels_BT[:, 1:][wanted]


def answer_logits(model: Any, prefix: Sequence[int], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 [N, V] and label [N] of each answer token; arguments as `answer_states` takes them."""
    states_ND, labels_N = answer_states(model, prefix, batch)
    return model.lm_head(states_ND).float(), labels_N


def answer_losses(model: Any, prefix: Sequence[int], batch: Batch) -> torch.Tensor:
    """Cross entropy of each answer token, float32 [N]; arguments as `answer_logits` takes them."""
    return torch.nn.functional.cross_entropy(*answer_logits(model, prefix, batch), reduction="none")
