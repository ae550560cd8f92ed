"""Compares the paged forward of a base model with the model's own, once, while it is loaded.

Must not know: adapters, requests. A family of models whose attention means more than the paged one computes is found
here and refused, instead of answering wrongly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from motet.server.engine.types import BlockId, GenerationId, Sampling, Span
from motet.server.model.attention import KvCache, LayerShape, refuse_unknown
from motet.server.model.batch import token_tensors
from motet.server.model.errors import UnsupportedModelError

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.03}
"""Largest accepted root mean square difference of the logits, in standard deviations of the logits.

Thirty layers of rounding cost 2e-6 (float32) and 0.07 (bfloat16) of them; a wrong mask or position costs about one."""

BLOCK_SIZE = 4
SEQUENCE = 21

_recorder_names = (f"motet_recorder_{i}" for i in itertools.count())


class SelfCheck:
    """Takes the reference before the model is changed, compares afterwards."""

    def __init__(self, model: Any) -> None:
        vocabulary = int(model.config.get_text_config().vocab_size)
        self._tokens = [(7 + 31 * i) % vocabulary for i in range(2 * SEQUENCE)]
        halves = torch.tensor(self._tokens, device=model.device).view(2, SEQUENCE)
        self._device, self._dtype = model.device, model.dtype
        own = model.config._attn_implementation
        try:
            self._expected_2V = model(input_ids=halves, use_cache=False).logits[:, -1].float()
            self.layers = _record_layers(model, halves[:1])
        except (TypeError, AttributeError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run as a causal language model: {error}"
            ) from error
        finally:
            model.set_attn_implementation(own)

    def compare(
        self, forward: Callable[[Sequence[Span], KvCache, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        """Compute the last logits of two sequences in three mixed steps and compare them with the model's own.

        Args:
            forward: of spans, a cache, tokens and positions [1, T] and the rows whose logits are needed; what it gives
                may lie where the next call writes.

        Raises:
            UnsupportedModelError: they differ by more than rounding explains.
        """
        cache = KvCache(self.layers, 2 * SEQUENCE, BLOCK_SIZE, self._dtype, self._device)
        last: dict[int, torch.Tensor] = {}
        # A whole prompt beside half of another; the other's rest but one token; then its last token alone.
        for spans in ([(0, 0, SEQUENCE), (1, 0, 9)], [(1, 9, SEQUENCE - 1)], [(1, SEQUENCE - 1, SEQUENCE)]):
            step = [self._span(*span) for span in spans]
            ends = torch.tensor([len(span.tokens) for span in step], device=self._device).cumsum(0) - 1
            logits_nV = forward(step, cache, *token_tensors(step, self._device), ends).to(torch.float32, copy=True)
            last.update(zip((sequence for sequence, _, _ in spans), logits_nV, strict=True))
        actual_2V = torch.stack([last[0], last[1]])
        deviation = float((actual_2V - self._expected_2V).square().mean().sqrt() / self._expected_2V.std())
        if not deviation <= TOLERANCE[self._dtype]:
            raise UnsupportedModelError(
                f"the paged forward differs from the model's own by {deviation:.2g} standard deviations of its logits "
                f"(limit {TOLERANCE[self._dtype]}); this family of models cannot be served exactly"
            )

    def _span(self, sequence: int, start: int, stop: int) -> Span:
        tokens = self._tokens[sequence * SEQUENCE : (sequence + 1) * SEQUENCE]
        blocks = range(sequence * SEQUENCE, sequence * SEQUENCE + -(-stop // BLOCK_SIZE))
        return Span(
            generation=GenerationId(sequence),
            applied=(),
            tokens=tuple(tokens[start:stop]),
            start=start,
            blocks=tuple(BlockId(block) for block in blocks),
            draw=True,
            sampling=Sampling(max_tokens=1),
            drawn=0,
        )


def _record_layers(model: Any, tokens_1T: torch.Tensor) -> dict[int, LayerShape]:
    """Key-value geometry of every attention layer, as the layers themselves call it."""
    layers: dict[int, LayerShape] = {}

    def record(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,  # noqa: ARG001 - named, so that it does not count as unknown
        sliding_window: int | None = None,  # noqa: ARG001 - likewise
        **extra: Any,
    ) -> tuple[torch.Tensor, None]:
        refuse_unknown(module, attention_mask, extra)
        if key.shape != value.shape:
            raise UnsupportedModelError("keys and values of different widths are not served")
        layers[int(module.layer_idx)] = LayerShape(key.shape[1], key.shape[3])  # type: ignore[arg-type]
        return query.transpose(1, 2), None

    name = next(_recorder_names)
    ALL_ATTENTION_FUNCTIONS.register(name, record)
    model.set_attn_implementation(name)
    model(input_ids=tokens_1T, use_cache=False)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} does not call transformers' attention interface")
    return layers
