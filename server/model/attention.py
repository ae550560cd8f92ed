"""Paged attention for any transformers model that calls its attention through the attention interface.

Must not know: adapters, sampling, the scheduler. The batch is one row of T tokens from many sequences; keys and values
live in blocks, a sequence's history is found through its block list. Decode rows are grouped by the power of two of
their context, so that a group pads to at most twice its shortest member and a long neighbour costs nothing; prompt
chunks are computed sequence by sequence, never padded.

Shapes: T rows, K key-value heads, G query heads per key-value head, D head width, L positions, n sequences of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from motet.kernels.cpu.pages import in_large_pages
from motet.server.engine.types import Span
from motet.server.model.errors import UnsupportedModelError

HARMLESS = frozenset({"cache_position", "dropout", "is_causal", "logits_to_keep", "position_ids", "use_cache"})
"""Keyword arguments of attention calls that cannot change a causal result; any other that says something is refused."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Key-value geometry of one attention layer."""

    heads: int
    head_width: int


class KvCache:
    """Keys and values of every layer: [blocks + 1, block_size, K, D] each; the last block stays zero and pads lists.

    Note: written in the step thread only. The scheduler decides which blocks mean what.
    """

    def __init__(
        self, layers: Mapping[int, LayerShape], blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.blocks = blocks

        def empty(shape: LayerShape) -> torch.Tensor:
            size = blocks + 1, block_size, shape.heads, shape.head_width
            return in_large_pages(torch.empty(size, dtype=dtype, device=device)).zero_()

        self.keys = {i: empty(shape) for i, shape in layers.items()}
        self.values = {i: empty(shape) for i, shape in layers.items()}

    @staticmethod
    def block_bytes(layers: Mapping[int, LayerShape], block_size: int, dtype: torch.dtype) -> int:
        """Bytes one block takes over all layers."""
        return sum(2 * block_size * s.heads * s.head_width * dtype.itemsize for s in layers.values())


@dataclass(frozen=True, slots=True, eq=False)
class _Decodes:
    """Rows that attend alone, with contexts of similar length.

    Attributes:
        rows_n: their rows in the batch.
        blocks: [n · blocks per sequence] block list, padded with the cache's zero block.
        lengths_n: positions each row attends to, its own included.
    """

    rows_n: torch.Tensor
    blocks: torch.Tensor
    lengths_n: torch.Tensor
    masks: dict[tuple[int | None, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Rows start…stop of one sequence's prompt, from position `first` on."""

    start: int
    stop: int
    first: int
    blocks: torch.Tensor
    masks: dict[int | None, torch.Tensor]


class AttentionBatch:
    """One step's rows, as attention sees them. Built once, used by every layer.

    Attributes:
        slots_T: where each row's keys and values go, in positions of the cache.
        begun: blocks that are written for the first time and not filled: what is stale in them is cleared, because a
            masked position still multiplies, and another request's infinity times zero would be NaN.
    """

    def __init__(self, spans: Sequence[Span], cache: KvCache, device: torch.device) -> None:
        block_size = self._block_size = cache.block_size
        slots: list[int] = []
        begun: list[int] = []
        self._chunks: list[_Chunk] = []
        singles: dict[int, list[tuple[int, Span]]] = {}
        row = 0
        for span in spans:
            positions = range(span.start, span.start + len(span.tokens))
            slots += [span.blocks[at // block_size] * block_size + at % block_size for at in positions]
            stop = span.start + len(span.tokens)
            if stop % block_size and stop % block_size <= len(span.tokens):
                begun.append(span.blocks[stop // block_size])
            if len(span.tokens) == 1:
                singles.setdefault((len(span.blocks) - 1).bit_length(), []).append((row, span))
            else:
                blocks = torch.tensor(span.blocks, device=device)
                self._chunks.append(_Chunk(row, row + len(span.tokens), span.start, blocks, {}))
            row += len(span.tokens)
        self.slots_T = torch.tensor(slots, device=device)
        self.begun = torch.tensor(begun, device=device) if begun else None
        self._decodes = [self._group(members, cache.blocks, device) for members in singles.values()]

    @staticmethod
    def _group(members: list[tuple[int, Span]], zero_block: int, device: torch.device) -> _Decodes:
        longest = max(len(span.blocks) for _, span in members)
        padding = (zero_block,) * longest
        blocks = [block for _, span in members for block in (*span.blocks, *padding)[:longest]]
        return _Decodes(
            rows_n=torch.tensor([row for row, _ in members], device=device),
            blocks=torch.tensor(blocks, device=device),
            lengths_n=torch.tensor([span.start + 1 for _, span in members], device=device),
            masks={},
        )

    def attend(
        self,
        query_THD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Causal attention of every row over its own sequence.

        Args:
            query_THD: [T, K·G, D].
            keys, values: the layer's cache [blocks, block_size, K, D], this step's rows already written.
            scale: factor of the scores; None is 1/√D.
            window: attend to this many latest positions, the row's own included; None attends to all.

        Returns:
            [T, K·G, D].
        """
        out_THD = torch.empty_like(query_THD)
        for decodes in self._decodes:
            out_THD.index_copy_(0, decodes.rows_n, self._decode(decodes, query_THD, keys, values, scale, window))
        for chunk in self._chunks:
            out_THD[chunk.start : chunk.stop] = self._chunk(chunk, query_THD, keys, values, scale, window)
        return out_THD

    def _decode(
        self,
        decodes: _Decodes,
        query_THD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        n, (heads, width) = len(decodes.rows_n), keys.shape[2:]
        # The query heads that share a key-value head become the query axis: no copy of keys per query head.
        query_nKGD = query_THD.index_select(0, decodes.rows_n).view(n, heads, -1, width)
        keys_nKLD = keys.index_select(0, decodes.blocks).view(n, -1, heads, width).transpose(1, 2)
        values_nKLD = values.index_select(0, decodes.blocks).view(n, -1, heads, width).transpose(1, 2)
        mask = decodes.masks.get((window, query_THD.dtype))
        if mask is None:
            mask = decodes.masks[(window, query_THD.dtype)] = self._decode_mask(decodes, query_THD.dtype, window)
        mask_n1GL = mask.expand(-1, -1, query_nKGD.shape[2], -1)
        out_nKGD = F.scaled_dot_product_attention(query_nKGD, keys_nKLD, values_nKLD, attn_mask=mask_n1GL, scale=scale)
        return out_nKGD.reshape(n, -1, width)

    def _decode_mask(self, decodes: _Decodes, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        n = len(decodes.rows_n)
        positions_L = torch.arange(len(decodes.blocks) // n * self._block_size, device=decodes.blocks.device)
        seen_nL = positions_L < decodes.lengths_n[:, None]
        if window is not None:
            seen_nL &= positions_L >= decodes.lengths_n[:, None] - window
        zeros_nL = torch.zeros(seen_nL.shape, dtype=dtype, device=seen_nL.device)
        return zeros_nL.masked_fill_(~seen_nL, float("-inf"))[:, None, None]

    def _chunk(
        self,
        chunk: _Chunk,
        query_THD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        length = chunk.first + chunk.stop - chunk.start
        heads, width = keys.shape[2:]
        keys_LKD = keys.index_select(0, chunk.blocks).view(-1, heads, width)[:length]
        values_LKD = values.index_select(0, chunk.blocks).view(-1, heads, width)[:length]
        plain = chunk.first == 0 and (window is None or length <= window)
        if not plain and window not in chunk.masks:
            positions_L = torch.arange(length, device=query_THD.device)
            rows_t = positions_L[chunk.first :, None]
            seen_tL = positions_L <= rows_t
            if window is not None:
                seen_tL &= positions_L > rows_t - window
            chunk.masks[window] = seen_tL
        out_HtD = F.scaled_dot_product_attention(
            query_THD[None, chunk.start : chunk.stop].transpose(1, 2),
            keys_LKD[None].transpose(1, 2),
            values_LKD[None].transpose(1, 2),
            attn_mask=None if plain else chunk.masks[window],
            is_causal=plain,
            scale=scale,
            enable_gqa=query_THD.shape[1] != heads,
        )
        return out_HtD[0].transpose(0, 1)


class PagedAttention:
    """The function transformers calls in every attention layer.

    Attributes:
        cache: set once the layers' shapes are known.
        batch: set for the duration of a step.
    """

    def __init__(self) -> None:
        self.cache: KvCache | None = None
        self.batch: AttentionBatch | None = None

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **extra: Any,
    ) -> tuple[torch.Tensor, None]:
        """Write the rows' keys and values to the cache and attend.

        Args:
            query: [1, K·G, T, D]; key, value: [1, K, T, D].

        Raises:
            UnsupportedModelError: the model asks for something that would change the result.
        """
        refuse_unknown(module, attention_mask, extra)
        assert self.cache is not None
        assert self.batch is not None
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.batch.begun is not None:
            keys.index_fill_(0, self.batch.begun, 0)
            values.index_fill_(0, self.batch.begun, 0)
        keys.view(-1, *keys.shape[2:]).index_copy_(0, self.batch.slots_T, key[0].transpose(0, 1))
        values.view(-1, *values.shape[2:]).index_copy_(0, self.batch.slots_T, value[0].transpose(0, 1))
        out_THD = self.batch.attend(query[0].transpose(0, 1), keys, values, scaling, sliding_window)
        return out_THD[None], None


def refuse_unknown(module: nn.Module, attention_mask: torch.Tensor | None, extra: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError when an attention call says more than causal, scaled and windowed.

    Soft-capped scores, attention sinks and position biases all arrive as keyword arguments or module attributes.
    """
    said = {name: value for name, value in extra.items() if value is not None and name not in HARMLESS}
    if getattr(module, "sinks", None) is not None:
        said["sinks"] = True
    if attention_mask is not None:
        said["attention_mask"] = True
    if not getattr(module, "is_causal", True):
        said["is_causal"] = False
    if said:
        raise UnsupportedModelError(
            f"the attention of {type(module).__name__} uses {', '.join(sorted(said))}, which the paged attention does "
            "not compute; serve another base model"
        )
