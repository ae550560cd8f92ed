"""The model and its adapters in llama.cpp's format, made by its own converters. Knows nothing of servers.

What was made is kept in build/peers: delete it when the model or the adapters change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.peers.environment import FOLDER, LLAMA_PACKAGES, LLAMA_SOURCE

GGUF = FOLDER / "gguf"


class ConversionError(RuntimeError):
    """llama.cpp's converter failed."""


def model_file(model: Path) -> Path:
    """The model folder as a bfloat16 GGUF file."""
    made = GGUF / "model.gguf"
    if not made.exists():
        _convert("convert_hf_to_gguf.py", [[str(model), *_options(made)]])
    return made


def adapter_files(model: Path, adapters: Sequence[Path]) -> list[Path]:
    """The adapter folders as bfloat16 GGUF files, in their order."""
    made = [GGUF / f"{adapter.name}.gguf" for adapter in adapters]
    runs = [
        ["--base", str(model), *_options(file), str(adapter)]
        for adapter, file in zip(adapters, made, strict=True)
        if not file.exists()
    ]
    if runs:
        _convert("convert_lora_to_gguf.py", runs)
    return made


def _options(out: Path) -> list[str]:
    return ["--outtype", "bf16", "--outfile", str(out)]


def _convert(converter: str, runs: list[list[str]]) -> None:
    """Raises ConversionError."""
    GGUF.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(LLAMA_SOURCE / "gguf-py"), str(LLAMA_PACKAGES)])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("converter_program.py"), LLAMA_SOURCE / converter],
        input=json.dumps(runs),
        text=True,
        cwd=LLAMA_SOURCE,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
    )
    if done.returncode:
        raise ConversionError(f"{converter} ended with {done.returncode}:\n{done.stderr[-2000:]}")
