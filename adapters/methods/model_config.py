"""Compares config.json of a model directory with the base's: the same weights must mean the same computation.

Must not know: methods, weights, model families. The base's own configuration class reads the directory's file, so that
old and new spellings (rope_theta, rope_parameters), defaults of keys that older versions did not write, and values
that follow from others become alike before they are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from motet.adapters.base import BaseModel
from motet.adapters.errors import ConfigError
from motet.adapters.source import AdapterFiles

INERT = frozenset(
    "_attn_implementation _attn_implementation_autoset _attn_implementation_internal _name_or_path architectures "
    "attention_dropout attn_implementation bos_token_id cache_implementation decoder_start_token_id dtype embd_pdrop "
    "attn_pdrop resid_pdrop eos_token_id finetuning_task gradient_checkpointing hidden_dropout id2label "
    "initializer_range is_llama_config label2id max_length num_labels output_attentions output_hidden_states "
    "pad_token_id pretraining_tp problem_type return_dict sep_token_id task_specific_params tokenizer_class "
    "torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache vocab_size".split()
)
"""Keys that mean nothing for what served weights compute: names, versions, training, generation, storage.

vocab_size is among them because training code pads it; the embedding's own shape decides.
"""

ABSENT = (None, False)
"""Values that say as much as a missing key does."""


def require_same_computation(files: AdapterFiles, base: BaseModel, own: Collection[str] = ()) -> None:
    """Require that the directory's configuration computes with its weights what the base's does.

    Args:
        own: keys of the directory that its method knows.

    Raises:
        ConfigError: a key that matters differs, is on one side only, or the file contradicts itself.
    """
    if not base.config:
        return  # a base that is no transformers model says nothing
    text = files.config.get("text_config", files.config)
    if not isinstance(text, Mapping):
        raise ConfigError("config.json: text_config is no object; the file is damaged")
    written = {key: value for key, value in text.items() if key not in INERT and key not in own}
    kind = base.config.get("model_type")
    if written.get("model_type") != kind:
        raise _differs(base, "model_type", written.get("model_type"), kind)
    _require_one_theta(written)
    try:
        read = base.read_config(written)
    except Exception as error:  # validation of a foreign file raises whatever its values cause
        raise ConfigError(f"config.json cannot be read as that of a {kind!r} model: {type(error).__name__}") from error
    for key in sorted((read.keys() | base.config.keys()) - INERT - set(own)):
        value, expected = read.get(key), base.config.get(key)
        one_side = key not in read or key not in base.config
        if value == expected or (one_side and value in ABSENT and expected in ABSENT):
            continue
        if key == "max_position_embeddings" and _rope_types(base.config) <= {"default"}:
            continue  # how far positions were trained; the rotation of each is the same
        raise _differs(base, key, value, expected)


def _differs(base: BaseModel, key: str, value: object, expected: object) -> ConfigError:
    return ConfigError(
        f"config.json says {key}={_said(value)}, the base {base.name!r} has {_said(expected)}: with it the same "
        "weights compute something else; serve the base the model was trained from, or correct the file where only "
        "the key is wrong"
    )


def _said(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _require_one_theta(written: Mapping[str, Any]) -> None:
    """Which of two spellings counts depends on who reads them."""
    old, new = written.get("rope_theta"), written.get("rope_parameters")
    thetas = {new["rope_theta"]} if isinstance(new, Mapping) and "rope_theta" in new else set()
    if old is not None and thetas and thetas != {old}:
        raise ConfigError(
            f"config.json says rope_theta={_said(old)} and rope_parameters={_said(dict(new or {}))}: they contradict "
            "each other; remove the wrong one"
        )


def _rope_types(config: object) -> set[str]:
    """Every rope_type, at any depth: some families have one for each kind of layer."""
    return set(_found(config))


def _found(config: object) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                yield value
            yield from _found(value)
