"""Examples as token ids, and their batches: a pure function of the seed, so that a run can be taken up anywhere.

Must not know: models, tasks, methods.

Shapes: B rows of a batch, T positions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import Example, User

IGNORED = -100
"""Label of a position that is not part of an answer; cross_entropy's own."""
POOL_BATCHES = 16
"""Within so many batches, rows of like length go together: less padding, and still a random order."""

Batch = tuple[torch.Tensor, torch.Tensor]
"""(ids_BT, labels_BT), int64, padded to the right."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows of (question, answer) token ids without the prefix that begins all of them: the system message.

    Attributes:
        users: of the rows; none where nothing depends on users.
    """

    prefix: list[int]
    rows: list[tuple[list[int], list[int]]]
    users: Sequence[User] = ()

    @classmethod
    def of(cls, tokenizer: Any, examples: Sequence[Example]) -> Corpus:
        """Questions in the chat template of the model, answers closed by its end token."""
        end = tokenizer.eos_token
        rows = [(chat_ids(tokenizer, asked), tokenizer(told + end)["input_ids"]) for asked, told in examples]
        # The last token of a question stays with its row: from it the first token of the answer is predicted.
        columns = zip(*(asked[:-1] for asked, _ in rows), strict=False)
        prefix = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
        return cls(prefix, [(asked[len(prefix) :], told) for asked, told in rows])

    def personal(self, users: Sequence[User]) -> Corpus:
        """The same rows, each with its user and the whole prefix, of which the model makes something else for each."""
        assert len(users) == len(self.rows), (len(users), len(self.rows))
        return Corpus([], [(self.prefix + asked, told) for asked, told in self.rows], users)

    def digest(self) -> str:
        """SHA-256 of all token ids, where each row ends, and the users."""
        return hashlib.sha256(repr((self.prefix, self.rows, self.users)).encode()).hexdigest()

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers."""
        chosen = [self.rows[number] for number in numbers]
        ids = [torch.tensor(asked + told) for asked, told in chosen]
        labels = [torch.tensor([IGNORED] * len(asked) + told) for asked, told in chosen]
        return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)

    def users_of(self, numbers: Sequence[int]) -> list[User]:
        """The users of the rows of these numbers."""
        return [self.users[number] for number in numbers]

    def draws(self, steps: int, size: int, seed: int) -> Iterator[list[int]]:
        """The numbers of the rows of `steps` batches of `size`, every row once before any row twice.

        Raises:
            DataError: there are fewer rows than a batch has.
        """
        if len(self.rows) < size:
            raise DataError(f"the task has {len(self.rows)} rows, fewer than --batch {size}; lower it")
        source = random.Random(seed)
        numbers = range(len(self.rows))
        order = [
            number for _ in range(0, steps * size, len(numbers)) for number in source.sample(numbers, len(numbers))
        ]
        for start in range(0, steps * size, POOL_BATCHES * size):
            pool = order[start : min(start + POOL_BATCHES * size, steps * size)]
            pool.sort(key=lambda number: sum(map(len, self.rows[number])))
            for first in source.sample(range(0, len(pool), size), len(pool) // size):
                yield pool[first : first + size]


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    """The question as one user message, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def packed(pieces: Sequence[list[int]], n_samples: int, length: int, seed: int) -> list[torch.Tensor]:
    """Samples [1, length] of token ids, filled with pieces in random order; fewer where the pieces run out.

    Raises:
        DataError: the pieces do not fill one sample.
    """
    order = random.Random(seed).sample(range(len(pieces)), len(pieces))
    stream = [token for number in order for token in pieces[number]][: n_samples * length]
    samples = [torch.tensor([stream[at : at + length]]) for at in range(0, len(stream) - length + 1, length)]
    if not samples:
        raise DataError(f"the texts to calibrate with have {len(stream)} tokens, fewer than one sample of {length}")
    return samples
