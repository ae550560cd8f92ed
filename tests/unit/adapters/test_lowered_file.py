"""A lowered adapter survives as bytes, bit by bit; what is not exactly such bytes is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from motet.adapters.effects import (
    ColumnSparse,
    GateSpec,
    Lowered,
    LowRank,
    OutputBias,
    OutputScale,
    RowSparse,
    SignDelta,
    TargetEffects,
)
from motet.adapters.errors import CorruptSourceError
from motet.adapters.lowered_file import FACTS, PARTS, dump, parse
from tests.unit.adapters.conftest import Bench


def awkward() -> Lowered:
    """Every effect, none at all, values that compare oddly, layouts that are not contiguous, memory that is shared."""
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(6, 6, generator=random)
    odd = torch.tensor([0.0, -0.0, 1e-45, -3.4e38, torch.inf, torch.nan])
    return Lowered(
        method="pissa",
        form="a “form”",
        scaling="alpha/√r",
        effects={
            "model.z": TargetEffects(LowRank(shared[:2], shared.T[:, 1:3])),
            "model.a.A": TargetEffects(LowRank(shared[2:3], shared[:, 3:4]), OutputScale(odd), OutputBias(odd.flip(0))),
            "model.a": TargetEffects(bias=OutputBias(shared[0])),
            "model.sparse": TargetEffects(
                columns=ColumnSparse(torch.tensor([0, 5, 2**40]), shared[:, :3]),
                rows=RowSparse(torch.tensor([3]), shared[:1]),
            ),
            "model.sign": TargetEffects(
                sign=SignDelta(torch.tensor([[-(2**31)], [2**31 - 1]], dtype=torch.int32), odd[2:3])
            ),
            "model.nothing": TargetEffects(),
        },
        expected_targets=7,
        exact=False,
        overlays={"model.norm.weight": odd, "embed.weight": shared, "head.weight": shared, "model.a": shared[:, 2]},
        gate=GateSpec(
            kind="router",
            size=3,
            groups={"model.z": torch.tensor([2, 0]), "model.a.A": torch.tensor([1])},
            tensors={"router.x": shared.T, "model.z": odd, "a": shared[:, 2]},
            facts={"items": 4, "names": {"history": "[“H”]"}, "none": None, "share": 0.1},
        ),
    )


def parts(effects: TargetEffects) -> dict[str, torch.Tensor]:
    found = {}
    for kind in dataclasses.fields(effects):
        if (effect := getattr(effects, kind.name)) is not None:
            found |= {f"{kind.name}.{f.name}": getattr(effect, f.name) for f in dataclasses.fields(effect)}
    return found


def assert_same(one: Lowered, other: Lowered) -> None:
    for field in dataclasses.fields(Lowered):
        if field.name not in ("effects", "overlays", "gate"):
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert list(one.effects) == list(other.effects), "the order of targets is part of it"
    for target in one.effects:
        mine, its = parts(one.effects[target]), parts(other.effects[target])
        assert mine.keys() == its.keys()
        for name, tensor in mine.items():
            assert its[name].dtype == tensor.dtype
            assert its[name].shape == tensor.shape
            assert_same_bytes(tensor, its[name])
    assert list(one.overlays) == list(other.overlays)
    for path, values in one.overlays.items():
        assert_same_bytes(values, other.overlays[path])
    assert_same_gate(one.gate, other.gate)


def assert_same_gate(one: GateSpec | None, other: GateSpec | None) -> None:
    assert (one is None) == (other is None)
    if one is None or other is None:
        return
    assert (one.kind, one.size, one.facts) == (other.kind, other.size, other.facts)
    for mine, its in ((one.groups, other.groups), (one.tensors, other.tensors)):
        assert list(mine) == list(its)
        for name, tensor in mine.items():
            assert its[name].dtype == tensor.dtype
            assert its[name].shape == tensor.shape
            assert_same_bytes(tensor, its[name])


def assert_same_bytes(one: torch.Tensor, other: torch.Tensor) -> None:
    assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_a_shared_parameter_is_written_once_and_shared_again() -> None:
    overlays = parse(dump(awkward())).overlays
    assert overlays["embed.weight"] is overlays["head.weight"]
    assert overlays["model.a"] is not overlays["head.weight"]


def test_the_file_knows_every_field() -> None:
    assert {field.name for field in dataclasses.fields(Lowered)} == {"effects", "overlays", "gate", *FACTS}
    assert {field.name for field in dataclasses.fields(TargetEffects)} == PARTS.keys()
    for kind, parts in PARTS.values():
        assert sorted(field.name for field in dataclasses.fields(kind)) == sorted(parts.values())  # type: ignore[arg-type]


def test_round_trip_is_exact() -> None:
    assert_same(awkward(), parse(dump(awkward())))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_round_trip_of_a_lowered_adapter(qwen2: Bench, tmp_path: Path, options: dict[str, object]) -> None:
    lowered = qwen2.lower(qwen2.save(tmp_path, target_modules=["q_proj", "down_proj"], **options))
    assert_same(lowered, parse(dump(lowered)))


def test_an_adapter_without_a_gate_has_none_again() -> None:
    assert parse(dump(dataclasses.replace(awkward(), gate=None))).gate is None


def test_the_same_adapter_is_the_same_bytes() -> None:
    assert len({dump(awkward()) for _ in range(5)}) == 1
    assert dump(parse(dump(awkward()))) == dump(awkward())


def test_no_damage_goes_unseen() -> None:
    """One bit, wherever it is: header, facts, checksum, weights."""
    content = dump(awkward())
    random = torch.Generator().manual_seed(1)
    for at in torch.randint(len(content), (400,), generator=random).tolist():
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        try:
            parsed = parse(bytes(damaged))
        except CorruptSourceError:
            continue
        assert_same(parsed, awkward())  # a bit in the header's padding, or the case of a hexadecimal digit: no harm


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(kept: int) -> None:
    with pytest.raises(CorruptSourceError):
        parse(dump(awkward())[:kept])


def test_a_longer_file_is_refused() -> None:
    with pytest.raises(CorruptSourceError):
        parse(dump(awkward()) + b"\0")


def _foreign(metadata: dict[str, str] | None) -> bytes:
    return save({"x.A": torch.ones(1, 2)}, metadata)


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all",
        _foreign(None),
        _foreign({"format": "pt"}),
        _foreign({"motet": "no JSON"}),
        _foreign({"motet": "[1]"}),
        _foreign({"motet": '{"facts": "{}"}'}),
        _foreign({"motet": '{"facts": "{}", "sha256": "0"}'}),
    ],
)
def test_a_foreign_file_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptSourceError):
        parse(content)


def _resealed(change: Callable[[dict[str, object]], object]) -> bytes:
    """The file with other facts and a checksum that fits them: what another version could have written."""
    from motet.adapters import lowered_file

    content = dump(awkward())
    tensors = load(content)
    text, _ = lowered_file._metadata(content)
    facts = json.loads(text)
    change(facts)
    text = json.dumps(facts)
    return save(tensors, {"motet": json.dumps({"facts": text, "sha256": lowered_file._checksum(text, tensors)})})


def test_the_seal_of_these_tests_fits() -> None:
    assert_same(parse(_resealed(lambda facts: None)), awkward())


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(format=0),
        lambda facts: facts.pop("format"),
        lambda facts: facts.pop("exact"),
        lambda facts: facts.update(targets=3),
        lambda facts: facts.pop("gate"),
        lambda facts: facts["gate"]["groups"].append("model.a"),
        lambda facts: facts["gate"].pop("size"),
    ],
)
def test_the_facts_of_another_format_are_refused(change: Callable[[dict[str, object]], object]) -> None:
    with pytest.raises(CorruptSourceError):
        parse(_resealed(change))
