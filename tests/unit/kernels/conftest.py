"""What every test of the kernels runs under."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: what a kernel forgets to write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
