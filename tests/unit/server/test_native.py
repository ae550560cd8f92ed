"""What is said and counted of the native backend."""

from __future__ import annotations

import pytest
import torch
from prometheus_client import CollectorRegistry

from motet.kernels.cpu import compiled
from motet.server.config import OptionError, ServeConfig
from motet.server.native import RowMetrics, native_engine

CPU = torch.device("cpu")


def test_the_native_backend_is_said_once() -> None:
    said: list[str] = []
    engine = native_engine(ServeConfig(), CPU, 2, said.append)
    assert engine is not None
    assert said == [f"native CPU backend: {engine.processor.name}, 2 threads"]
    assert native_engine(ServeConfig(native="off"), CPU, 2, said.append) is None
    assert len(said) == 1


def test_without_it_torch_computes_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "entry_points", lambda: None)
    said: list[str] = []
    assert native_engine(ServeConfig(), CPU, 2, said.append) is None
    assert len(said) == 1
    assert "torch alone" in said[0]
    assert "compiler" in said[0]
    with pytest.raises(OptionError, match=r"--native on: .*not compiled"):
        native_engine(ServeConfig(native="on"), CPU, 2, said.append)


def test_it_computes_on_a_cpu_only() -> None:
    cuda = torch.device("cuda")
    assert native_engine(ServeConfig(), cuda, 2, pytest.fail) is None
    with pytest.raises(OptionError, match=r"--native on.*not on cuda; add --device cpu"):
        native_engine(ServeConfig(native="on"), cuda, 2, pytest.fail)


def test_rows_are_told_by_what_computed_them() -> None:
    registry, rows = CollectorRegistry(), {"native": 70}
    registry.register(RowMetrics(lambda: rows))
    rows["overlay"] = 2
    values = {path: registry.get_sample_value("motet_rows_total", {"path": path}) for path in (*rows, "sign")}
    assert values == {"native": 70, "overlay": 2, "sign": None}
