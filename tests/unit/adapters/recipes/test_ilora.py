"""iLoRA: each row by its own user's gate, what trains, what is saved, and a gate that learns to tell users apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.effects import LowRank
from motet.adapters.gates.build import build
from motet.adapters.gates.instance import UserInput
from motet.adapters.methods import lower
from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.errors import DataError, TargetError
from motet.adapters.recipes.ilora import GatedLinear, UserGate, start
from motet.adapters.recipes.items import marker_ids, with_markers
from motet.adapters.recipes.loop import Loop, Schedule
from motet.adapters.recipes.readers import User
from motet.adapters.recipes.router_network import RouterNetwork
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import TASKS
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.recipes.users import encoder
from motet.adapters.source import read
from tests.support.bases import base_of
from tests.support.ilora_modules import RouterModule, SasrecModule, look_trained
from tests.support.layouts_ilora import HISTORY_LENGTH, ITEMS
from tests.support.models import ALL_LINEARS
from tests.support.tokenizer import byte_tokenizer
from tests.support.tolerances import TOLERANCES

IDS = torch.tensor([[5, 17, 4, 101, 33, 9, 250, 7]])
LOGITS = TOLERANCES["logits", torch.float32]
USERS = [User(history, ()) for history in ((3, 4, 5), (30, 2, 9, 11, 0, 36), (7,) * HISTORY_LENGTH)]
RANK, ALPHA, SCALE = 8, 12, 6.0


def begun(base: Base, data: Path, *targets: str, rank: int = RANK, experts: int = 4) -> Trainee:
    torch.manual_seed(0)
    sasrec = encoder([TASKS["lastfm"]], data)
    setup = Setup(
        base.model,
        RECIPES["ilora"],
        rank,
        ALPHA,
        targets or tuple(ALL_LINEARS),
        "public/name",
        list,
        encoder=lambda: sasrec,
        markers=lambda: marker_ids(base.tokenizer),
    )
    return start(setup, experts)


def shaken(trainee: Trainee) -> Trainee:
    """All that is trained and kept far from its start, and users far from each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainee.trainable.items():
            if not name.startswith("router."):
                parameter.normal_(std=0.1, generator=generator)
    router = look_trained(RouterModule(4), 2)
    assert isinstance(router, RouterModule)
    own: UserGate = trainee.model.user_gate
    router.tell_apart(own._sasrec.states([(n, n + 1, n + 2) for n in range(ITEMS - 2)]))
    own.router.load_state_dict(router.state_dict())
    return trainee


def told(trainee: Trainee, users: Sequence[User]) -> Any:
    assert trainee.for_users is not None
    model = trainee.model.eval()
    trainee.for_users(users)
    return model


@torch.no_grad()
def logits(trainee: Trainee, users: Sequence[User]) -> torch.Tensor:
    return told(trainee, users)(IDS.expand(len(users), -1)).logits  # type: ignore[no-any-return]


@torch.no_grad()
def oracle_factors(trainee: Trainee, data: Path, history: tuple[int, ...]) -> list[float]:
    """ω by the tests' own networks."""
    sasrec, router = SasrecModule(ITEMS, HISTORY_LENGTH), RouterModule(4)
    sasrec.load_state_dict(load_file(data / "rec" / "lastfm" / "sasrec_lastfm.safetensors"))
    router.load_state_dict(trainee.model.user_gate.router.state_dict())
    padded = torch.tensor([[*history, *[ITEMS] * (HISTORY_LENGTH - len(history))]])
    return router.eval()(sasrec.eval()(padded, torch.tensor([len(history)])))[0].tolist()  # type: ignore[no-any-return]


def test_the_start_is_the_base_for_every_user(base: Callable[[], Base], data: Path) -> None:
    with torch.no_grad():
        before = base().model.eval()(IDS).logits
    LOGITS.assert_close(logits(begun(base(), data), USERS), before.expand(3, -1, -1))


def test_each_row_is_the_dense_model_of_its_own_user(base: Callable[[], Base], data: Path) -> None:
    """The oracle: W + s Σ_k ω_k B_k A_k, expert by expert, in a plain model for each user."""
    trainee = shaken(begun(base(), data))
    together = logits(trainee, USERS)
    spread = []
    for row, user in enumerate(USERS):
        omega = oracle_factors(trainee, data, user.history)
        dense = base().model.eval()
        for path, module in trainee.model.named_modules():
            if isinstance(module, GatedLinear):
                weight = dense.get_submodule(path).weight.data
                for expert, share in enumerate(omega):
                    part = slice(2 * expert, 2 * expert + 2)
                    weight += SCALE * share * (module.b_OR[:, part] @ module.a_RI[part]).detach()
        with torch.no_grad():
            LOGITS.assert_close(together[row : row + 1], dense(IDS).logits)
        LOGITS.assert_close(logits(trainee, [user]), together[row : row + 1])
        spread.append(omega)
    assert float(torch.tensor(spread).std(0).max()) > 0.05
    assert float((together[0] - together[1]).abs().max()) > 100 * LOGITS.atol


def test_one_expert_is_plain_lora_for_every_user(base: Callable[[], Base], data: Path) -> None:
    trainee = begun(base(), data, experts=1)
    dense = base().model.eval()
    for path, module in trainee.model.named_modules():
        if isinstance(module, GatedLinear):
            torch.nn.init.normal_(module.b_OR, std=0.1)
            dense.get_submodule(path).weight.data += ALPHA / RANK * (module.b_OR @ module.a_RI).detach()
    with torch.no_grad():
        LOGITS.assert_close(logits(trainee, USERS), dense(IDS).logits.expand(3, -1, -1))


def test_the_router_is_the_one_that_is_served() -> None:
    router = look_trained(RouterNetwork(5), 4)
    oracle = RouterModule(5)
    oracle.load_state_dict(router.state_dict())
    states = torch.randn(6, 64)
    LOGITS.assert_close(router(states), oracle.eval()(states))


def test_batch_norm_learns_its_statistics_in_training_only(base: Callable[[], Base], data: Path) -> None:
    trainee = begun(base(), data)
    assert len(trainee.kept) == 2 * 19
    before = {name: tensor.clone() for name, tensor in trainee.kept.items()}
    logits(trainee, USERS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainee.kept.items())
    trainee.model.train()
    assert trainee.for_users is not None
    trainee.for_users(USERS)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trainee.kept.items())


def test_only_pairs_the_router_and_the_projector_train(base: Callable[[], Base], data: Path) -> None:
    trainee = shaken(begun(base(), data))
    heard, offered = marker_ids(byte_tokenizer())
    ids_1T = torch.tensor([[5, heard, 17, heard, heard, offered, 9, 250]])
    users = [User((item, item + 1, item + 2), (item,)) for item in (3, 30, 7)]
    told(trainee, users)(ids_1T.expand(3, -1)).logits.square().sum().backward()
    with_gradient = {id(parameter) for parameter in trainee.model.parameters() if parameter.grad is not None}
    assert with_gradient == {id(parameter) for parameter in trainee.trainable.values()}
    assert len(trainee.trainable) == 2 * 7 * 2 + 59 + 4
    for name, parameter in trainee.trainable.items():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any()), name
        if "lora_A" in name:
            assert bool((parameter.grad.reshape(4, -1) != 0).any(1).all()), "every expert"
    assert {trainee.rates.get(name, 1.0) for name in trainee.trainable if name.startswith("router.")} == {0.3}
    assert all(name.startswith("router.") for name in trainee.rates)


@pytest.mark.parametrize("targets", [tuple(ALL_LINEARS), ("q_proj", "v_proj")])
def test_the_importer_finds_every_users_model(
    targets: tuple[str, ...], base: Callable[[], Base], data: Path, tmp_path: Path
) -> None:
    trainee = shaken(begun(base(), data, *targets))
    trainee.round_as_saved(torch.bfloat16)
    trainee.save(tmp_path)
    lowered = lower(read(tmp_path), base_of(base().model))
    assert lowered.form == "iLoRA folder, stored batch-norm statistics"
    assert {path.rpartition(".")[2] for path in lowered.effects} == set(targets)
    assert lowered.gate is not None
    gate = build(lowered.gate)
    omega_NK = gate.factors([UserInput(history=user.history) for user in USERS])  # type: ignore[union-attr, arg-type]
    for user, omega_K in zip(USERS, omega_NK, strict=True):
        merged = base().model.eval()
        for path, effects in lowered.effects.items():
            pair = effects.low_rank
            assert isinstance(pair, LowRank)
            gate_R = omega_K[lowered.gate.groups[path]]
            merged.get_submodule(path).weight.data += pair.b_OR @ (gate_R[:, None] * pair.a_RI)
        with torch.no_grad():
            LOGITS.assert_close(logits(trainee, [user]), merged(IDS).logits)


def test_the_folder_says_what_it_is(base: Callable[[], Base], data: Path, tmp_path: Path) -> None:
    trainee = shaken(begun(base(), data))
    trainee.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "gate.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "ILORA",
        "base_model_name_or_path": "public/name",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": 8,
        "lora_alpha": 12,
        "num_moe": 4,
        "history_length": HISTORY_LENGTH,
        "items": ITEMS,
        "placeholders": {"history": "[HistoryEmb]", "candidates": "[CansEmb]"},
    }
    gate = load_file(tmp_path / "gate.safetensors")
    assert {tensor.dtype for name, tensor in gate.items() if "running" in name or "sasrec" in name} == {torch.float32}
    assert gate["router.gate.fc.weight"].dtype == gate["projector.mlp_proj.2.bias"].dtype == torch.bfloat16
    own = encoder([TASKS["lastfm"]], data)
    assert all(torch.equal(gate[f"sasrec.{name}"], tensor) for name, tensor in own.items())


def test_users_who_ask_the_same_are_answered_apart(base: Callable[[], Base], data: Path) -> None:
    """Only the gate can know: a model blind to users would give all of them the same logits, right for one half."""
    trainee = begun(base(), data)
    users = [User((item, item + 1, item + 2), ()) for item in range(0, 32, 2)]
    rows = [([5, 17, 4], [100 + number % 2]) for number in range(len(users))]
    corpus = Corpus([], rows).personal(users)
    before = factors(trainee, users)
    list(Loop(trainee, corpus, Schedule(80, 1e-2, 16, 0), autocast=False))
    ids = torch.tensor([[5, 17, 4]]).expand(len(users), -1)
    with torch.no_grad():
        logits_NV = told(trainee, users)(ids).logits[:, -1]
    margins_N = (logits_NV[:, 100] - logits_NV[:, 101]) * torch.tensor([1.0, -1.0]).repeat(8)
    assert int((margins_N > 0.1).sum()) >= 15
    assert float(factors(trainee, users).std(0).max()) > 3 * float(before.std(0).max())


@torch.no_grad()
def factors(trainee: Trainee, users: Sequence[User]) -> torch.Tensor:
    gate: UserGate = told(trainee, users).user_gate
    assert gate.factors_NK is not None
    return gate.factors_NK.clone()


def test_a_run_gives_each_row_its_own_history(
    base: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    _, loop = begin(order("ilora"), base(), data)
    assert loop.corpus.prefix == []
    tokenizer = with_markers(base().tokenizer)
    for (asked, _), user in zip(loop.corpus.rows, loop.corpus.users, strict=True):
        assert f"Band {user.history[-1]} [HistoryEmb]\nCandidates" in tokenizer.decode(asked)
        assert sum(token in marker_ids(base().tokenizer) for token in asked) == len(user.history) + len(user.candidates)


def test_a_rank_that_the_experts_do_not_divide_is_refused(base: Callable[[], Base], data: Path) -> None:
    with pytest.raises(TargetError, match="--rank 6 does not split into 4 experts of one size; choose a multiple of 4"):
        begun(base(), data, rank=6)


def test_a_task_without_histories_is_refused(base: Callable[[], Base], order: Callable[..., Order], data: Path) -> None:
    with pytest.raises(DataError, match="--task must be one that has it: lastfm"):
        begin(order("ilora", task="wikisql"), base(), data)
