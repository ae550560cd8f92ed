"""Which modules of a model are targets: the ends too, unless their width would cut the arena into crumbs."""

from __future__ import annotations

import pytest
from torch import nn

from motet.adapters.base import Kind
from motet.server.model.base import targets_of

BODY = {"q": (576, 576), "k": (576, 192), "up": (576, 1536), "down": (1536, 576)}


def ends(vocabulary: int) -> tuple[dict[str, nn.Linear], tuple[str, nn.Embedding]]:
    """SmolLM2's widths with another vocabulary; the head stands in the middle."""
    widths = {**dict(list(BODY.items())[:2]), "head": (576, vocabulary), **dict(list(BODY.items())[2:])}
    linears = {path: nn.Linear(*shape, bias=False, device="meta") for path, shape in widths.items()}
    return linears, ("tokens", nn.Embedding(vocabulary, 576, device="meta"))


@pytest.mark.parametrize("vocabulary", [49152, 32000, 151936, 262144, 50272])
def test_the_ends_are_the_last_targets(vocabulary: int) -> None:
    linears, embedding = ends(vocabulary)
    targets, others = targets_of(linears, embedding, "head")
    assert list(targets) == [*BODY, "tokens", "head"]
    assert [target.index for target in targets.values()] == list(range(6))
    assert [target.kind for target in targets.values()] == [*[Kind.LINEAR] * 4, Kind.EMBEDDING, Kind.HEAD]
    assert (targets["tokens"].in_width, targets["tokens"].out_width) == (vocabulary, 576)
    assert (targets["head"].in_width, targets["head"].out_width) == (576, vocabulary)
    assert others == {}


@pytest.mark.parametrize("vocabulary", [50257, 49155, 32001, 32004])
def test_an_odd_vocabulary_leaves_both_out(vocabulary: int) -> None:
    linears, embedding = ends(vocabulary)
    targets, others = targets_of(linears, embedding, "head")
    assert list(targets) == list(BODY)
    assert others.keys() == {"tokens", "head"}
    assert all(f"vocabulary of {vocabulary:,}" in reason for reason in others.values())


def test_an_embedding_that_does_more_than_look_up_is_none() -> None:
    linears, _ = ends(49152)
    targets, others = targets_of(linears, None, "head")
    assert list(targets) == [*BODY, "head"]
    assert others == {}
