"""Items in a question: what is read at a marker, and what of it learns."""

from __future__ import annotations

import copy

import pytest
import torch

from motet.adapters.gates.sasrec import Sasrec
from motet.adapters.recipes.items import ItemEmbedding, marker_ids, with_markers
from motet.adapters.recipes.readers import MARKERS, User
from tests.support.ilora_modules import ProjectorModule, SasrecModule, look_trained
from tests.support.layouts_ilora import HISTORY_LENGTH, ITEMS
from tests.support.tokenizer import byte_tokenizer
from tests.support.tolerances import TOLERANCES

WIDTH, HEARD, OFFERED = 12, 20, 21
USERS = [User((3, 4), (9,)), User((30,), (2, 30))]
IDS = torch.tensor([[0, 0, 5, HEARD, 6, HEARD, OFFERED], [HEARD, OFFERED, OFFERED, 7, 8, 0, 0]])


class Case:
    """An embedding and the modules it must agree with."""

    def __init__(self) -> None:
        sasrec = look_trained(SasrecModule(ITEMS, HISTORY_LENGTH), 3)
        tensors = {name: tensor for name, tensor in sasrec.state_dict().items() if not name.startswith("s_fc")}
        self.base = torch.nn.Embedding(20, WIDTH).requires_grad_(False)
        self.own = ItemEmbedding(self.base, Sasrec(tensors, ITEMS, HISTORY_LENGTH), ITEMS, [HEARD, OFFERED])
        self.start = copy.deepcopy(self.own.mlp_proj)
        look_trained(self.own.mlp_proj, 4)
        self.projector = ProjectorModule(WIDTH)
        self.projector.mlp_proj.load_state_dict(self.own.mlp_proj.state_dict())
        self.item_ND = tensors["item_embeddings.weight"]
        self.own.see(USERS)


@torch.no_grad()
def test_items_differ_as_tokens_do_before_anything_is_learnt() -> None:
    case = Case()
    rows_nD = case.start(case.item_ND[:-1])
    assert 0.4 < float(case.start[0](case.item_ND[:-1]).std()) < 0.8, (
        "1 / sqrt(3), by torch's start for inputs of order 1"
    )
    assert float(rows_nD.std(0).mean()) == pytest.approx(float(case.base.weight.std()), rel=1e-4)


@torch.no_grad()
def test_each_marker_is_the_next_item_of_its_own_user() -> None:
    case = Case()
    found_NTD = case.own(IDS)
    rows = {(0, 3): 3, (0, 5): 4, (0, 6): 9, (1, 0): 30, (1, 1): 2, (1, 2): 30}
    for row, ids in enumerate(IDS.tolist()):
        for place, token in enumerate(ids):
            item = rows.get((row, place))
            expected_D = case.base.weight[token] if item is None else case.projector(case.item_ND[item])
            TOLERANCES["user state", torch.float32].assert_close(found_NTD[row, place], expected_D)


def test_an_answer_goes_on_with_tokens_alone() -> None:
    """A base with more rows than its tokenizer has tokens can say what is a marker's id in a question."""
    case = Case()
    case.own(IDS)
    case.own.base_layer = wide = torch.nn.Embedding(OFFERED + 1, WIDTH)
    assert torch.equal(case.own(IDS[:, -1:]), wide(IDS[:, -1:]))


def test_the_projector_learns_and_nothing_else_does() -> None:
    case = Case()
    case.own(IDS).square().sum().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in case.own.mlp_proj.parameters())
    assert case.base.weight.grad is None


def test_each_marker_is_one_token_wherever_it_stands() -> None:
    tokenizer = with_markers(byte_tokenizer())
    heard, offered = marker_ids(byte_tokenizer())
    assert len({heard, offered} | set(byte_tokenizer().get_vocab().values())) == len(byte_tokenizer()) + 2
    ids = tokenizer(f"fox {MARKERS['history']}; the{MARKERS['candidates']}\n")["input_ids"]
    plain = byte_tokenizer()
    pieces = [plain(text)["input_ids"] for text in ("fox ", "; the", "\n")]
    assert ids == [*pieces[0], heard, *pieces[1], offered, *pieces[2]]
