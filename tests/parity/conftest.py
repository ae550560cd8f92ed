"""One served base per family with every layout that is served, each beside its own oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.harness import Harness
from tests.support.layout import Layout
from tests.support.layouts import layouts_of, make
from tests.support.models import FAMILIES, reference_copy


@dataclass
class Served:
    """A family being served, and the untouched copy."""

    family: str
    harness: Harness
    reference: Any
    layouts: dict[str, Layout]

    def oracle(self, adapter: str | None) -> Any:
        """The model that knows what the adapter means, alone, or the base."""
        return self.reference if adapter is None else self.layouts[adapter].oracle

    def load(self, name: str, layout: str, replace: bool = False) -> None:
        """Publish a layout under another name as well."""
        self.harness.load(name, self.layouts[layout].folder, self.layouts[layout].declared, replace)

    @torch.no_grad()
    def expected_logits(self, prompt: list[int], adapter: str | None) -> torch.Tensor:
        """[V] after the prompt."""
        return self.oracle(adapter)(input_ids=torch.tensor([prompt])).logits[0, -1].float()


@pytest.fixture(scope="package", params=list(FAMILIES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = FAMILIES[request.param]()
    reference = reference_copy(model)
    root = tmp_path_factory.mktemp(request.param)
    layouts = {
        name: make(name, reference, Path(root) / name, seed) for seed, name in enumerate(layouts_of(request.param))
    }
    harness = Harness(model, blocks=1024, generations=len(layouts) + 8)
    served = Served(request.param, harness, reference, layouts)
    for name in layouts:
        served.load(name, name)
    yield served
    assert harness.pool.spare == harness.pool.size
    assert all(info.leases == 0 for info in harness.registry.published())
