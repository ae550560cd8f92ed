"""What a request says of its user becomes factors; what cannot be used is refused by field, never corrected."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from motet.adapters.effects import GateSpec
from motet.adapters.errors import GateError
from motet.adapters.gates.instance import InstanceGate, UserInput
from tests.support.layouts_ilora import HISTORY_LENGTH, ITEMS, Networks, gate_tensors
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.gates.conftest import EXPERTS, WIDTH

HISTORIES = [[5], [36, 0], list(range(10)), [7, 7, 7]]
FACTORS = TOLERANCES["gate factors", torch.float32]


@pytest.fixture(scope="module")
def spec(made: Networks) -> GateSpec:
    placeholders = {"history": "[HistoryEmb]", "candidates": "[CansEmb]"}
    facts = {"items": ITEMS, "history_length": HISTORY_LENGTH, "width": WIDTH, "placeholders": placeholders}
    return GateSpec("router", EXPERTS, {}, gate_tensors(made), facts)


@pytest.fixture(scope="module")
def gate(spec: GateSpec) -> InstanceGate:
    return InstanceGate(spec)


def test_histories_go_through_both_networks(gate: InstanceGate, made: Networks) -> None:
    actual_NK = gate.factors([UserInput(history=history) for history in HISTORIES])
    assert (actual_NK.dtype, actual_NK.shape) == (torch.float32, (4, EXPERTS))
    FACTORS.assert_close(actual_NK, torch.stack([made.weights(history) for history in HISTORIES]))


def test_user_embeddings_go_through_the_router(gate: InstanceGate, made: Networks) -> None:
    users = [UserInput(user_embedding=made.state(history)[0].tolist()) for history in HISTORIES]
    FACTORS.assert_close(gate.factors(users), torch.stack([made.weights(history) for history in HISTORIES]))


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.4], [0, 1, 0, 0], [0.3333, 0.3333, 0.3333, 0], [1.001, 0, 0, 0]])
def test_weights_are_taken_as_they_are(gate: InstanceGate, weights: list[float]) -> None:
    assert torch.equal(gate.factors([UserInput(weights=weights)])[0], torch.tensor(weights, dtype=torch.float32))


def test_equal_users_have_equal_factors_bit_by_bit_whatever_their_company(gate: InstanceGate, made: Networks) -> None:
    users = [UserInput(history=history) for history in HISTORIES]
    users += [UserInput(user_embedding=made.state([3])[0].tolist()), UserInput(weights=[1, 0, 0, 0])]
    together_NK = gate.factors(users + users[::-1])
    assert torch.equal(together_NK, together_NK.flip(0))
    for user, factors_K in zip(users, together_NK, strict=False):
        assert torch.equal(gate.factors([user])[0], factors_K)


def test_no_requests_have_no_factors(gate: InstanceGate) -> None:
    assert gate.factors([]).shape == (0, EXPERTS)


REFUSED: dict[str, tuple[UserInput, str, str]] = {
    "nothing": (UserInput(), "history", "gives nothing for the gate; give exactly one"),
    "two of three": (
        UserInput(history=[1], weights=[1, 0, 0, 0]),
        "weights",
        "gives history and weights for the gate",
    ),
    "an empty history": (UserInput(history=[]), "history", "has 0 items; the adapter reads 1 to 10"),
    "a long history": (UserInput(history=[0] * 11), "history", "has 11 items; the adapter reads 1 to 10"),
    "the padding": (UserInput(history=[1, 37]), "history", r"history\[1\]=37 is the padding's id; items are 0 to 36"),
    "an unknown item": (UserInput(history=[38]), "history", r"history\[0\]=38 is no item"),
    "a negative item": (UserInput(history=[-1]), "history", r"history\[0\]=-1 is no item"),
    "a truth value": (UserInput(history=[True]), "history", r"history\[0\]=True is no item"),
    "a fraction": (UserInput(history=[1.0]), "history", r"history\[0\]=1\.0 is no item"),  # type: ignore[list-item]
    "a short embedding": (UserInput(user_embedding=[0.0] * 63), "user_embedding", "has 63 numbers.* exactly 64"),
    "an infinite embedding": (
        UserInput(user_embedding=[0.0] * 63 + [float("inf")]),
        "user_embedding",
        r"user_embedding\[63\]=inf is not a finite number",
    ),
    "an embedding beyond float32": (UserInput(user_embedding=[1e39] * 64), "user_embedding", "finite number of float3"),
    "an embedding too large to compute with": (
        UserInput(user_embedding=[3e38] * 64),
        "user_embedding",
        "factors that are not finite",
    ),
    "a word": (UserInput(user_embedding=["1"] * 64), "user_embedding", r"\[0\]='1' is not a finite"),  # type: ignore[list-item]
    "too few weights": (UserInput(weights=[1.0]), "weights", "has 1 numbers; the adapter takes exactly 4"),
    "NaN": (UserInput(weights=[float("nan"), 1, 0, 0]), "weights", r"weights\[0\]=nan is not a finite number"),
    "a negative weight": (UserInput(weights=[1.1, -0.1, 0, 0]), "weights", "negative number -0.1"),
    "weights of another sum": (UserInput(weights=[1, 1, 1, 1]), "weights", "sums to 4, not to 1 within 0.001"),
    "weights hardly of another sum": (UserInput(weights=[1.0011, 0, 0, 0]), "weights", "sums to 1.0011, not to 1"),
}


@pytest.mark.parametrize(("user", "field", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_refused(gate: InstanceGate, user: UserInput, field: str, message: str) -> None:
    with pytest.raises(GateError, match=message) as error:
        gate.factors([UserInput(history=[1]), user])
    assert error.value.field == field


def test_items_stand_for_placeholders(gate: InstanceGate, made: Networks) -> None:
    assert gate.has_projector
    rows_ND = gate.item_rows([36, 0, 36])
    assert rows_ND.shape == (3, WIDTH)
    TOLERANCES["user state", torch.float32].assert_close(rows_ND, made.item_rows([36, 0, 36]))


def test_no_padding_stands_for_a_placeholder(gate: InstanceGate) -> None:
    with pytest.raises(GateError, match=r"candidates\[0\]=37 is the padding's id") as error:
        gate.item_rows([37], "candidates")
    assert error.value.field == "candidates"


def test_without_a_projector_no_item_stands_for_anything(spec: GateSpec, made: Networks) -> None:
    bare = InstanceGate(dataclasses.replace(spec, tensors=gate_tensors(made, projector=False)))
    assert not bare.has_projector
    users: list[Any] = [UserInput(history=[4])]
    assert torch.equal(bare.factors(users), InstanceGate(spec).factors(users))
    with pytest.raises(GateError, match="no projector, so no item can stand for a placeholder") as error:
        bare.item_rows([1], "candidates")
    assert error.value.field == "candidates"
