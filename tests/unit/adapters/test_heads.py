"""Head files are read strictly and written bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.bounded import Limits
from motet.adapters.calibration import Calibration
from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    CorruptSourceError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    SourceError,
    UnmatchedTensorError,
    UnsafePathError,
)
from motet.adapters.heads import (
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    HeadFile,
    Parameterization,
    checked,
    dump,
    parse,
    read,
    write,
)

C, D, R = 3, 6, 2
KINDS = [kind.value for kind in Parameterization]
LABELS = ("no", "maybe", "oui ✓")


def tensors_of(kind: str, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"weight": (C, D), "bias": (C,)}
    if kind != "softmax":
        shapes = {"noise_mean": (C,), "noise_logdiag": (C,), "W_mean": (C, D), "W_logdiag": (C, D)}
    if kind in ("dense", "lowrank"):
        shapes["W_offdiag"] = (C, D, D if kind == "dense" else R)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def head_of(kind: str = "dense", **changes: Any) -> HeadFile:
    return HeadFile(
        **{"parameterization": Parameterization(kind), "labels": LABELS, "tensors": tensors_of(kind), **changes}
    )


def same(one: HeadFile, other: HeadFile) -> bool:
    facts = all(getattr(one, f.name) == getattr(other, f.name) for f in fields(HeadFile) if f.name != "tensors")
    bits = {name: tensor.view(torch.int32).tolist() for name, tensor in one.tensors.items()}
    return facts and bits == {name: tensor.view(torch.int32).tolist() for name, tensor in other.tensors.items()}


FACTS: dict[str, Any] = {
    "label_token_ids": (5, 0, 49151),
    "n_train": 9427,
    "prior_scale": 1 / 3,
    "seed": 2**63 - 1,
    "wishart_scale": 0.1,
    "dof": 1.0,
    "temperature": 1.7,
    "threshold": 0.25,
    "calibration": Calibration(set="dev ✓", n=2000, ece=0.1 / 3, nll=0.5, brier=2.0, miss_rate=0.1),
}
MEASURED: dict[str, Any] = {"set": "dev", "n": 1, "ece": 0, "nll": 0.5, "brier": 2, "miss_rate": None}


def measured(**change: Any) -> dict[str, Any]:
    return {"calibration": {**MEASURED, **change}}


@pytest.mark.parametrize("facts", [{}, FACTS])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_bit_by_bit(tmp_path: Path, kind: str, facts: dict[str, Any]) -> None:
    head = head_of(kind, **facts)
    next(iter(head.tensors.values())).view(-1)[0] = -0.0
    write(head, tmp_path / "adapter")
    found = read(tmp_path / "adapter")
    assert found is not None
    assert same(found, head)
    assert found.digest == head.digest
    assert dump(found) == dump(head)
    assert found.width == D
    with pytest.raises(AdapterExistsError, match="already"):
        write(head, tmp_path / "adapter")


def test_a_folder_without_a_head(tmp_path: Path) -> None:
    assert read(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0.5},
        {"labels": LABELS[::-1]},
        {"tensors": tensors_of("dense", 2)},
        {"calibration": Calibration(**MEASURED)},
    ],
)
def test_every_change_is_another_digest(change: dict[str, Any]) -> None:
    assert len(head_of().digest) == 64
    assert head_of().digest == head_of().digest != head_of(**change).digest


@pytest.mark.parametrize("name", [HEAD_CONFIG, HEAD_WEIGHTS])
def test_half_a_head_is_none(tmp_path: Path, name: str) -> None:
    write(head_of(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SourceError, match=name):
        read(tmp_path)


def edited(change: dict[str, Any], drop: str | None = None, kind: str = "dense") -> HeadFile:
    config, weights = dump(head_of(kind))
    values = {key: value for key, value in {**json.loads(config), **change}.items() if key != drop}
    return parse(json.dumps(values).encode(), weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"comment": 1}, "unknown key 'comment'"),
        ({"version": 2}, "version 2"),
        ({"version": True}, "version True"),
        ({"parameterization": "auto"}, "none of softmax, diagonal, dense, lowrank"),
        ({"parameterization": ["dense"]}, "none of"),
        ({"feature": "mean_pooled"}, "feature 'mean_pooled'"),
        ({"labels": ["a"]}, "list of 2 to 1,000"),
        ({"labels": ["a"] * 1001}, "list of 2 to 1,000"),
        ({"labels": "abc"}, "list of 2 to 1,000"),
        ({"labels": None}, "list of 2 to 1,000"),
        ({"labels": ["a", "b", ""]}, "string of 1 to 256"),
        ({"labels": ["a", "b", "c" * 257]}, "string of 1 to 256"),
        ({"labels": ["a", "b", 3]}, "string of 1 to 256"),
        ({"labels": ["a", "b", "a"]}, "label 'a' stands twice"),
        ({"label_token_ids": [1, 2]}, "2 label_token_ids and 3 labels"),
        ({"label_token_ids": [1, 2, 2]}, "token id 2 stands twice"),
        ({"label_token_ids": [1, 2, -3]}, "list of token ids"),
        ({"label_token_ids": [1, 2, True]}, "list of token ids"),
        ({"label_token_ids": "123"}, "list of token ids"),
        ({"temperature": 0}, "temperature 0"),
        ({"temperature": None}, "temperature None"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": "1"}, "temperature '1'"),
        ({"temperature": True}, "temperature True"),
        ({"temperature": 10**400}, "temperature 1000"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"threshold": -0.1}, "threshold -0.1"),
        ({"n_train": 0}, "n_train 0"),
        ({"n_train": 1.5}, "n_train 1.5"),
        ({"seed": -1}, "seed -1"),
        ({"prior_scale": 0}, "prior_scale 0"),
        ({"dof": -1}, "dof -1"),
        ({"wishart_scale": "a"}, "wishart_scale 'a'"),
        ({"calibration": 0}, "is 0; it must be null or have the keys set, n, ece"),
        ({"calibration": {"ece": 0.1}}, "has the keys ece; it must"),
        (measured(date="2026-08-01"), "has the keys .*, date; it must"),
        (measured(set=""), "set '' is no string of 1 to 256"),
        (measured(set="s" * 257), "is no string of 1 to 256"),
        (measured(set="a\n"), "set 'a.n' is no string"),
        (measured(set=None), "set None is no string"),
        (measured(n=0), "n 0"),
        (measured(n=1.5), "n 1.5"),
        (measured(ece=1.01), "ece 1.01 is not a number from 0 to 1"),
        (measured(ece=None), "ece None"),
        (measured(nll=float("inf")), "nll inf"),
        (measured(nll=-0.1), "nll -0.1"),
        (measured(brier=2.1), "brier 2.1"),
        (measured(miss_rate=float("nan")), "miss_rate nan"),
        (measured(miss_rate=0.1), "threshold is null"),
    ],
)
def test_what_the_config_cannot_say(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        edited(change)


@pytest.mark.parametrize("key", json.loads(dump(head_of())[0]))
def test_no_key_may_be_missing(key: str) -> None:
    with pytest.raises(ConfigError, match=f"no key '{key}'"):
        edited({}, drop=key)


def test_a_calibration_is_read() -> None:
    found = edited({**measured(miss_rate=0.1), "threshold": 0.5}).calibration
    assert found == Calibration(set="dev", n=1, ece=0, nll=0.5, brier=2, miss_rate=0.1)
    assert edited(measured()).calibration == Calibration(**MEASURED)
    with pytest.raises(ConfigError, match="ece 2"):
        dump(checked(head_of(calibration=Calibration(**{**MEASURED, "ece": 2}))))


Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.mark.parametrize(
    ("kind", "change", "error", "said"),
    [
        ("dense", lambda t: t.pop("W_offdiag"), MissingTensorError, "W_offdiag"),
        ("diagonal", lambda t: t.update(W_offdiag=torch.ones(C, D, D)), UnmatchedTensorError, "W_offdiag"),
        ("softmax", lambda t: t.update(W_mean=torch.ones(C, D)), UnmatchedTensorError, "W_mean"),
        ("dense", lambda t: t.update(W_offdiag=torch.ones(C, D, R)), ShapeError, "check the parameterization"),
        ("lowrank", lambda t: t.update(W_offdiag=torch.ones(C, D, D)), ShapeError, "check the parameterization"),
        ("lowrank", lambda t: t.update(W_offdiag=torch.ones(C, D, 0)), ShapeError, "a rank from 1 to 5"),
        ("lowrank", lambda t: t.update(W_offdiag=torch.ones(C, D + 1, R)), ShapeError, "W_offdiag"),
        ("dense", lambda t: t.update(W_mean=torch.ones(C + 1, D)), ShapeError, "3 labels"),
        ("dense", lambda t: t.update(W_mean=torch.ones(C, 0)), ShapeError, "W_mean"),
        ("dense", lambda t: t.update(W_mean=torch.ones(C)), ShapeError, "must be"),
        ("dense", lambda t: t.update(W_logdiag=torch.ones(C, D + 1)), ShapeError, "W_logdiag"),
        ("dense", lambda t: t.update(noise_mean=torch.ones(())), ShapeError, "noise_mean"),
        ("softmax", lambda t: t.update(bias=torch.ones(C + 1)), ShapeError, "bias"),
        ("softmax", lambda t: t.update(weight=torch.ones(C, D, 1)), ShapeError, "weight"),
        ("dense", lambda t: t["W_mean"].__setitem__((1, 2), torch.nan), NonFiniteError, "W_mean"),
        ("dense", lambda t: t["W_offdiag"].__setitem__((0, 0, 5), torch.inf), NonFiniteError, "W_offdiag"),
        ("dense", lambda t: t["W_logdiag"].fill_(41), NonFiniteError, "beyond 40"),
        ("dense", lambda t: t["noise_logdiag"].fill_(-41), NonFiniteError, "beyond 40"),
        ("dense", lambda t: t.update(W_mean=t["W_mean"].half()), ConfigError, "torch.float16"),
        ("softmax", lambda t: t.update(bias=t["bias"].double()), ConfigError, "torch.float64"),
    ],
)
def test_what_tensors_cannot_be(kind: str, change: Change, error: type[AdapterError], said: str) -> None:
    tensors = tensors_of(kind)
    change(tensors)
    with pytest.raises(error, match=said):
        parse(*dump(head_of(kind, tensors=tensors)))


def test_a_kind_is_not_taken_for_another() -> None:
    for kind in KINDS:
        for other in KINDS:
            if other != kind:
                with pytest.raises(AdapterError):
                    edited({"parameterization": other}, kind=kind)


def test_damage_and_size(tmp_path: Path) -> None:
    config, weights = dump(head_of())
    for wrong in ((b"{", weights), (b"[]", weights), (config, weights[:-1]), (config, b"")):
        with pytest.raises(CorruptSourceError):
            parse(*wrong)
    write(head_of(), tmp_path)
    with pytest.raises(CorruptSourceError, match="more than the limit"):
        read(tmp_path, Limits(weights_bytes=100))


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    write(head_of(), tmp_path / "elsewhere")
    write(head_of(), tmp_path / "adapter")
    (tmp_path / "adapter" / HEAD_WEIGHTS).unlink()
    (tmp_path / "adapter" / HEAD_WEIGHTS).symlink_to(tmp_path / "elsewhere" / HEAD_WEIGHTS)
    with pytest.raises(UnsafePathError):
        read(tmp_path / "adapter")
