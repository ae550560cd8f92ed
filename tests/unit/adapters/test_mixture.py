"""TIES and DARE-TIES against PEFT's own merge of the same adapters, and what cannot be mixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import peft.utils.merge_utils as peft_merges
import pytest
import torch
from peft import LoraConfig, get_peft_model

from motet.adapters.effects import GateSpec, Lowered, LowRank, OutputBias, TargetEffects
from motet.adapters.errors import GateError
from motet.adapters.mixture import MOST_PARTS, MergeMethod, merged, obstacle, require_weights
from tests.support.models import FAMILIES
from tests.support.tolerances import TOLERANCES

TARGETS = ["q_proj", "down_proj"]
SCALE = 1.5


@pytest.fixture(scope="module")
def model() -> Any:
    """PEFT's model with three adapters of rank 4, their weights random."""
    config = LoraConfig(r=4, lora_alpha=4 * SCALE, target_modules=TARGETS)
    made = get_peft_model(FAMILIES["llama"](), config, adapter_name="0")
    made.add_adapter("1", config)
    made.add_adapter("2", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return made


def layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def lowered(model: Any, adapter: str) -> Lowered:
    effects = {
        name: TargetEffects(
            LowRank(layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach() * SCALE)
        )
        for name, layer in layers(model).items()
    }
    return Lowered("lora", "PEFT folder", "alpha/r", effects, len(effects))


def expected(model: Any, weights: Sequence[float], method: str, density: float) -> dict[str, torch.Tensor]:
    """Target → ΔW [O, I] as PEFT merges it."""
    names = [str(place) for place in range(len(weights))]
    model.add_weighted_adapter(names, list(weights), "mixed", combination_type=method, density=density)
    found = {name: layer.get_delta_weight("mixed").detach() for name, layer in layers(model).items()}
    model.delete_adapter("mixed")
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 1.3), (1.0, -0.5, 0.25)])
@pytest.mark.parametrize("density", [0.2, 0.55])
def test_ties_is_pefts(model: Any, weights: tuple[float, ...], density: float) -> None:
    mixed = merged([lowered(model, str(place)) for place in range(3)], weights, "ties", density)
    for name, delta_OI in expected(model, weights, "ties", density).items():
        pair = mixed.effects[name].low_rank
        assert pair is not None
        assert pair.rank == 4
        TOLERANCES["merged", torch.float32].assert_close(pair.b_OR @ pair.a_RI, delta_OI)
        assert delta_OI.any()


def test_dare_ties_is_pefts_with_the_same_choice(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT draws from torch's global generator, all A's of a layer and then all B's; so do we, from our own."""
    masks: dict[tuple[str, str, int], torch.Tensor] = {}
    queue: list[torch.Tensor] = []

    def drop(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        return tensor * queue.pop(0) / density

    weights, density = (0.7, -0.2, 1.3), 0.5
    random = torch.Generator().manual_seed(11)
    parts = [lowered(model, str(place)) for place in range(3)]
    for target in sorted(parts[0].effects):
        for letter in ("a_RI", "b_OR"):
            for place, part in enumerate(parts):
                chances = torch.full_like(getattr(part.effects[target].low_rank, letter), density)
                masks[target, letter, place] = torch.bernoulli(chances, generator=random)
    queue += [masks[name, letter, place] for name in layers(model) for letter in ("a_RI", "b_OR") for place in range(3)]
    monkeypatch.setattr(peft_merges, "random_pruning", drop)
    mixed = merged(parts, weights, "dare_ties", density, seed=11)
    for name, delta_OI in expected(model, weights, "dare_ties", density).items():
        pair = mixed.effects[name].low_rank
        assert pair is not None
        TOLERANCES["merged", torch.float32].assert_close(pair.b_OR @ pair.a_RI, delta_OI)
    assert not queue
    again, other = (merged(parts, weights, "dare_ties", density, seed=seed) for seed in (11, 12))
    target = next(iter(mixed.effects))
    assert torch.equal(_a(again, target), _a(mixed, target))
    assert not torch.equal(_a(other, target), _a(mixed, target))


def test_one_adapter_of_full_density_stays_what_it_is(model: Any) -> None:
    part = lowered(model, "0")
    mixed = merged([part], [1.0], "ties", 1.0)
    assert all(torch.equal(_a(mixed, name), _a(part, name)) for name in part.effects)


def test_targets_of_some_adapters_only(model: Any) -> None:
    part, other = lowered(model, "0"), lowered(model, "1")
    name, *_ = other.effects
    fewer = Lowered("lora", "", "", {name: other.effects[name]}, 1)
    mixed = merged([part, fewer], [1.0, 1.0], "ties", 1.0)
    assert mixed.effects.keys() == part.effects.keys()
    untouched = next(target for target in part.effects if target != name)
    assert torch.equal(_a(mixed, untouched), _a(part, untouched))


@pytest.mark.parametrize("density", [0, -0.1, 1.01, math.nan])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_impossible_density(model: Any, density: float, method: MergeMethod) -> None:
    with pytest.raises(GateError, match="density is") as refused:
        merged([lowered(model, "0")], [1.0], method, density)
    assert refused.value.field == "density"


def test_ranks_that_differ(model: Any) -> None:
    part = lowered(model, "0")
    name = next(iter(part.effects))
    pair = part.effects[name].low_rank
    assert pair is not None
    narrow = Lowered("lora", "", "", {name: TargetEffects(LowRank(pair.a_RI[:3], pair.b_OR[:, :3]))}, 1)
    with pytest.raises(GateError, match=r"ties needs adapters of one rank; on .* they have 3, 4"):
        merged([part, narrow], [1.0, 1.0], "ties", 0.5)


@pytest.mark.parametrize("weights", [[], [1.0] * (MOST_PARTS + 1), [math.nan], [1.0, 9.0], [-math.inf]])
def test_impossible_weights(weights: list[float]) -> None:
    with pytest.raises(GateError, match=r"possible|must be between"):
        require_weights(weights)


def test_what_cannot_be_mixed(model: Any) -> None:
    part = lowered(model, "0")
    name = next(iter(part.effects))
    biased = TargetEffects(part.effects[name].low_rank, bias=OutputBias(torch.ones(3)))
    gated = Lowered("ilora", "", "", part.effects, 1, gate=GateSpec("router", 2, {}))
    overlaid = Lowered("full-model", "", "", {}, 0, overlays={"model.norm.weight": torch.ones(2)})
    assert obstacle(Lowered("lora", "", "", {name: biased}, 1)) == "it is more than low-rank pairs"
    assert obstacle(overlaid) == "it is more than low-rank pairs"
    assert obstacle(gated) == "it needs a gate of its own"
    assert obstacle(part) is None


def _a(adapter: Lowered, target: str) -> torch.Tensor:
    pair = adapter.effects[target].low_rank
    assert pair is not None
    return pair.a_RI
