"""Token rows, their order, and the loss that is computed from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from motet.adapters.recipes.corpus import IGNORED, Corpus, chat_ids, packed
from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.forward import answer_losses
from motet.adapters.recipes.readers import User
from motet.adapters.recipes.run import Base
from tests.support.tokenizer import byte_tokenizer
from tests.support.tolerances import TOLERANCES

EXAMPLES = [("What is it?", "a car"), ("What was that, then?", "nothing"), ("Why?", "x"), ("What is red?", "a car too")]


def test_the_common_prefix_and_the_rest_are_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    corpus = Corpus.of(tokenizer, EXAMPLES)
    assert tokenizer.decode(corpus.prefix) == "<user>Wh"
    for (asked, told), (question, answer) in zip(corpus.rows, EXAMPLES, strict=True):
        assert corpus.prefix + asked == chat_ids(tokenizer, question)
        assert tokenizer.decode(told) == answer + "</s>"


def test_the_prefix_leaves_a_token_from_which_the_answer_is_predicted() -> None:
    """Of one question alone everything is common; its first answer token must still be learnt."""
    corpus = Corpus.of(byte_tokenizer(), EXAMPLES[:1] * 2)
    assert [len(asked) for asked, _ in corpus.rows] == [1, 1]


def numbered(lengths: list[int]) -> Corpus:
    """Rows that can be told by their first token."""
    return Corpus([], [([number], [number] * length) for number, length in enumerate(lengths)])


def order_of(corpus: Corpus, steps: int, size: int, seed: int) -> list[list[int]]:
    return list(corpus.draws(steps, size, seed))


def test_every_row_comes_once_before_any_comes_twice() -> None:
    corpus = numbered([1] * 10)
    batches = order_of(corpus, 15, 2, seed=3)
    assert [len(batch) for batch in batches] == [2] * 15
    rows = list(itertools.chain(*batches))
    # The order is mixed within sixteen batches only, which is more than these.
    assert all(rows.count(number) == 3 for number in range(10))


def test_the_order_depends_on_the_seed_alone() -> None:
    corpus = numbered([1] * 40)
    state = torch.get_rng_state()
    assert order_of(corpus, 5, 4, seed=1) == order_of(corpus, 5, 4, seed=1) != order_of(corpus, 5, 4, seed=2)
    assert torch.equal(state, torch.get_rng_state())


def test_rows_of_like_length_share_a_batch() -> None:
    corpus = numbered([n % 8 for n in range(64)])
    assert all(len({len(corpus.rows[number][1]) for number in batch}) == 1 for batch in order_of(corpus, 16, 4, seed=0))


def test_a_batch_larger_than_the_task_is_refused() -> None:
    with pytest.raises(DataError, match="the task has 3 rows, fewer than --batch 4; lower it"):
        next(numbered([1] * 3).draws(1, 4, seed=0))


def test_only_answers_are_labelled() -> None:
    ids_BT, labels_BT = Corpus([], [([5, 6], [7]), ([5], [8, 9, 4])]).batch([0, 1])
    assert ids_BT.tolist() == [[5, 6, 7, 0], [5, 8, 9, 4]]
    assert labels_BT.tolist() == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, 8, 9, 4]]


def test_a_personal_corpus_keeps_each_rows_user_and_shares_no_prefix() -> None:
    """What the model makes of a shared prefix would be one user's."""
    plain = Corpus.of(byte_tokenizer(), EXAMPLES)
    users = [User((1,), ()), User((2, 3), (9,)), User((4,), ()), User((5,), ())]
    personal = plain.personal(users)
    assert plain.prefix
    assert personal.prefix == []
    assert [asked for asked, _ in personal.rows] == [plain.prefix + asked for asked, _ in plain.rows]
    assert personal.users_of([2, 1]) == [users[2], users[1]]
    assert len({plain.digest(), personal.digest(), plain.personal(users[::-1]).digest()}) == 3
    assert list(personal.draws(6, 2, 0)) == list(plain.draws(6, 2, 0)), "the order of the rows is the same"


def test_samples_are_full_and_made_of_whole_texts_in_another_order() -> None:
    pieces = [[n, n] for n in range(7)]
    samples = packed(pieces, 9, 4, seed=0)
    assert [tuple(sample.shape) for sample in samples] == [(1, 4)] * 3
    tokens = torch.cat(samples, dim=1)[0].tolist()
    assert tokens[::2] == tokens[1::2]
    assert tokens != sorted(tokens)
    assert len(packed(pieces, 2, 4, seed=0)) == 2


def test_texts_too_short_for_one_sample_are_refused() -> None:
    with pytest.raises(DataError, match="have 6 tokens, fewer than one sample of 7"):
        packed([[1, 2], [3] * 4], 1, 7, seed=0)


@pytest.mark.parametrize("common", [True, False])
def test_the_loss_is_that_of_whole_rows_one_by_one(base: Callable[[], Base], common: bool) -> None:
    """The oracle: transformers' own loss of each row, without batch, padding or shared prefix."""
    model: Any = base().model
    corpus = Corpus.of(byte_tokenizer(), EXAMPLES)
    if not common:
        corpus = Corpus([], [(corpus.prefix + asked, told) for asked, told in corpus.rows])
    losses = answer_losses(model, corpus.prefix, corpus.batch(range(4)))
    parts = torch.split(losses, [len(told) for _, told in corpus.rows])
    for part, (asked, told) in zip(parts, corpus.rows, strict=True):
        before = corpus.prefix + asked
        labels = torch.tensor([[IGNORED] * len(before) + told])
        expected = model(input_ids=torch.tensor([before + told]), labels=labels).loss
        TOLERANCES["logits", torch.float32].assert_close(part.mean(), expected)


def test_gradients_flow_through_the_prefix(base: Callable[[], Base]) -> None:
    model: Any = base().model
    corpus = Corpus.of(byte_tokenizer(), EXAMPLES)
    whole = Corpus([], [(corpus.prefix + asked, told) for asked, told in corpus.rows])
    gradients = []
    for rows in (corpus, whole):
        model.zero_grad()
        answer_losses(model, rows.prefix, rows.batch(range(4))).mean().backward()  # type: ignore[no-untyped-call]
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    TOLERANCES["logits", torch.float32].assert_close(*gradients)
