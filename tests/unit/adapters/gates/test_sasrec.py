"""SASRec's states are those of the official weights' golden values, and of a module written from the formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.errors import AdapterError, MissingTensorError, NonFiniteError, ShapeError, UnmatchedTensorError
from motet.adapters.gates.instance import part
from motet.adapters.gates.sasrec import Sasrec
from tests.support.ilora_modules import SasrecModule
from tests.support.layouts_ilora import HISTORY_LENGTH, ITEMS, Networks, gate_tensors
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.methods.changes import Change, drop, poison, put

HISTORIES = [[5], [36, 0], [7, 7, 7], list(range(9)), list(range(20, 30))]
STATE = TOLERANCES["user state", torch.float32]


def weights(made: Networks) -> dict[str, torch.Tensor]:
    return part(gate_tensors(made), "sasrec")


def encoder(made: Networks) -> Sasrec:
    return Sasrec(weights(made), ITEMS, HISTORY_LENGTH)


def test_states_are_those_of_the_formulas(made: Networks) -> None:
    expected_ND = torch.cat([made.state(history) for history in HISTORIES])
    STATE.assert_close(encoder(made).states(HISTORIES), expected_ND)
    assert (expected_ND[:-1] - expected_ND[1:]).abs().max() > 0.1, "the users must differ"


def test_a_user_alone_has_the_state_it_has_among_others(made: Networks) -> None:
    together_ND = encoder(made).states(HISTORIES)
    for history, state_D in zip(HISTORIES, together_ND, strict=True):
        STATE.assert_close(encoder(made).states([history])[0], state_D)


def test_order_and_place_count(made: Networks) -> None:
    one, turned, later = encoder(made).states([[1, 2, 3], [2, 1, 3], [9, 1, 2, 3]])
    assert (one - turned).abs().max() > 1e-3
    assert (one - later).abs().max() > 1e-3


def test_items_are_rows_of_the_embedding(made: Networks) -> None:
    assert torch.equal(encoder(made).items([36, 0]), made.sasrec.item_embeddings.weight[[36, 0]])


SPOILT: dict[str, tuple[Change, type[AdapterError], str]] = {
    "a missing tensor": (drop("ln_2.bias"), MissingTensorError, r"'sasrec\.ln_2\.bias'"),
    "one too many": (put("s_fc.weight", torch.ones(1)), UnmatchedTensorError, r"'sasrec\.s_fc\.weight'"),
    "other items": (put("item_embeddings.weight", torch.ones(37, 64)), ShapeError, r"\[37, 64\], expected \[38, 64\]"),
    "whole numbers": (put("ln_1.bias", torch.ones(64, dtype=torch.int64)), ShapeError, "int64"),
    "NaN": (poison("mh_attn.linear_q.weight", torch.nan), NonFiniteError, r"linear_q\.weight"),
}


@pytest.mark.parametrize(("change", "error", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_other_tensors_are_refused(made: Networks, change: Change, error: type[AdapterError], message: str) -> None:
    tensors = weights(made)
    change(tensors)
    with pytest.raises(error, match=message):
        Sasrec(tensors, ITEMS, HISTORY_LENGTH)


# ------------------------------------------------------------------------------------------------- official weights


def rows(lastfm: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (lastfm / "test.jsonl").read_text().splitlines()]


def official(lastfm: Path) -> tuple[Mapping[str, torch.Tensor], Sasrec]:
    tensors = load_file(lastfm / "sasrec_lastfm.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("s_fc.")}
    return tensors, Sasrec(kept, items=4606, history_length=10)


def test_golden_state_of_the_official_weights(lastfm: Path) -> None:
    row = next(row for row in rows(lastfm) if row["len_seq"] >= 3)
    (state_D,) = official(lastfm)[1].states([row["seq"][: row["len_seq"]]])
    golden = TOLERANCES["golden user state", torch.float32]
    golden.assert_close(state_D[:6], torch.tensor([3.84680, -0.0, -3.77420, -0.0, -6.52949, -0.00048]))
    golden.assert_close(torch.linalg.vector_norm(state_D), torch.tensor(38.7159), magnitude=torch.tensor(100.0))


def test_every_test_user_has_the_state_of_the_formulas(lastfm: Path) -> None:
    tensors, encoder = official(lastfm)
    module, users = SasrecModule(4606, 10), rows(lastfm)
    module.load_state_dict(tensors)
    lengths = [row["len_seq"] for row in users]
    with torch.no_grad():
        expected_ND = module(torch.tensor([row["seq"] for row in users]), torch.tensor(lengths))
    actual_ND = encoder.states([row["seq"][:length] for row, length in zip(users, lengths, strict=True)])
    norm_N1 = torch.linalg.vector_norm(expected_ND, dim=1, keepdim=True)
    STATE.assert_close(actual_ND, expected_ND, magnitude=norm_N1.expand_as(expected_ND))
