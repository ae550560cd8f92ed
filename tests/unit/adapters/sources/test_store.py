"""The download folder stays within its budget, and nothing that is in use leaves it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from motet.adapters.errors import SourceUnavailableError, StoreFullError
from motet.adapters.sources.remote import Deadline
from motet.adapters.sources.store import Store

KB = 1 << 10


def put(store: Store, key: str, size: int, hold: bool = False) -> Path:
    with store.staging(key, Deadline(10), resume_files=True) as stage:
        stage.take(size)
        (stage.files / "adapter_model.safetensors").write_bytes(key.encode()[:1] * size)
        folder = store.keep(stage, key)
    if not hold:
        store.release(folder)
    return folder


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "contents").rglob("*") if file.is_file())


def age(folder: Path, seconds: int) -> None:
    os.utime(folder, (seconds, seconds))


def found(store: Store, key: str) -> bool:
    folder = store.find(key)
    if folder is not None:
        store.release(folder)
    return folder is not None


def test_what_was_kept_is_found_by_another_store(tmp_path: Path) -> None:
    folder = put(Store(tmp_path, 100 * KB), "a", KB)
    assert Store(tmp_path, 100 * KB).find("a") == folder
    assert Store(tmp_path, 100 * KB).find("b") is None


def test_equal_content_is_kept_once(tmp_path: Path) -> None:
    store = Store(tmp_path, 100 * KB)
    assert put(store, "a1", KB) == put(store, "a2", KB)
    assert on_disk(tmp_path) == KB


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, 10 * KB)
    for second, key in enumerate("abc"):
        age(put(store, key, 3 * KB), second)
    assert found(store, "a"), "which makes it the latest"
    put(store, "d", 3 * KB)
    assert [found(store, key) for key in "abcd"] == [True, False, True, True]
    assert on_disk(tmp_path) == 9 * KB


def test_what_is_held_or_published_stays(tmp_path: Path) -> None:
    published: list[Path] = []
    store = Store(tmp_path, 10 * KB, lambda: published)
    held = put(store, "a", 4 * KB, hold=True)
    published.append(put(store, "b", 4 * KB))
    with pytest.raises(StoreFullError, match=r"8,192 bytes that are in use, and 4,096 more exceed .* 10,240"):
        put(store, "c", 4 * KB)
    assert (found(store, "a"), found(store, "b")) == (True, True)
    store.release(held)
    put(store, "c", 4 * KB)
    assert [found(store, key) for key in "abc"] == [False, True, True]


def test_what_lies_half_done_makes_room(tmp_path: Path) -> None:
    store = Store(tmp_path, 10 * KB)
    with store.staging("a", Deadline(10), resume_files=True) as stage:
        stage.take(8 * KB)
        (stage.pieces / "x").write_bytes(b"x" * 8 * KB)
    put(store, "b", 8 * KB)
    assert not (tmp_path / "partial" / "a").exists()


def test_downloads_at_the_same_time_share_the_budget(tmp_path: Path) -> None:
    store = Store(tmp_path, 10 * KB)
    with store.staging("a", Deadline(10), resume_files=True) as one:
        one.take(6 * KB)
        with store.staging("b", Deadline(10), resume_files=True) as other:
            other.take(4 * KB)
            with pytest.raises(StoreFullError):
                other.take(1)


def test_what_one_download_left_counts_for_another(tmp_path: Path) -> None:
    published: list[Path] = []
    store = Store(tmp_path, 10 * KB, lambda: published)
    with store.staging("a", Deadline(10), resume_files=True) as one:
        published.append(put(store, "b", 6 * KB))
        one.take(4 * KB)
        with pytest.raises(StoreFullError):
            one.take(1)


def test_an_adapter_that_was_damaged_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path, 100 * KB)
    folder = put(store, "a", KB)
    (folder / "adapter_model.safetensors").write_bytes(b"b" * KB)
    assert store.find("a") is None
    assert not folder.exists()
    assert put(store, "a", KB) == folder
    assert found(store, "a")


def test_an_adapter_that_was_damaged_is_replaced_by_what_arrives(tmp_path: Path) -> None:
    store = Store(tmp_path, 100 * KB)
    folder = put(store, "a", KB)
    (folder / "adapter_model.safetensors").write_bytes(b"b" * KB)
    assert put(store, "a2", KB) == folder
    assert (folder / "adapter_model.safetensors").read_bytes() == b"a" * KB


def test_what_brings_nothing_leaves_nothing(tmp_path: Path) -> None:
    """Else a client that asks for names at random would fill the disk with them."""
    store = Store(tmp_path, 100 * KB)
    for key in "abc":
        with store.staging(key, Deadline(10), resume_files=True):
            pass
    put(store, "d", KB)
    assert list((tmp_path / "partial").iterdir()) == []


def test_one_download_of_a_kind_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path, 100 * KB)
    with (
        store.staging("a", Deadline(10), resume_files=True),
        pytest.raises(SourceUnavailableError, match=r"within 0\.1 s"),
        store.staging("a", Deadline(0.1), resume_files=True),
    ):
        pass


def test_pieces_stay_and_files_of_what_may_change_do_not(tmp_path: Path) -> None:
    store = Store(tmp_path, 100 * KB)
    for resume in (True, False):
        with store.staging("a", Deadline(10), resume_files=resume) as stage:
            if resume:
                (stage.files / "f").touch()
                (stage.pieces / "p").touch()
            else:
                assert [(stage.files / "f").exists(), (stage.pieces / "p").exists()] == [False, True]


def test_beside_another_process_nothing_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path, 10 * KB)
    put(store, "a", 8 * KB)
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys; handle = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(handle, fcntl.LOCK_SH); "
            "print('locked', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(StoreFullError, match="another process uses it"):
            put(store, "b", 8 * KB)
        other.communicate()
    put(store, "b", 8 * KB)
    assert [found(store, key) for key in "ab"] == [False, True]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreFullError, match="--download-dir must name a writable folder") as refused:
        put(Store(tmp_path / "file" / "store", KB), "a", 1)
    assert str(tmp_path) not in str(refused.value)


def test_published_folders_are_asked_for_when_room_is_needed(tmp_path: Path) -> None:
    asked: list[int] = []

    def published() -> Collection[Path]:
        asked.append(1)
        return ()

    put(Store(tmp_path, 10 * KB, published), "a", KB)
    assert asked == []
