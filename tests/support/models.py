"""Tiny random models of several families, and adapters that PEFT itself saves for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 256
_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """Llama with grouped-query attention and tied embeddings; widths that are no powers of two."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            **_COMMON,
            "hidden_size": 48,
            "head_dim": 12,
            "intermediate_size": 72,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    return _livelier(LlamaForCausalLM(config))


def tiny_qwen2(seed: int = 0) -> Any:
    """Qwen2: biases on q, k and v."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**_COMMON, hidden_size=48, intermediate_size=72))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return _livelier(model)


def tiny_gemma3(seed: int = 0) -> Any:
    """Gemma 3: sliding and full attention in turn, norms around the attention, a window shorter than the prompts."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        **_COMMON,
        hidden_size=48,
        head_dim=16,
        intermediate_size=72,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
    )
    return _livelier(Gemma3ForCausalLM(config))


FAMILIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gemma3": tiny_gemma3}


def _livelier(model: Any) -> Any:
    """Random initialisation is so small that wrong attention would hardly show; make every layer matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(2)
    return model.eval()


def reference_copy(model: Any) -> Any:
    """An untouched copy for the oracle, because serving changes the model's modules."""
    return copy.deepcopy(model)


def save_peft(
    model: Any,
    folder: Path,
    config: LoraConfig,
    seed: int,
    strength: float = 0.15,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> Path:
    """Give the adapter random trained-looking weights and let PEFT save it."""
    peft_model = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif "lora_B" in name or "lora_embedding_B" in name or (name.endswith("bias") and parameter.requires_grad):
                parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
            elif "lora_A" in name or "lora_embedding_A" in name:
                parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.mul_(1 + strength * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return folder


def load_dense(folder: Path, dtype: torch.dtype) -> Any:
    """A model folder as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
