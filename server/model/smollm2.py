"""SmolLM2-135M-Instruct from its GGUF file: dequantised tensors under transformers' names, and the files beside them.

Must not know: where the file comes from, where the model goes, transformers. One pinned file is read, so its
architecture is written down here; what is too long for that (vocabulary, merges, chat template) is taken from the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

CONFIG: Mapping[str, Any] = {
    "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
GENERATION_CONFIG: Mapping[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TOKENIZER_CONFIG: Mapping[str, Any] = {
    "add_prefix_space": False,
    "bos_token": "<|im_start|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 8192,
    "pad_token": "<|im_end|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<|endoftext|>",
}
TOKENIZER: Mapping[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": None,
    # The original's. transformers' GGUF reader leaves the digits out, and then splits blanks before a digit otherwise.
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}
CONTROL = 3
"""GGUF's token type of special tokens."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
ROTARY_HEADS = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}


@dataclass(frozen=True, slots=True)
class Converted:
    """What a model folder holds: the tensors of its weights file, and the text of every other file."""

    tensors: Mapping[str, torch.Tensor]
    texts: Mapping[str, str]


def dequantise(path: Path, tell: Callable[[float], None]) -> Converted:
    """Read the GGUF file.

    Args:
        path: the file.
        tell: told the fraction done.

    Returns:
        bfloat16 tensors, rounded once from the float32 that the blocks stand for: bit for bit what transformers' own
        GGUF reader followed by a cast yields.
    """
    reader = gguf.GGUFReader(path)
    tensors = {}
    for done, tensor in enumerate(reader.tensors, 1):
        values_OI = gguf.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.removesuffix(".weight").split(".")[-1]
        if part in ROTARY_HEADS:
            values_OI = interleaved_to_halves(values_OI, ROTARY_HEADS[part])
        tensors[transformers_name(tensor.name)] = torch.from_numpy(np.array(values_OI)).to(torch.bfloat16)
        tell(done / len(reader.tensors))
    return Converted(tensors, _texts(reader))


def transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    match name.removesuffix(".weight").split("."):
        case ["blk", layer, part]:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        case [part]:
            return f"{OTHER_NAMES[part]}.weight"
    raise KeyError(name)


def interleaved_to_halves(values_OI: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Order each head's rows as transformers rotates them, (i, i + D/2), where GGUF pairs (2i, 2i + 1)."""
    return values_OI.reshape(heads, -1, 2, values_OI.shape[1]).swapaxes(1, 2).reshape(values_OI.shape)


def _texts(reader: Any) -> dict[str, str]:
    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens: list[str] = field("ggml.tokens")
    special = [index for index, kind in enumerate(field("ggml.token_type")) if kind == CONTROL]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        **TOKENIZER,
        "added_tokens": [{"id": index, "content": tokens[index], **plain} for index in special],
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field("ggml.merges")],
        },
    }
    return {
        "config.json": json.dumps(CONFIG, indent=2),
        "generation_config.json": json.dumps(GENERATION_CONFIG, indent=2),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "chat_template.jinja": field("chat_template"),
    }
