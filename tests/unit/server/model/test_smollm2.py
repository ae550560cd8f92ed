"""The conversion's two rules that a checksum of the whole would not explain."""

from __future__ import annotations

import numpy as np
import pytest

from motet.server.model.smollm2 import interleaved_to_halves, transformers_name


@pytest.mark.parametrize(
    ("gguf", "transformers"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.29.attn_output.weight", "model.layers.29.self_attn.o_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_names(gguf: str, transformers: str) -> None:
    assert transformers_name(gguf) == transformers


def test_an_unknown_tensor_is_not_passed_over() -> None:
    with pytest.raises(KeyError):
        transformers_name("blk.0.attn_sinks.weight")


def test_rotary_rows_are_ordered_within_each_head() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None]  # two heads of six rows: pairs (0, 1), (2, 3), (4, 5)
    assert interleaved_to_halves(rows, heads=2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
