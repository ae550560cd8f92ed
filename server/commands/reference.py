"""An adapter's dense float32 model in plain transformers: what the served log-probabilities are compared with.

Must not know: the serving path, how adapters are read. It shares with the server only the effects and their formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from motet.adapters.dense import merge
from motet.adapters.effects import Lowered
from motet.server.model.errors import ModelNotFoundError
from motet.server.model.fingerprint import fingerprint


class DenseReference:
    """The base model in float32 on the CPU, until an adapter is merged into it.

    Args:
        path: a directory or a hub id.
    """

    def __init__(self, path: str) -> None:
        self._model = _load(path, torch.float32)

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Natural log-probabilities of the tokens from the second on."""
        ids_1T = torch.tensor([tokens])
        logits_TV = self._model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
        found: list[float] = logits_TV.log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0].tolist()
        return found

    @torch.inference_mode()
    def merge(self, lowered: Lowered) -> None:
        """Make it the model of the adapter, whose gate is fixed where it had one, for good."""
        assert lowered.gate is None, "a dense model has no gate"
        for path, values in lowered.overlays.items():  # before the effects, which act on what is replaced
            module, _, name = path.rpartition(".")
            setattr(self._model.get_submodule(module), name, nn.Parameter(values.clone(), requires_grad=False))
        for target, effects in lowered.effects.items():
            layer = self._model.get_submodule(target)
            embeds = isinstance(layer, nn.Embedding)
            assert embeds or isinstance(layer, nn.Linear)
            weight_OI, bias_O = merge(
                effects, layer.weight.T if embeds else layer.weight, None if embeds else layer.bias
            )
            layer.weight = nn.Parameter(weight_OI.T if embeds else weight_OI, requires_grad=False)
            if bias_O is not None:
                layer.bias = nn.Parameter(bias_O, requires_grad=False)


def base_fingerprint(path: str, dtype: str) -> str:
    """What a server that serves this model in this dtype calls its fingerprint."""
    return fingerprint(_load(path, getattr(torch, dtype)))


def _load(path: str, dtype: torch.dtype) -> Any:
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
        return model.eval()
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"model {path!r} cannot be loaded as a causal language model: {error}") from error
