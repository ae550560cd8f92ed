"""Loads the base model once and makes it ready to serve: attention registered, linears adapted, cache allocated.

Must not know: requests, adapters' methods, HTTP. Everything that can be wrong with a base model is found here, before
the first request: unknown attention features, and a paged forward that disagrees with the model's own.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.logging import disable_progress_bar

from motet.adapters.base import BaseModel
from motet.kernels.cpu.compiled import Engine
from motet.server.engine.types import Span
from motet.server.model.attention import AttentionBatch, KvCache, LayerShape, PagedAttention
from motet.server.model.base import base_model, targets_of
from motet.server.model.embedding import AdaptedEmbedding, is_served
from motet.server.model.errors import ModelNotFoundError, UnsupportedModelError
from motet.server.model.feature import HeadInput
from motet.server.model.fingerprint import fingerprint
from motet.server.model.inject import ActiveStep, inject
from motet.server.model.native import NativeDecoder, native_decoder
from motet.server.model.overlay import OverlaidModules, RowDims
from motet.server.model.selfcheck import SelfCheck
from motet.server.model.tokenizer import tokenizers_of

logger = logging.getLogger(__name__)

_attention_names = (f"motet_paged_{i}" for i in itertools.count())
"""transformers finds attention functions by name in one process-wide table: each loaded model gets its own."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """The resident base.

    Attributes:
        base: what adapters may know of it.
        native: computes whole steps; None where the base is of another shape or there is no native backend.
        engine: of the native backend; None where there is none.
        step, head_step: where the linears, and the output head, find the step that runs.
        embedding_path, head_path: of the modules.
        max_length: positions it was trained for.
        end_tokens: tokens that end a generation unless ignored.
        vocabulary: number of logits.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    base: BaseModel
    attention: PagedAttention
    native: NativeDecoder | None
    engine: Engine | None
    step: ActiveStep
    head_step: ActiveStep
    embedding: AdaptedEmbedding
    head_input: HeadInput
    embedding_path: str
    head_path: str
    overlaid: OverlaidModules
    layers: Mapping[int, LayerShape]
    dtype: torch.dtype
    device: torch.device
    max_length: int
    end_tokens: frozenset[int]
    vocabulary: int
    parameter_bytes: int

    def forward(self, tokens_1T: torch.Tensor, positions_1T: torch.Tensor, rows_n: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of the given rows."""
        return _forward(self.model, tokens_1T, positions_1T, rows_n)

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Reserve the key-value cache."""
        self.attention.cache = KvCache(self.layers, blocks, block_size, self.dtype, self.device)


def choose_dtype(asked: str, device: torch.device, config: Any) -> torch.dtype:
    """Resolve "auto": the checkpoint's own dtype where the device computes it natively, else float32."""
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        if device.type == "cpu" and dtype == torch.float16:
            raise UnsupportedModelError("dtype float16 is slow and imprecise on a CPU; choose bfloat16 or float32")
        return dtype
    own = getattr(config, "dtype", None) or torch.float32
    if device.type == "cuda":
        return own if own != torch.float32 else torch.bfloat16
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if own != torch.float32 and native else torch.float32


def load(
    path: str, name: str, dtype: str, device: torch.device, engine: Engine | None = None, *, int8: bool = False
) -> LoadedModel:
    """Load a causal language model that transformers knows.

    Args:
        path: a directory or a hub id.
        name: what requests call it.
        dtype: "auto" or a torch dtype's name.
        engine: of the native backend, for what it computes; None leaves all to torch.
        int8: see `prepare`.

    Raises:
        ModelNotFoundError: there is no such model.
        UnsupportedModelError: it cannot be served exactly.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(path)
        resolved = choose_dtype(dtype, device, config)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=resolved, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"model {name!r} cannot be loaded as a causal language model: {error}") from error
    return prepare(model.to(device).eval(), tokenizer, name, engine, int8=int8)


def prepare(
    model: Any, tokenizer: PreTrainedTokenizerBase, name: str, engine: Engine | None = None, *, int8: bool = False
) -> LoadedModel:
    """Make a loaded transformers model ready to serve.

    Args:
        engine: see `load`.
        int8: multiply with the weights rounded to int8, once all was checked with the exact ones. Those stay in
            memory: adapters are lowered against them, as they were trained.

    Raises:
        UnsupportedModelError: its paged forward does not agree with its own.
    """
    config = model.config.get_text_config()
    with torch.inference_mode():
        check = SelfCheck(model)
        attention, step, head_step = PagedAttention(), ActiveStep(), ActiveStep()
        attention_name = next(_attention_names)
        # The table is global and forgets nothing: it must not keep the cache of a model that is gone.
        ALL_ATTENTION_FUNCTIONS.register(attention_name, weakref.proxy(attention))
        model.set_attn_implementation(attention_name)
        digest = fingerprint(model)
        head_path = _path(model, model.get_output_embeddings())
        embedding = model.get_input_embeddings()
        embedding_path = _path(model, embedding)
        adapted = inject(model, step, head_path, head_step, engine=engine, keep_weights=int8)
        unchanged = {
            path: module
            for path, module in model.named_modules()
            if path not in adapted and module is not embedding and any(True for _ in module.parameters(recurse=False))
        }
        row_dims = RowDims(unchanged)

        def forward(
            spans: Sequence[Span],
            cache: KvCache,
            tokens_1T: torch.Tensor,
            positions_1T: torch.Tensor,
            rows_n: torch.Tensor,
        ) -> torch.Tensor:
            row_dims.expect(tokens_1T.shape[1])
            attention.cache, attention.batch = cache, AttentionBatch(spans, cache, model.device)
            return _forward(model, tokens_1T, positions_1T, rows_n)

        check.compare(forward)
        attention.cache = attention.batch = None
        dims = row_dims.finish()
        native = native_decoder(engine, model) if engine is not None else None
        if native is not None:
            try:
                check.compare(native.forward)
            except UnsupportedModelError as error:
                logger.warning("%s is served through torch, several times slower: native, %s", name, error)
                native = None
        looked_up = (embedding_path, embedding) if is_served(embedding) else None
        targets = targets_of(adapted, looked_up, head_path)
        end_tokens = _end_tokens(model, tokenizer)
        packed = {path: one.packed for path, one in adapted.items() if one.packed is not None}
        kept_elsewhere = {} if int8 else {f"{path}.weight": one.unpacked for path, one in packed.items()}
        if int8:
            assert engine is not None, "int8 weights are the native backend's"
            for path, one in packed.items():
                one.quantise(adapted[path].weight)
            native = None if native is None else native_decoder(engine, model)
        tokenizers = tokenizers_of(tokenizer, end_tokens) if hasattr(tokenizer, "get_vocab") else None
        return LoadedModel(
            name=name,
            model=model,
            tokenizer=tokenizer,
            base=base_model(name, digest, model, targets, {*dims, embedding_path}, tokenizers, kept_elsewhere),
            attention=attention,
            native=native,
            engine=engine,
            step=step,
            head_step=head_step,
            embedding=AdaptedEmbedding(embedding, embedding.num_embeddings),
            head_input=HeadInput(model.get_output_embeddings()),
            embedding_path=embedding_path,
            head_path=head_path,
            overlaid=OverlaidModules(unchanged, step, dims),
            layers=check.layers,
            dtype=model.dtype,
            device=model.device,
            max_length=int(config.max_position_embeddings),
            end_tokens=end_tokens,
            vocabulary=int(config.vocab_size),
            parameter_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        )


def _forward(
    model: nn.Module, tokens_1T: torch.Tensor, positions_1T: torch.Tensor, rows_n: torch.Tensor
) -> torch.Tensor:
    output = model(
        input_ids=tokens_1T, position_ids=positions_1T, use_cache=False, logits_to_keep=rows_n, return_dict=True
    )
    logits_nV: torch.Tensor = output.logits[0]
    return logits_nV


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(str(path) for path, one in model.named_modules() if one is module)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    tokens = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    return frozenset(int(token) for token in tokens if token is not None)
