"""A lossy form is measured against the exact one before it is published; the exact one leaves nothing behind."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from motet.adapters import approximate as approximate_module
from motet.adapters.base import BaseModel
from motet.adapters.cache import LoweredCache
from motet.adapters.errors import AdapterNotFoundError, ArenaFullError, ConfigError, UnmeasuredError
from motet.adapters.golden import GOLDEN_FILE
from motet.adapters.lease import Lease
from motet.adapters.lowered_file import dump
from motet.adapters.receipt import LogprobError
from motet.adapters.registry import Registry
from motet.adapters.residency import Residency
from motet.adapters.spec import Declared, LossyForm
from tests.support.bases import base_of, residency_of
from tests.support.layouts_full import fine_tuned
from tests.support.models import tiny_llama
from tests.unit.adapters.conftest import Bench

ONE_BIT, SVD = (Declared(approximate=form) for form in (LossyForm(), LossyForm(3)))
TRAINED = ("layers.0.", "layers.2.", "model.norm")


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return base_of(tiny_llama())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tuned(*TRAINED)(tiny_llama(), tmp_path_factory.mktemp("full") / "model", 1).folder


class Scores:
    """What the registry's score sees, and what it answers: one text of three tokens."""

    registry: Registry

    def __init__(self) -> None:
        self.asked: list[Lease] = []
        self.failing: int | None = None
        self.late: list[Lease] = []
        self.keeps_leases = False
        self.during: Callable[[Lease], None] = lambda lease: None

    def __call__(self, lease: Callable[[], Lease]) -> Sequence[Sequence[float]]:
        one = lease()
        self.asked.append(one)
        try:
            self.during(one)
            if self.failing == len(self.asked):
                raise UnmeasuredError("the engine does not run")
        finally:
            if self.keeps_leases:
                self.late.append(one)
            else:
                self.registry.release(one)
        return [[-1.0, -2.0, -3.0]] if len(self.asked) % 2 else [[-1.5, -2.0, -2.75]]


@pytest.fixture
def residency(base: BaseModel) -> Residency:
    return residency_of(base)


@pytest.fixture
def scores() -> Scores:
    return Scores()


@pytest.fixture
def registry(base: BaseModel, residency: Residency, scores: Scores) -> Registry:
    scores.registry = Registry(base, residency, score=scores)
    return scores.registry


def placed(residency: Residency) -> int:
    return len(residency._pieces)


@pytest.mark.parametrize("declared", [ONE_BIT, SVD], ids=["1bit", "svd-3"])
def test_both_forms_are_scored_and_one_is_published(
    registry: Registry, residency: Residency, scores: Scores, folder: Path, base: BaseModel, declared: Declared
) -> None:
    exact_bytes = registry.examine(folder)[1].resident_bytes
    seen = []

    def during(lease: Lease) -> None:
        assert registry.published() == []
        with pytest.raises(AdapterNotFoundError):
            registry.acquire("full")
        overlays = residency.overlays(lease.slot)
        seen.append((residency.used_bytes, len(overlays), placed(residency)))
        if len(scores.asked) == 1:
            weight = overlays["model.layers.0.mlp.up_proj.weight"]
            assert (weight.dtype, weight.device) == (residency.arena.units_NU.dtype, residency.arena.units_NU.device)
            assert not torch.equal(weight, base.weight("model.layers.0.mlp.up_proj"))

    scores.during = during
    info = registry.load("full", folder, declared)
    exact, lossy = (lease.version for lease in scores.asked)
    assert (exact.name, exact.digest) == ("full", registry.examine(folder)[1].digest)
    assert lossy == info.version == registry.get("full").version
    assert lossy.digest != exact.digest
    assert seen == [(0, 19, 1), (info.receipt.resident_bytes, 5, 1)], "the exact form lay beside the arena, and is gone"
    assert residency.used_bytes == info.receipt.resident_bytes < exact_bytes
    assert info.receipt.error is not None
    assert info.receipt.error.logprobs == LogprobError(largest=0.5, mean=0.25, tokens=3)
    for said in (str(declared.approximate), "of the change of 14 weights", "0.25 on average", "0.5 at most"):
        assert said in str(info.receipt.error)
    registry.unload("full")
    assert (residency.used_bytes, placed(residency)) == (0, 0)


def test_it_fits_where_the_exact_one_does_not(base: BaseModel, folder: Path) -> None:
    exact = residency_of(base)
    needed = exact.bytes_needed(Registry(base, exact).examine(folder, ONE_BIT)[0])
    tight = residency_of(base, needed)
    scores = Scores()
    registry = scores.registry = Registry(base, tight, score=scores)
    with pytest.raises(ArenaFullError, match=f"; or ask for a lossy form .* 1bit takes {needed:,} bytes") as refusal:
        registry.load("full", folder)
    assert "svd-8 takes" in str(refusal.value)
    assert str(folder) not in str(refusal.value)
    assert registry.load("full", folder, ONE_BIT).receipt.resident_bytes == needed == tight.used_bytes
    with pytest.raises(ArenaFullError, match="1bit takes"):
        registry.load("other", folder, SVD)
    assert (tight.used_bytes, placed(tight)) == (needed, 1)


def test_a_plain_adapter_that_does_not_fit_is_offered_nothing(llama: Bench, tmp_path: Path) -> None:
    registry = Registry(llama.base, residency_of(llama.base, 64))
    with pytest.raises(ArenaFullError, match=r"--adapter-memory$"):
        registry.load("fr", llama.save(tmp_path, target_modules=["q_proj"]))


@pytest.mark.parametrize("failing", [1, 2], ids=["the exact form", "the lossy form"])
def test_what_cannot_be_measured_is_not_served(
    registry: Registry, residency: Residency, scores: Scores, folder: Path, failing: int
) -> None:
    scores.failing = failing
    with pytest.raises(UnmeasuredError):
        registry.load("full", folder, ONE_BIT)
    assert (registry.published(), residency.used_bytes, placed(residency)) == ([], 0, 0)


def test_leases_that_come_back_late_are_waited_for(
    registry: Registry, residency: Residency, scores: Scores, folder: Path
) -> None:
    scores.keeps_leases = True
    registry.load("full", folder, ONE_BIT)
    assert placed(residency) == 2
    for lease in scores.late:
        registry.release(lease)
    assert placed(residency) == 1


def test_the_exact_form_needs_memory_beside_the_arena(
    registry: Registry, residency: Residency, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    exact, _ = registry.examine(folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", exhausted)
        with pytest.raises(ArenaFullError, match="bytes are not free beside the adapter memory"):
            residency.place_beside(exact)
    assert (residency.used_bytes, placed(residency)) == (0, 0)


def test_golden_values_are_the_exact_forms(base: BaseModel, residency: Residency, folder: Path, tmp_path: Path) -> None:
    """They say whether the folder is what its author saw; how far the lossy form is from that, the receipt says."""
    vouched = shutil.copytree(folder, tmp_path / "vouched")
    (vouched / GOLDEN_FILE).write_text(
        json.dumps({"tolerance": 0.5, "prompts": [{"tokens": [1, 2], "logprobs": [-1]}]})
    )
    checked: list[Lease] = []

    def check(_: object, lease: Callable[[], Lease]) -> None:
        checked.append(lease())
        scores.registry.release(checked[0])

    scores = Scores()
    scores.registry = Registry(base, residency, check=check, score=scores)
    scores.registry.load("full", vouched, ONE_BIT)
    assert [lease.version for lease in checked] == [scores.asked[0].version]


def test_where_nothing_would_change_nothing_is_measured(llama: Bench, scores: Scores, tmp_path: Path) -> None:
    registry = Registry(llama.base, residency_of(llama.base), score=scores)
    with pytest.raises(ConfigError, match="approximate=1bit would change nothing"):
        registry.load("fr", llama.save(tmp_path, target_modules=["q_proj"]), ONE_BIT)
    assert scores.asked == []


def test_an_exact_load_is_not_measured(registry: Registry, scores: Scores, folder: Path) -> None:
    assert registry.load("full", folder).receipt.error is None
    assert scores.asked == []


@pytest.mark.parametrize("cached", [True, False])
def test_nothing_is_decomposed_twice(
    base: BaseModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    decomposed = []
    leading = approximate_module.leading
    monkeypatch.setattr(approximate_module, "leading", lambda *a: decomposed.append(a) or leading(*a))
    receipts = []
    for _ in range(2):
        cache = LoweredCache(tmp_path / "cache", 1 << 24) if cached else None
        registry = Registry(base, residency_of(base), cache)
        receipts.append(registry.load("full", folder, SVD).receipt)
        version, lowered = registry.lowered("full")
        assert dump(lowered) == dump(registry.examine(folder, SVD)[0])
        assert version.digest == receipts[0].digest
        assert not lowered.exact
    assert receipts[0] == receipts[1]
    assert len(decomposed) == (14 if cached else 14 * 6)
    assert registry.examine(folder)[0].exact, "another entry"


def test_an_infinite_difference_is_said() -> None:
    error = LogprobError.between([[-1.0, -2.0], [-1.0]], [[-1.0, math.nan], [-1.0]])
    assert (error.largest, error.mean, error.tokens) == (math.inf, math.inf, 3)
    with pytest.raises(ValueError, match="zip"):
        LogprobError.between([[-1.0, -2.0]], [[-1.0]])
