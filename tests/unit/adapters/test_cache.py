"""What was lowered is not lowered again; whatever happens to the cache, loads go on."""

from __future__ import annotations

import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters import cache as cache_module, methods
from motet.adapters.base import BaseModel
from motet.adapters.cache import ENDING, UNFINISHED, LoweredCache, lowering_code
from motet.adapters.effects import Lowered, LowRank, TargetEffects
from motet.adapters.errors import FormatError
from motet.adapters.lowered_file import dump
from motet.adapters.registry import Registry
from motet.adapters.source import AdapterFiles
from motet.adapters.version import Digest
from tests.support.bases import residency_of
from tests.unit.adapters.conftest import Bench, edit

BUDGET = 1 << 20
BASE = "b" * 64


def lowered(value: float = 1.0, rank: int = 4) -> Lowered:
    pair = LowRank(torch.full((rank, 8), float(value)), torch.full((8, rank), float(value)))
    return Lowered("lora", "PEFT folder", "alpha/r", {"model.q": TargetEffects(pair)}, 1)


def digest(number: int) -> Digest:
    return Digest(f"{number:064x}")


def value_of(found: Lowered | None) -> float | None:
    return None if found is None else float(found.effects["model.q"].low_rank.a_RI[0, 0])  # type: ignore[union-attr]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "below" / "cache"


@pytest.fixture
def cache(folder: Path) -> LoweredCache:
    return LoweredCache(folder, BUDGET)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


SIZE = len(dump(lowered()))


def test_what_was_put_is_found(cache: LoweredCache, folder: Path) -> None:
    assert cache.get(BASE, digest(1)) is None
    assert entries(folder) == [], "looking makes nothing"
    cache.put(BASE, digest(1), lowered(3.0))
    assert value_of(cache.get(BASE, digest(1))) == 3.0
    assert [path.name.endswith(ENDING) for path in entries(folder)] == [True]
    assert oct(folder.stat().st_mode & 0o777) == oct(0o700)


def test_another_base_adapter_or_code_is_another_entry(folder: Path) -> None:
    cache = LoweredCache(folder, BUDGET, code="one")
    cache.put(BASE, digest(1), lowered())
    assert cache.get("c" * 64, digest(1)) is None
    assert cache.get(BASE, digest(2)) is None
    assert LoweredCache(folder, BUDGET, code="two").get(BASE, digest(1)) is None
    assert value_of(LoweredCache(folder, BUDGET, code="one").get(BASE, digest(1))) == 1.0


def test_a_second_put_replaces(cache: LoweredCache) -> None:
    cache.put(BASE, digest(1), lowered(1.0))
    cache.put(BASE, digest(1), lowered(2.0))
    assert value_of(cache.get(BASE, digest(1))) == 2.0


@pytest.mark.parametrize("content", [b"", b"damage", None])
def test_a_damaged_entry_is_absent_and_removed(cache: LoweredCache, folder: Path, content: bytes | None) -> None:
    cache.put(BASE, digest(1), lowered())
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if content is None else content)
    assert cache.get(BASE, digest(1)) is None
    assert entries(folder) == []
    cache.put(BASE, digest(1), lowered(5.0))
    assert value_of(cache.get(BASE, digest(1))) == 5.0


def age(folder: Path) -> None:
    """Make every entry a minute older, so that the order does not hang on the clock's resolution."""
    for path in entries(folder):
        before = path.stat()
        os.utime(path, (before.st_atime - 60, before.st_mtime - 60))


def test_the_least_recently_used_entries_make_room(folder: Path) -> None:
    cache = LoweredCache(folder, 3 * SIZE)
    for number in range(3):
        cache.put(BASE, digest(number), lowered(number))
        age(folder)
    assert value_of(cache.get(BASE, digest(0))) == 0.0  # used: 1 is the oldest now
    cache.put(BASE, digest(3), lowered(3.0))
    assert [value_of(cache.get(BASE, digest(number))) for number in range(4)] == [0.0, None, 2.0, 3.0]
    assert used_bytes(folder) == 3 * SIZE


def test_the_budget_is_never_exceeded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seen = LoweredCache(folder, 5 * SIZE // 2), []
    move = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(used_bytes(folder)), move(*paths))[1])
    for number in range(6):
        cache.put(BASE, digest(number), lowered(number))
        seen.append(used_bytes(folder))
    assert len(seen) == 12
    assert max(seen) <= 5 * SIZE // 2


def test_an_entry_larger_than_the_budget_is_not_kept(folder: Path) -> None:
    cache = LoweredCache(folder, 2 * SIZE)
    cache.put(BASE, digest(1), lowered())
    cache.put(BASE, digest(2), lowered(rank=64))
    assert cache.get(BASE, digest(2)) is None
    assert value_of(cache.get(BASE, digest(1))) == 1.0, "and nothing is removed for it"


def test_other_files_are_left_alone(cache: LoweredCache, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "README").write_text("x" * 100)
    for name, old in (("dead", True), ("alive", False)):
        (folder / f"{name}{UNFINISHED}").write_text("half")
        if old:
            os.utime(folder / f"{name}{UNFINISHED}", (0, 0))
    cache.put(BASE, digest(1), lowered())
    assert [path.name for path in entries(folder) if not path.name.endswith(ENDING)] == [
        "README",
        f"alive{UNFINISHED}",
    ], "what a dead process left goes, what a living one writes stays"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_folder_that_cannot_be_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = LoweredCache(tmp_path / "file" / "cache", BUDGET)
    for number in range(3):
        cache.put(BASE, digest(number), lowered())
        assert cache.get(BASE, digest(number)) is None
    (message,) = warnings(caplog)
    assert "--adapter-cache" in message
    assert str(tmp_path) not in message


def test_a_full_disk_leaves_nothing_half(
    cache: LoweredCache, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:10])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(path, mode))
    for number in range(2):
        cache.put(BASE, digest(number), lowered())
    assert entries(folder) == []
    (message,) = warnings(caplog)
    assert "No space left on device" in message


def test_the_code_is_the_files_of_methods_and_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods.__file__ is not None
    shutil.copytree(Path(methods.__file__).parent, tmp_path / "methods")
    beside = {
        "effects.py": cache_module.effects,
        "approximate.py": cache_module.approximate,
        "signs.py": cache_module.signs,
    }
    for name, module in beside.items():
        assert module.__file__ is not None
        shutil.copy(module.__file__, tmp_path / name)

    def code() -> str:
        with monkeypatch.context() as patch:
            patch.setattr(methods, "__file__", str(tmp_path / "methods" / "__init__.py"))
            for name, module in beside.items():
                patch.setattr(module, "__file__", str(tmp_path / name))
            return lowering_code.__wrapped__()

    assert code() == lowering_code() == lowering_code.__wrapped__()
    for changed in (*beside, "methods/lora.py", "methods/__init__.py"):
        before = code()
        (tmp_path / changed).write_text((tmp_path / changed).read_text() + "\n")
        assert code() != before, changed


class TestRegistry:
    """Two processes' worth of registries over one folder."""

    @pytest.fixture
    def lowerings(self, monkeypatch: pytest.MonkeyPatch) -> list[Digest]:
        """Digests of what was really lowered."""
        seen: list[Digest] = []
        lower = methods.lower

        def counted(files: AdapterFiles, base: BaseModel) -> Lowered:
            seen.append(files.digest)
            return lower(files, base)

        monkeypatch.setattr(methods, "lower", counted)
        return seen

    def test_a_second_load_does_not_lower_again(
        self, llama: Bench, folder: Path, tmp_path: Path, lowerings: list[Digest]
    ) -> None:
        adapter = llama.save(tmp_path / "a", target_modules=["q_proj", "up_proj"])
        arenas, receipts = [], []
        for _ in range(3):
            registry = Registry(llama.base, residency_of(llama.base), LoweredCache(folder, BUDGET))
            receipts.append(registry.load("a", adapter).receipt)
            arena = registry.residency.arena
            arenas.append(arena.units_NU[: arena.allocator.used].clone())
            assert lowerings == [receipts[0].digest]
        assert receipts[0] == receipts[1] == receipts[2], "a receipt says nothing of the cache"
        assert torch.equal(arenas[0], arenas[1])
        assert torch.equal(arenas[0], arenas[2])

    def test_without_a_cache_every_load_lowers(self, llama: Bench, tmp_path: Path, lowerings: list[Digest]) -> None:
        adapter = llama.save(tmp_path / "a", target_modules=["q_proj"])
        for _ in range(2):
            Registry(llama.base, residency_of(llama.base)).load("a", adapter)
        assert len(lowerings) == 2

    def test_other_content_lowers(self, llama: Bench, folder: Path, tmp_path: Path, lowerings: list[Digest]) -> None:
        registry = Registry(llama.base, residency_of(llama.base), LoweredCache(folder, BUDGET))
        for seed in (1, 2):
            registry.load(str(seed), llama.save(tmp_path / str(seed), seed=seed, target_modules=["q_proj"]))
        assert len(set(lowerings)) == len(lowerings) == 2

    def test_a_refused_adapter_is_refused_again(self, llama: Bench, folder: Path, tmp_path: Path) -> None:
        adapter = edit(llama.save(tmp_path / "a", target_modules=["q_proj"]), config={"invented": 1})
        registry = Registry(llama.base, residency_of(llama.base), LoweredCache(folder, BUDGET))
        for _ in range(2):
            with pytest.raises(FormatError):
                registry.load("a", adapter)
        assert entries(folder) == []
