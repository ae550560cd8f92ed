"""Merges of real pools on a real engine: α against loops over dense members, made once, forgotten in time."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.errors import AdapterNotFoundError, GateError, VersionNotServedError
from motet.server.api import merging as merging_module
from motet.server.api.merged import Ask
from motet.server.api.scoring import Question, ScoringError
from tests.support.layouts_amt import amt
from tests.support.models import load_dense
from tests.support.tolerances import TOLERANCES
from tests.unit.server.api.merging_rig import TOKENIZER, Rig, cosine, features, playing, write_pools

SUPPORT = (("the quick brown fox", "a"), ("one two", "b"), ("the lazy dog then", "a"), ("1, 2, 3!", "b"), ("over", "c"))
SERVED = TOLERANCES["scores of served features", torch.float32]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merging")
    write_pools(root)
    return root


@pytest.fixture
def during(root: Path) -> Callable[[Callable[[Rig], Awaitable[None]]], None]:
    """Plays a scenario in an event loop of its own; at the end nothing may be leased."""
    return lambda scenario: asyncio.run(playing(root, scenario))


def test_scores_with_an_augmented_view(during: Any, root: Path, tmp_path: Path) -> None:
    """The class means are of the support as it is, what is compared with them is its view with tokens left out."""

    oracle = amt()(load_dense(root / "base", torch.float32), tmp_path / "again", 5).oracle

    async def scenario(rig: Rig) -> None:
        ask = Ask(SUPPORT, top_k=2, beta=9.0, gamma=0.35, seed=3)
        merged = await rig.merging.make("pool", ask, 60)
        assert merged.scores is not None
        given = [TOKENIZER(text)["input_ids"] for text, _ in SUPPORT]
        members = [rig.scorer.prompts[at : at + 10] for at in range(0, 40, 10)]
        assert members == [members[0]] * 4
        assert members[0][:5] == given
        views = members[0][5:]
        assert views != given
        for view, whole in zip(views, given, strict=True):
            left = iter(whole)
            assert all(token in left for token in view), "a view has a token that the example lacks"
        labels = [label for _, label in SUPPORT]
        scores = []
        for member in range(4):
            dense = oracle([float(member == other) for other in range(4)])
            clean, seen = features(dense, given), features(dense, views)
            centre = {}
            for label in "abc":
                rows = [row for row, own in zip(clean, labels, strict=True) if own == label]
                centre[label] = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
            intra = inter = 0.0
            for row, own in zip(seen, labels, strict=True):
                share = 1 / (3 * labels.count(own))
                intra += share * cosine(row, centre[own])
                inter += share * sum(cosine(row, centre[label]) for label in "abc" if label != own) / 2
            found = (merged.scores.intra_P[member], merged.scores.inter_P[member])
            SERVED.assert_close(torch.tensor(found), torch.tensor([intra, inter]))
            scores.append(0.35 * intra - 0.65 * inter)
        best = sorted(range(4), key=lambda member: -scores[member])[:2]
        powers = {member: math.exp(9.0 * scores[member]) for member in best}
        expected = [powers.get(member, 0) / sum(powers.values()) for member in range(4)]
        TOLERANCES["weights of served features", torch.float32].assert_close(
            torch.tensor(merged.alpha), torch.tensor(expected)
        )

    during(scenario)


def test_equal_members_share_alike(during: Any) -> None:
    async def scenario(rig: Rig) -> None:
        for top_k in (1, 2, 4):
            merged = await rig.merging.make("equal", Ask(SUPPORT, top_k=top_k, beta=5.0), 60)
            assert sum(alpha > 0 for alpha in merged.alpha) == top_k
            for alpha in merged.alpha:
                assert alpha == 0 or alpha == pytest.approx(1 / top_k, abs=1e-5)

    during(scenario)


def test_members_that_never_moved_are_the_base(during: Any) -> None:
    async def scenario(rig: Rig) -> None:
        prompts = [TOKENIZER(text)["input_ids"] for text, _ in SUPPORT]
        base_SD = await rig.scorer.features([Question(prompt, lambda: ()) for prompt in prompts])
        merged = await rig.merging.make("unmoved", Ask(SUPPORT), 60)
        centre_D = (base_SD[0].double() + base_SD[2].double()).div(2).float()
        assert torch.equal(merged.prototypes_CD[0], centre_D)
        assert torch.equal(merged.prototypes_CD[2], base_SD[4])

    during(scenario)


def test_asked_for_by_many_and_made_once(during: Any) -> None:
    async def scenario(rig: Rig) -> None:
        asks = [asyncio.create_task(rig.merging.make("pool", Ask(SUPPORT), life)) for life in (10, 30, 20)]
        impatient = asyncio.create_task(rig.merging.make("pool", Ask(SUPPORT), 99))
        await asyncio.sleep(0)
        impatient.cancel()
        made = [await ask for ask in asks]
        assert len(rig.scorer.prompts) == (4 + 1) * len(SUPPORT)
        assert len({one.name for one in made}) == 1
        assert rig.merging.get(made[0].name).expires_s == 1030
        await rig.merging.make("pool", Ask(SUPPORT), 5)
        assert len(rig.scorer.prompts) == (4 + 1) * len(SUPPORT)
        assert rig.merging.get(made[0].name).expires_s == 1030
        await rig.merging.make("pool", Ask(SUPPORT, gamma=0.5), 5)
        assert len(rig.scorer.prompts) == 2 * (4 + 1) * len(SUPPORT)

    during(scenario)


def test_nobody_is_left_to_hear_of_it(during: Any) -> None:
    """Whoever asked went away: the work ends by itself, whether it succeeds or fails, and holds nothing afterwards."""

    async def scenario(rig: Rig) -> None:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        for rig.scorer.failing in (False, True):
            gone = asyncio.create_task(rig.merging.make("pool", Ask(SUPPORT), 60))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            await rig.nothing_is_held()
            assert rig.merging.of("pool") == []
        gc.collect()
        assert complaints == []

    during(scenario)


def test_a_failure_is_not_remembered(during: Any) -> None:
    async def scenario(rig: Rig) -> None:
        rig.scorer.failing = True
        asks = [rig.merging.make("pool", Ask(SUPPORT), 60) for _ in range(3)]
        failures = await asyncio.gather(*asks, return_exceptions=True)
        assert [type(failure) for failure in failures] == [ScoringError] * 3
        assert len(rig.scorer.prompts) <= 4 * len(SUPPORT)
        assert rig.scorer.running == 0
        rig.scorer.failing = False
        assert (await rig.merging.make("pool", Ask(SUPPORT), 60)).labels == ("a", "b", "c")

    during(scenario)


def test_a_version_of_a_pool_may_be_asked_for(during: Any) -> None:
    async def scenario(rig: Rig) -> None:
        digest = rig.merging.registry.get("pool").version.digest
        exactly = await rig.merging.make(f"pool@{digest[:12]}", Ask(SUPPORT, weights="uniform"), 60)
        assert exactly.name == (await rig.merging.make("pool", Ask(SUPPORT, weights="uniform"), 60)).name
        with pytest.raises(VersionNotServedError):
            await rig.merging.make(f"pool@{'f' * 12}", Ask(SUPPORT, weights="uniform"), 60)

    during(scenario)


def test_it_expires(during: Any) -> None:
    async def scenario(rig: Rig) -> None:
        merged = await rig.merging.make("pool", Ask(SUPPORT, weights="uniform"), 60)
        rig.now_s = 1059.9
        assert rig.merging.find(merged.name) is not None
        rig.now_s = 1060
        assert rig.merging.find(merged.name) is None
        with pytest.raises(AdapterNotFoundError, match="merge again"):
            rig.merging.get(merged.name)
        again = await rig.merging.make("pool", Ask(SUPPORT, weights="uniform"), 60)
        assert (again.name, again.created_s, again.expires_s) == (merged.name, 1060, 1120)

    during(scenario)


def test_the_one_asked_for_longest_ago_gives_way(during: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging_module, "MOST_MERGES", 2)

    async def scenario(rig: Rig) -> None:
        async def make(first: float) -> str:
            rig.now_s += 1
            weights = (first, 1 - first, 0.0, 0.0)
            return (await rig.merging.make("pool", Ask(SUPPORT, weights=weights), 600)).name

        names = [await make(0.1), await make(0.2)]
        await make(0.1)
        names.append(await make(0.3))
        assert [one.name for one in rig.merging.of("pool")] == [names[0], names[2]]
        assert rig.merging.of("equal") == []

    during(scenario)


def test_a_replaced_pool_takes_its_merges_along(during: Any, root: Path) -> None:
    async def scenario(rig: Rig) -> None:
        registry = rig.service.registry
        merged = await rig.merging.make("pool", Ask(SUPPORT, weights="uniform"), 600)
        registry.load("pool", root / "equal", replace=True)
        with pytest.raises(AdapterNotFoundError):
            await rig.merging.applied(merged)
        with pytest.raises(AdapterNotFoundError):
            await rig.merging.classify(merged, {"input.0": "a"})
        assert rig.merging.find(merged.name) is None
        again = await rig.merging.make("pool", Ask(SUPPORT, weights="uniform"), 600)
        assert again.name != merged.name
        registry.unload("pool")
        assert rig.merging.find(again.name) is None
        with pytest.raises(AdapterNotFoundError):
            rig.merging.of("pool")

    during(scenario)


def test_a_pool_replaced_while_it_is_merged(during: Any, root: Path) -> None:
    """The merge is of the version that was asked, which nobody can reach any more."""

    async def scenario(rig: Rig) -> None:
        making = asyncio.create_task(rig.merging.make("pool", Ask(SUPPORT), 60))
        await asyncio.sleep(0)
        rig.service.registry.load("pool", root / "unmoved", replace=True)
        merged = await making
        with pytest.raises(AdapterNotFoundError):
            await rig.merging.applied(merged)

    during(scenario)


def test_a_large_support_is_in_flight_in_part(during: Any) -> None:
    async def scenario(rig: Rig) -> None:
        rig.merging.in_flight = 7
        support = tuple((f"the fox {number}", str(number % 2)) for number in range(20))
        merged = await rig.merging.make("pool", Ask(support), 60)
        assert rig.scorer.most_running == 7
        assert len(rig.scorer.prompts) == 5 * len(support)
        alone = [await rig.merging.classify(merged, {"input.0": text}) for text, _ in support]
        together_SC, tokens = await rig.merging.classify(
            merged, {str(at): text for at, (text, _) in enumerate(support)}
        )
        SERVED.assert_close(torch.cat([one_1C for one_1C, _ in alone]), together_SC)
        assert tokens == sum(count for _, count in alone)

    during(scenario)


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (Ask(()), "support"),
        (Ask((("x", "a"), ("y", "a"))), "support"),
        (Ask((("x", "a"), ("", "b"))), "support.1.text"),
        (Ask((("x", "a"), ("z" * 41, "b"))), "support.1.text"),
        (Ask(SUPPORT, top_k=5), "top_k"),
        (Ask(SUPPORT, weights=(1.0,)), "weights"),
    ],
)
def test_impossible_asks(during: Any, ask: Ask, field: str) -> None:
    async def scenario(rig: Rig) -> None:
        with pytest.raises(GateError) as error:
            await rig.merging.make("pool", ask, 60)
        assert error.value.field == field
        assert rig.scorer.waves == []

    during(scenario)
