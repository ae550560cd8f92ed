"""More adapters than fit anywhere: whatever was evicted before, each answers as the model it was merged into."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from motet.adapters.cache import LoweredCache
from motet.server.engine.types import FinishReason
from tests.support.harness import GREEDY, Harness
from tests.support.layout import Layout
from tests.support.layouts import make
from tests.support.models import VOCABULARY, reference_copy, tiny_llama
from tests.support.tolerances import TOLERANCES

NAMES = ("lora-all", "dora", "patterns", "polar-diagonal", "s2ft", "emtal", "saved-head", "pissa")
FLAT_BYTES = 4 << 20
"""Growth of the process that is allowed over 16 rounds of 8 loads of 30 to 100 KB each."""


class Full:
    """Eight adapters, a device for three and a host for five."""

    def __init__(self, root: Path, cached: bool) -> None:
        model = tiny_llama()
        self.reference = reference_copy(model)
        self.layouts: dict[str, Layout] = {
            name: make(name, self.reference, root / name, seed) for seed, name in enumerate(NAMES)
        }
        cache = LoweredCache(root / "cache", 1 << 30) if cached else None
        roomy = Harness(reference_copy(model)).registry
        packed = [roomy.residency.pack(roomy.examine(one.folder, one.declared)[0]) for one in self.layouts.values()]
        device, host = (sorted(sizes) for sizes in ([p.units_NU.nbytes for p in packed], [p.bytes for p in packed]))
        self.harness = Harness(model, arena_bytes=sum(device[-3:]), host_bytes=sum(host[-5:]), cache=cache)
        for name, layout in self.layouts.items():
            self.harness.load(name, layout.folder, layout.declared)
        self.tiers = self.harness.registry.tiers
        self.chance = random.Random(7)

    def prompt(self, length: int | None = None) -> list[int]:
        return [self.chance.randrange(3, VOCABULARY) for _ in range(length or self.chance.randint(1, 20))]

    @torch.no_grad()
    def expected(self, prompt: list[int], name: str) -> torch.Tensor:
        logits: torch.Tensor = self.layouts[name].oracle(input_ids=torch.tensor([prompt])).logits[0, -1].float()
        return logits


@pytest.fixture(scope="module", params=[True, False], ids=["disk", "no disk"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Full]:
    full = Full(tmp_path_factory.mktemp("tiers"), request.param)
    yield full
    full.tiers.stop()
    assert full.harness.pool.spare == full.harness.pool.size
    assert full.tiers.residency.used_bytes <= full.tiers.residency.budget_bytes
    assert full.tiers.host.used_bytes <= full.tiers.host.budget_bytes


def test_each_answers_as_its_oracle_one_after_the_other(full: Full) -> None:
    for _ in range(3):
        for name in full.chance.sample(NAMES, len(NAMES)):
            prompt = full.prompt(7)  # the same rows each time, of what is in the same few slots
            (actual,) = full.harness.logits([(prompt, name)])
            TOLERANCES["logits", torch.float32].assert_close(actual, full.expected(prompt, name))
    loads, evictions = full.tiers.moves.loads, full.tiers.evictions
    assert loads[("host", "device")] > 8
    assert loads[("disk", "host")] + loads[("source", "host")] > 8
    assert min(evictions[("device", "room")], evictions[("host", "room")]) > 8


def test_all_at_once_take_turns(full: Full) -> None:
    """Forty generations of eight adapters, of which three fit: nobody fails, nobody gets another's tokens."""
    requests = [(full.prompt(), name) for name in full.chance.choices(NAMES, k=40)]
    made = full.harness.run(requests, replace(GREEDY, max_tokens=8))
    for (prompt, name), result in zip(requests, made, strict=True):
        assert result.events[-1].finish is FinishReason.LENGTH
        whole = torch.tensor([[*prompt, *result.tokens]])
        with torch.no_grad():
            expected = full.layouts[name].oracle(input_ids=whole).logits[0, len(prompt) - 1 : -1].float()
        TOLERANCES["logits", torch.float32].assert_close(torch.stack(result.logits), expected)


def test_a_mixture_finds_both_of_its_parts(full: Full) -> None:
    for name in NAMES:
        full.harness.logits([([3, 4], name)])
    dense = copy.deepcopy(full.reference)
    with torch.no_grad():
        for part, weight in (("lora-all", 0.5), ("patterns", -0.75)):
            for target, delta_OI in full.layouts[part].deltas_OI.items():
                dense.get_submodule(target).weight += weight * delta_OI.float()
        prompt = full.prompt()
        expected = dense(input_ids=torch.tensor([prompt])).logits[0, -1].float()
    (actual,) = full.harness.logits([(prompt, [("lora-all", (0.5,)), ("patterns", (-0.75,))])])
    TOLERANCES["logits", torch.float32].assert_close(actual, expected)


@pytest.mark.parametrize("full", [True], indirect=True, ids=["disk"])
def test_memory_stays_flat(full: Full) -> None:
    def round_of_all() -> None:
        for name in NAMES:
            full.harness.run([([3, 5], name)], replace(GREEDY, max_tokens=1))

    for _ in range(4):
        round_of_all()
    before = resident_bytes()
    for _ in range(16):
        round_of_all()
    assert resident_bytes() - before < FLAT_BYTES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
