"""The whole step of a decoder of Llama's shape in one native call.

Must not know: requests, sampling, methods. Which models it serves is decided once, at load, from their modules and by
the self-check; which rows, from what their adapters do (`motet.server.model.division`).

Shapes: T rows, n rows whose logits or features are needed, D width of the model, V vocabulary, C targets, S segments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from motet.kernels.cpu.compiled import Effects, Engine, Layer, Linear, LowRank, Model, RowVectors, Step, address
from motet.kernels.cpu.native_low_rank import NativePlan
from motet.kernels.epilogue import RowVectorPlan
from motet.server.engine.types import Span
from motet.server.model.attention import KvCache
from motet.server.model.batch import StepChanges
from motet.server.model.inject import AdaptedLinear, StepEffects

STEADY_ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotations whose angles do not depend on how long the sequences of a step are."""

MOST_KEPT_ROWS = 64
"""Of logits whose memory is kept."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """A step's effects as the native call reads them, and what keeps their memory."""

    of: StepEffects
    effects: Effects
    kept: Sequence[object]


class NativeDecoder:
    """Computes all layers of a step, and the head where nothing else has a say in it.

    Note: used by the step thread only.
    """

    def __init__(self, engine: Engine, model: Any) -> None:
        decoder, config = model.model, model.config
        self._engine, self._dtype = engine, model.dtype
        self._embed, self._rotary, self._lm_head = decoder.embed_tokens, decoder.rotary_emb, model.lm_head
        self._kept: list[torch.Tensor] = []
        self._layers = (Layer * len(decoder.layers))(*(self._layer(layer) for layer in decoder.layers))
        attention = decoder.layers[0].self_attn
        self._model = Model(
            layers=self._layers,
            n_layers=len(decoder.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_width=attention.head_dim,
            eps=decoder.norm.variance_epsilon,
            score_scale=attention.scaling,
            final_norm=self._vector(decoder.norm.weight),
            head=_described(model.lm_head),
        )
        self._cache: KvCache | None = None
        self._prepared: _Prepared | None = None
        self._kept_logits: torch.Tensor | None = None

    def forward(
        self,
        spans: Sequence[Span],
        cache: KvCache,
        tokens_1T: torch.Tensor,
        positions_1T: torch.Tensor,
        rows_n: torch.Tensor,
        changes: StepChanges | None = None,
        *,
        features: bool = False,
    ) -> torch.Tensor:
        """[n, V] logits of the given rows, until the next call; float32 unless adapters change the head.

        Args:
            changes: low-rank pairs, scales and biases; those of embedding and head must be where their modules find
                them.
            features: whether someone listens to what the head reads.
        """
        self._bind(cache)
        embedded_TD = self._embed(tokens_1T)[0].contiguous()
        cos, sin = self._rotary(torch.empty(0), positions_1T)
        normed_nD = torch.empty((len(rows_n), embedded_TD.shape[1]), dtype=self._dtype)
        head_apart = features or (changes is not None and changes.head is not None)
        logits_nV = None if head_apart else self._logits(len(rows_n))
        tables = _Tables(spans, cache.block_size)
        effects = self._effects(changes.body) if changes is not None and changes.body is not None else None
        self._engine.step(
            self._dtype,
            Step(
                model=ctypes.pointer(self._model),
                effects=None if effects is None else ctypes.pointer(effects),
                rows=len(embedded_TD),
                embedded=address(embedded_TD),
                cos=address(cos),
                sin=address(sin),
                positions=address(positions_1T),
                sequence=address(tables.sequence_T),
                first_block=address(tables.first_block),
                blocks=address(tables.blocks),
                block_size=cache.block_size,
                begun=address(tables.begun),
                n_begun=len(tables.begun),
                kept=address(rows_n),
                n_kept=len(rows_n),
                normed=address(normed_nD),
                logits=None if logits_nV is None else address(logits_nV),
            ),
        )
        if logits_nV is not None:
            return logits_nV
        of_head_nV: torch.Tensor = self._lm_head(normed_nD[None])[0]
        return of_head_nV

    def _logits(self, rows: int) -> torch.Tensor:
        """[n, V], kept from step to step where it is small: the system takes a millisecond to give 6 MB anew."""
        if rows > MOST_KEPT_ROWS:
            return torch.empty((rows, self._model.head.out))
        if self._kept_logits is None or len(self._kept_logits) < rows:
            self._kept_logits = torch.empty((rows, self._model.head.out))
        return self._kept_logits[:rows]

    def _bind(self, cache: KvCache) -> None:
        if cache is not self._cache:
            self._cache = cache
            for i, layer in enumerate(self._layers):
                layer.keys, layer.values = address(cache.keys[i]), address(cache.values[i])

    def _effects(self, body: StepEffects) -> Effects:
        if self._prepared is None or self._prepared.of is not body:
            self._prepared = _prepare(body)
        return self._prepared.effects

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        return Layer(
            *(_described(linear) for linear in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
            attention_norm=self._vector(layer.input_layernorm.weight),
            ffn_norm=self._vector(layer.post_attention_layernorm.weight),
        )

    def _vector(self, weight_D: torch.Tensor) -> int:
        self._kept.append(weight_D.detach().float().contiguous())
        return address(self._kept[-1])


def native_decoder(engine: Engine, model: Any) -> NativeDecoder | None:
    """The native step of a model whose linears were replaced and packed; None where the model is of another shape."""
    config = model.config
    if type(model) not in (LlamaForCausalLM, Qwen2ForCausalLM) or getattr(config, "use_sliding_window", False):
        return None
    packed = all(one.packed is not None for one in model.modules() if isinstance(one, AdaptedLinear))
    plain = config.hidden_act == "silu" and config.rope_parameters["rope_type"] in STEADY_ROTATIONS
    paired = model.model.layers[0].self_attn.head_dim % 2 == 0
    return NativeDecoder(engine, model) if packed and plain and paired else None


def _described(linear: AdaptedLinear) -> Linear:
    assert linear.packed is not None
    return linear.packed.described(linear.target)


def _prepare(body: StepEffects) -> _Prepared:
    plans = [plan for plan in body.low_rank if isinstance(plan, NativePlan)]
    assert len(plans) == len(body.low_rank), "a native step's plans are native"
    assert body.sparse is None, "a native step has no sparse changes"
    assert body.signs is None, "a native step has no packed signs"
    arena_NU = plans[0].arena_NU
    low_rank = (LowRank * len(plans))(*(plan.low_rank for plan in plans))
    scales, biases = _row_vectors(body.scales), _row_vectors(body.biases)
    effects = Effects(
        arena=address(arena_NU),
        unit=arena_NU.shape[1],
        targets=plans[0].n_targets,
        low_rank=low_rank,
        n_low_rank=len(plans),
        scales=None if scales is None else ctypes.pointer(scales[0]),
        biases=None if biases is None else ctypes.pointer(biases[0]),
    )
    return _Prepared(body, effects, (plans, low_rank, scales, biases))


def _row_vectors(plan: RowVectorPlan | None) -> tuple[RowVectors, list[np.ndarray]] | None:
    if plan is None or not plan.vectors.present.any():
        return None
    vectors = plan.vectors
    tables = [np.ascontiguousarray(one, dtype=np.int32) for one in (vectors.row_start, vectors.row_stop, vectors.first)]
    tables.append(np.ascontiguousarray(vectors.present, dtype=np.uint8))
    return RowVectors(len(vectors.row_start), *(address(table) for table in tables)), tables


class _Tables:
    """Where the rows of a step find the keys and values of their sequences.

    Attributes:
        sequence_T: which span a row is of.
        first_block: where a span's blocks begin in `blocks`.
        begun: blocks written for the first time and not filled, see `motet.server.model.attention.AttentionBatch`.
    """

    def __init__(self, spans: Sequence[Span], block_size: int) -> None:
        counts = np.array([len(span.tokens) for span in spans])
        self.sequence_T = np.repeat(np.arange(len(spans)), counts)
        lengths = np.array([len(span.blocks) for span in spans])
        self.first_block = np.cumsum(lengths) - lengths
        self.blocks = np.array([block for span in spans for block in span.blocks], dtype=np.int64)
        begun = []
        for span in spans:
            stop = span.start + len(span.tokens)
            if stop % block_size and stop % block_size <= len(span.tokens):
                begun.append(span.blocks[stop // block_size])
        self.begun = np.array(begun, dtype=np.int64)
