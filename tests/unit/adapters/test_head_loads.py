"""A head loads, counts as content and goes with its adapter."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from motet.adapters import heads, methods
from motet.adapters.cache import LoweredCache
from motet.adapters.errors import AdapterNotFoundError, FormatError, ShapeError, SourceNotFoundError
from motet.adapters.registry import Registry
from motet.adapters.spec import Declared, LossyForm
from tests.support.bases import base_of, residency_of
from tests.support.heads import random_head
from tests.support.layouts_full import fine_tuned
from tests.support.models import tiny_llama
from tests.unit.adapters.conftest import Bench

LABELS = ("no", "yes", "perhaps")
WIDTH = 48
HEAD = random_head("dense", LABELS, WIDTH, seed=3)


@pytest.fixture
def plain(llama: Bench, tmp_path: Path) -> Path:
    return llama.save(tmp_path / "plain", target_modules=["q_proj"])


@pytest.fixture
def headed(plain: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(plain, tmp_path / "headed"))
    heads.write(HEAD, folder)
    return folder


@pytest.fixture
def registry(llama: Bench, tmp_path: Path) -> Registry:
    return Registry(llama.base, residency_of(llama.base), LoweredCache(tmp_path / "cache", 1 << 20))


def rewrite(folder: Path, head: heads.HeadFile) -> None:
    for name in (heads.HEAD_CONFIG, heads.HEAD_WEIGHTS):
        (folder / name).unlink()
    heads.write(head, folder)


def test_the_head_is_on_the_leased_version(registry: Registry, headed: Path, plain: Path) -> None:
    info = registry.load("sure", headed)
    assert registry.load("plain", plain).head is None
    resident = registry.acquire("sure").resident
    assert resident.head is info.head is registry.get("sure").head
    assert resident.head is not None
    assert resident.head.digest == HEAD.digest
    tensors_bytes = (3 * WIDTH * WIDTH + 2 * 3 * WIDTH + 2 * 3) * 4
    assert (info.receipt.head, info.receipt.head_bytes) == ("dense, 3 labels", tensors_bytes)
    assert info.receipt.resident_bytes == registry.get("plain").receipt.resident_bytes, "the head is no arena's matter"


def test_every_change_of_the_head_is_another_version(registry: Registry, headed: Path, plain: Path) -> None:
    digests = [registry.load("plain", plain).version.digest, registry.load("sure", headed).version.digest]
    for other in (
        replace(HEAD, temperature=1.5),
        replace(HEAD, threshold=0.25),
        replace(HEAD, labels=("no", "yes", "never")),
        random_head("dense", LABELS, WIDTH, seed=4),
    ):
        rewrite(headed, other)
        digests.append(registry.load("sure", headed, replace=True).version.digest)
    assert len(set(digests)) == len(digests) == 6
    rewrite(headed, HEAD)
    file = headed / heads.HEAD_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text())))
    assert registry.load("sure", headed, replace=True).version.digest == digests[1], "spelling is no content"


def test_a_cached_adapter_has_its_head(registry: Registry, headed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load("first", headed)
    monkeypatch.setattr(methods, "METHODS", ())  # nothing can be lowered now
    info = registry.load("second", headed)
    assert info.head is not None
    assert info.head.digest == HEAD.digest


def test_a_lossy_form_has_the_head(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = fine_tuned("layers.0.")(model, tmp_path / "full", 1).folder
    heads.write(HEAD, folder)
    base = base_of(model)
    registry = Registry(base, residency_of(base))
    exact = registry.load("exact", folder)
    lossy = registry.load("lossy", folder, Declared(approximate=LossyForm()))
    assert exact.head is not None
    assert lossy.head is not None
    assert exact.version.digest != lossy.version.digest


def test_running_requests_keep_the_head_they_began_with(registry: Registry, headed: Path) -> None:
    registry.load("sure", headed)
    lease = registry.acquire("sure")
    rewrite(headed, replace(HEAD, temperature=2.0))
    registry.load("sure", headed, replace=True)
    newer = registry.acquire("sure")
    kept, new = lease.resident.head, newer.resident.head
    assert kept is not None
    assert new is not None
    assert (kept.temperature, new.temperature) == (1.0, 2.0)


def test_a_head_is_freed_with_its_version(registry: Registry, headed: Path) -> None:
    registry.load("sure", headed)
    lease = registry.acquire("sure")
    assert lease.resident.head is not None
    there = weakref.ref(lease.resident.head)
    registry.unload("sure")
    gc.collect()
    assert there() is not None
    registry.release(lease)
    del lease
    gc.collect()
    assert there() is None


def test_a_head_of_another_base_is_refused(registry: Registry, plain: Path, tmp_path: Path) -> None:
    heads.write(random_head("lowrank", LABELS, WIDTH + 1, seed=1), plain)
    with pytest.raises(ShapeError, match=r"reads features of width 49; those of 'base' have width 48") as refusal:
        registry.load("sure", plain)
    assert str(tmp_path) not in str(refusal.value)
    with pytest.raises(AdapterNotFoundError):
        registry.get("sure")
    assert registry.residency.used_bytes == 0


def test_half_a_head_is_refused(registry: Registry, headed: Path) -> None:
    (headed / heads.HEAD_WEIGHTS).unlink()
    with pytest.raises(SourceNotFoundError, match=heads.HEAD_WEIGHTS):
        registry.load("sure", headed)


def test_a_damaged_head_refuses_the_adapter(registry: Registry, headed: Path) -> None:
    file = headed / heads.HEAD_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "labels": ["no", "yes"]}))
    with pytest.raises(FormatError, match="2 labels"):
        registry.load("sure", headed)
    assert registry.residency.used_bytes == 0
