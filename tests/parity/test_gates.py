"""Gates of requests: many different ones in one batch, each row what a dense merge with its own factors gives."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from motet.server.engine.types import GivenInput
from tests.support.harness import GREEDY, Harness, Using
from tests.support.layouts import make
from tests.support.layouts_amt import PoolLayout, amt
from tests.support.layouts_ilora import GatedLayout, ilora
from tests.support.models import FAMILIES, VOCABULARY, reference_copy
from tests.support.tolerances import TOLERANCES

MIXABLE = ("lora-all", "rslora", "pissa", "polar", "some-layers")
OTHERS = ("dora", "s2ft", "lisa-frozen-embedding")


@dataclass
class Gated:
    """A family with gated adapters and plain ones, and what each combination means."""

    harness: Harness
    reference: Any
    users: GatedLayout
    pool: PoolLayout
    deltas: dict[str, dict[str, torch.Tensor]]
    oracles: dict[str, Any]

    def mixed(self, parts: Sequence[tuple[str, float]]) -> Any:
        """The dense model of a weighted sum."""
        model = copy.deepcopy(self.reference)
        with torch.no_grad():
            for name, weight in parts:
                for target, delta_OI in self.deltas[name].items():
                    weight_OI = model.get_submodule(target).weight
                    weight_OI.copy_(weight_OI.double() + weight * delta_OI)
        return model


@pytest.fixture(scope="module", params=list(FAMILIES))
def gated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    model = FAMILIES[request.param]()
    reference, root = reference_copy(model), tmp_path_factory.mktemp("gated")
    layouts = {name: make(name, reference, root / name, 3) for name in (*MIXABLE, *OTHERS)}
    users, pool = ilora(reference, root / "users"), amt()(reference, root / "pool", 5)
    harness = Harness(model, blocks=2048, rows=256, generations=512)
    for name, layout in layouts.items():
        harness.load(name, layout.folder, layout.declared)
    harness.load("users", users.folder)
    harness.load("pool", pool.folder)
    deltas = {name: dict(layouts[name].deltas_OI) for name in MIXABLE}
    yield Gated(harness, reference, users, pool, deltas, {name: layouts[name].oracle for name in OTHERS})
    assert harness.pool.spare == harness.pool.size
    assert all(info.leases == 0 for info in harness.registry.published())


def factors(chance: random.Random, count: int) -> tuple[float, ...]:
    """Not negative, with a sum of one in float64."""
    values = [chance.expovariate(1) for _ in range(count)]
    return tuple(value / sum(values) for value in values)


@torch.no_grad()
def expected(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(prompt)])).logits[0, -1].float()  # type: ignore[no-any-return]


def check(gated: Gated, asked: Sequence[tuple[Sequence[int], Using, Callable[[], Any]]]) -> None:
    """All in one batch; each row beside its own oracle."""
    found = gated.harness.logits([(prompt, using) for prompt, using, _ in asked])
    for actual, (prompt, _, oracle) in zip(found, asked, strict=True):
        TOLERANCES["logits", torch.float32].assert_close(actual, expected(oracle(), prompt))


def test_hundreds_of_gates_in_one_batch(gated: Gated) -> None:
    """Users, merges of a pool, mixtures, other methods and the base, one request of each."""
    chance = random.Random(1)
    asked: list[tuple[Sequence[int], Using, Callable[[], Any]]] = []
    for number in range(240):
        prompt = [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 5))]
        if number % 4 == 0:
            alpha = factors(chance, 4)
            asked.append((prompt, [("pool", alpha)], lambda alpha=alpha: gated.pool.oracle(alpha)))
        elif number % 4 == 1:
            parts = [(name, chance.uniform(-0.5, 1.5)) for name in chance.sample(MIXABLE, chance.randint(1, 3))]
            using = [(name, (weight,)) for name, weight in parts]
            asked.append((prompt, using, lambda parts=parts: gated.mixed(parts)))
        elif number % 24 == 2:
            name = chance.choice(OTHERS)
            asked.append((prompt, name, lambda name=name: gated.oracles[name]))
        elif number % 24 == 3:
            asked.append((prompt, None, lambda: gated.reference))
        else:
            omega = factors(chance, 4)
            asked.append((prompt, [("users", omega)], lambda omega=omega: gated.users.oracle(omega)))
    chance.shuffle(asked)
    check(gated, asked)


def test_the_gate_matters(gated: Gated) -> None:
    """Otherwise the comparison above would mean little."""
    prompt = [5, 6, 7]
    one, other = (expected(gated.users.oracle(omega), prompt) for omega in ((1, 0, 0, 0), (0, 0, 1, 0)))
    assert (one - other).abs().max() > 100 * TOLERANCES["logits", torch.float32].atol


def test_one_prompt_with_many_gates_shares_no_keys(gated: Gated) -> None:
    """The prompt is longer than a cache block; each gate's keys are its own, whether it comes first or again."""
    chance, prompt = random.Random(2), list(range(3, 43))
    for _ in range(6):
        omega, alpha = factors(chance, 4), factors(chance, 4)
        for _ in range(2):
            check(
                gated,
                [
                    (prompt, [("users", omega)], lambda omega=omega: gated.users.oracle(omega)),
                    (prompt, [("pool", alpha)], lambda alpha=alpha: gated.pool.oracle(alpha)),
                ],
            )


def test_a_mixture_generates_what_its_dense_sum_generates(gated: Gated) -> None:
    parts = [("lora-all", 0.7), ("pissa", 0.6)]
    prompt = list(range(3, 12))
    (made,) = gated.harness.run([(prompt, [(name, (weight,)) for name, weight in parts])])
    model = gated.mixed(parts)
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=len(made.tokens), do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert made.tokens == generated[0, len(prompt) :].tolist()


def test_an_adapter_twice_in_a_mixture_counts_twice(gated: Gated) -> None:
    check(gated, [([9, 8], [("polar", (0.5,)), ("polar", (0.5,))], lambda: gated.mixed([("polar", 1.0)]))])


def test_weights_of_zero_are_the_base(gated: Gated) -> None:
    found = gated.harness.logits([([4, 5], [("rslora", (0.0,))]), ([4, 5], None)])
    assert torch.equal(found[0], found[1])


def test_a_one_hot_gate_is_one_slice(gated: Gated) -> None:
    check(gated, [([4, 5], [("users", (0.0, 1.0, 0.0, 0.0))], lambda: gated.users.oracle((0, 1, 0, 0)))])


@torch.no_grad()
def test_given_rows_stand_in_the_place_of_embeddings(gated: Gated) -> None:
    """Against the model's own forward from embeddings; again with the same keys, and with others at the same tokens."""
    harness, prompt, embed = gated.harness, list(range(3, 30)), gated.reference.get_input_embeddings()
    rows = torch.randn(3, gated.reference.config.hidden_size, generator=torch.Generator().manual_seed(4))
    for places, omega in (
        ((2, 9), (0.4, 0.3, 0.2, 0.1)),
        ((2, 9), (0.1, 0.2, 0.3, 0.4)),
        ((9, 2), (0.4, 0.3, 0.2, 0.1)),
    ):
        given = {place: GivenInput(number, rows[number]) for number, place in enumerate(places)}
        embeds = embed(torch.tensor([prompt]))
        for place, one in given.items():
            embeds[0, place] = one.values
        logits = gated.users.oracle(omega)(inputs_embeds=embeds).logits[0, -1].float()
        for _ in range(2):
            (made,) = harness.run([(prompt, [("users", omega)])], replace(GREEDY, max_tokens=1), given=[given])
            TOLERANCES["logits", torch.float32].assert_close(made.logits[0], logits)


@torch.no_grad()
def test_features_are_what_the_head_reads(gated: Gated) -> None:
    """The state after the last norm at the prompt's last token, whoever else is in the batch; others report none."""
    alpha = (0.5, 0.25, 0.25, 0.0)
    asked: list[tuple[Sequence[int], Using]] = [([4, 5, 6], [("pool", alpha)]), ([7] * 20, None), ([8, 9], "dora")]
    drawing = replace(GREEDY, max_tokens=3)
    samplings = [replace(drawing, feature=True), drawing, replace(drawing, max_tokens=0, feature=True)]
    made = gated.harness.run(asked, samplings=samplings)
    assert [len(result.tokens) for result in made] == [3, 3, 0]
    assert made[1].tokens == gated.harness.run(asked[1:2], drawing)[0].tokens
    for result, (prompt, _), oracle in zip(
        made, asked, (gated.pool.oracle(alpha), None, gated.oracles["dora"]), strict=True
    ):
        features = [event.feature for event in result.events]
        assert [feature is None for feature in features] == [oracle is None, True, True][: len(features)]
        if oracle is not None:
            head_inputs: list[torch.Tensor] = []
            head = oracle.get_output_embeddings()
            handle = head.register_forward_pre_hook(lambda _, inputs, into=head_inputs: into.append(inputs[0][0, -1]))
            oracle(input_ids=torch.tensor([list(prompt)]))
            handle.remove()
            TOLERANCES["logits", torch.float32].assert_close(features[0], head_inputs[0])


def test_a_row_does_not_depend_on_its_neighbours_gates(gated: Gated) -> None:
    chance, prompt = random.Random(3), list(range(3, 20))
    mine = (prompt, [("users", (0.1, 0.2, 0.3, 0.4))])
    alone = gated.harness.logits([mine])[0]
    crowd: list[tuple[Sequence[int], Using]] = [([7, 8], [("users", factors(chance, 4))]) for _ in range(30)]
    among = gated.harness.logits([*crowd[:15], mine, *crowd[15:]])[15]
    TOLERANCES["logits", torch.float32].assert_close(among, alone)


def test_without_tokens_to_draw_the_head_computes_nothing(gated: Gated) -> None:
    """Features alone: the head of a large vocabulary is a tenth of a short prompt's work."""
    head, rows = gated.harness.loaded.model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda *seen: rows.append(seen[-1].shape[-2]))
    asked: list[tuple[Sequence[int], Using]] = [([4, 5, 6], "dora"), ([7] * 20, None), ([8, 9], None)]
    feature = replace(GREEDY, max_tokens=0, feature=True)
    made = gated.harness.run(asked, samplings=[feature, feature, replace(GREEDY, max_tokens=1)])
    only = gated.harness.run(asked, feature)
    handle.remove()
    assert rows == [1, 0]
    for one, other in zip(made[:2], only, strict=False):
        TOLERANCES["logits", torch.float32].assert_close(one.events[0].feature, other.events[0].feature)


def test_members_that_never_moved_are_the_base_bit_by_bit(tmp_path: Path) -> None:
    """Each member is its start, (B_0, A_0): whatever α, no weight changes."""
    model = next(iter(FAMILIES.values()))()
    file = amt()(model, tmp_path / "pool", 5).folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        tensors[key] = tensors[re.sub(r"\.(\d+|initial)\.weight$", ".initial.weight", key)].clone()
    save_file(tensors, file)
    harness = Harness(model)
    harness.load("pool", file.parent)
    usings: list[Using] = [[("pool", (0.5, 0.25, 0.25, 0.0))], None]
    merged, base = (harness.logits([([4, 5, 6], using)]) for using in usings)
    assert torch.equal(merged, base)


def test_a_feature_that_overflows_is_an_error(gated: Gated) -> None:
    """No logits tell, where nothing is drawn."""
    asked: list[tuple[Sequence[int], Using]] = [([4, 5], [("rslora", (1e38,))]), ([4, 5], None)]
    broken, fine = gated.harness.run(asked, replace(GREEDY, max_tokens=0, feature=True))
    assert "'rslora' computed NaN or infinity" in (broken.events[-1].error or "")
    assert (fine.events[-1].error, fine.events[-1].finish) == (None, "length")
