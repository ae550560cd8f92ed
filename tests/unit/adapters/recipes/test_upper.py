"""The last layers on kept states compute what the whole model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.recipes.corpus import Corpus
from motet.adapters.recipes.forward import answer_logits
from motet.adapters.recipes.tasks import TASKS, examples
from motet.adapters.recipes.upper import cut
from tests.support.models import tiny_llama
from tests.support.tokenizer import byte_tokenizer
from tests.support.tolerances import TOLERANCES

CLOSE = TOLERANCES["logits", torch.float32]


def deep() -> Any:
    return tiny_llama(num_hidden_layers=4, vocab_size=320, max_position_embeddings=512)


@pytest.fixture
def corpus(data: Path) -> Corpus:
    return Corpus.of(byte_tokenizer(), examples(TASKS["wikisql"], data, "train")[:20])


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_logits_and_labels_are_those_of_the_whole_model(corpus: Corpus, prefixed: bool) -> None:
    """The oracle: the whole model on one row at a time, all of its tokens."""
    if not prefixed:
        corpus = Corpus([], [(corpus.prefix + asked, told) for asked, told in corpus.rows])
    assert bool(corpus.prefix) == prefixed
    model, whole = deep(), deep().eval()
    kept = cut(model, corpus, 3)
    assert len(model.model.layers) == 3
    numbers = [19, 0, 7]
    with torch.no_grad():
        logits_NV, labels_N = answer_logits(model.eval(), kept.prefix, kept.batch(numbers))
        expected = []
        for asked, told in (corpus.rows[number] for number in numbers):
            first = len(corpus.prefix) + len(asked) - 1
            logits = whole(input_ids=torch.tensor([corpus.prefix + asked + told])).logits[0]
            expected.append(logits[first : first + len(told)])
    assert labels_N.tolist() == [token for number in numbers for token in corpus.rows[number][1]]
    CLOSE.assert_close(logits_NV, torch.cat(expected))


def test_the_last_layers_get_the_gradients_of_the_whole_model(corpus: Corpus) -> None:
    model, whole = deep(), deep()
    kept = cut(model, corpus, 2)
    for each, rows in ((model, kept), (whole, corpus)):
        torch.nn.functional.cross_entropy(*answer_logits(each, rows.prefix, rows.batch(range(6)))).backward()
    for ours, theirs in zip(model.model.layers, whole.model.layers[2:], strict=True):
        expected = theirs.self_attn.q_proj.weight.grad
        CLOSE.assert_close(ours.self_attn.q_proj.weight.grad, expected)
    assert model.model.embed_tokens.weight.grad is None, "the states are constants"


def test_a_batch_is_of_the_same_rows_in_the_same_order(corpus: Corpus) -> None:
    kept = cut(deep(), corpus, 1)
    assert list(kept.draws(5, 4, 0)) == list(corpus.draws(5, 4, 0))
