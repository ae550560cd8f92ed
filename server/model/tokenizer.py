"""Opens the tokenizer that an adapter brings, as the base's own is opened.

Must not know: adapters' weights, requests. Nothing in the files is run: no code of theirs, no template.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from motet.adapters.errors import ConfigError
from motet.adapters.tokens import OwnTokenizer, Tokenizers

GENERATION_CONFIG = "generation_config.json"


def tokenizers_of(tokenizer: Any, end_tokens: frozenset[int]) -> Tokenizers:
    """What a base with this tokenizer says of tokenizers.

    Args:
        end_tokens: of the base; they end an adapter's generations too where its own tokenizer names none.
    """
    return Tokenizers(tokenizer.get_vocab, lambda files: open_tokenizer(files, end_tokens))


def open_tokenizer(files: Mapping[str, bytes], end_tokens: frozenset[int]) -> OwnTokenizer:
    """The tokenizer that these files are.

    Raises:
        ConfigError: they are none, or one that is only there as code.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            own = _end_tokens(tokenizer, files.get(GENERATION_CONFIG))
        except Exception as error:  # the readers of these formats raise whatever they like
            raise ConfigError(
                f"the adapter's tokenizer cannot be opened ({type(error).__name__}); save it again with "
                "save_pretrained, or remove tokenizer.json to use the base's"
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            "the adapter's tokenizer.json describes no fast tokenizer; save it again with save_pretrained"
        )
    return OwnTokenizer(tokenizer, tokenizer.get_vocab(), own or end_tokens)


def _end_tokens(tokenizer: Any, generation_config: bytes | None) -> frozenset[int]:
    configured = json.loads(generation_config).get("eos_token_id") if generation_config else None
    found = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return frozenset(int(token) for token in found if token is not None)
