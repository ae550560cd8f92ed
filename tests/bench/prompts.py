"""What requests say: reproducible prompts of a fixed length. Knows nothing of requests or tokenizers.

Each prompt has its own random stream, so no two share a beginning a prefix cache could use, unless asked to.
"""

import random
from dataclasses import dataclass
from enum import StrEnum

# Each is one token, with its leading space, in the common BPE vocabularies: n words are about n tokens.
_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said "
    "what its about than into them can only other time new some could these two may first then do any like my "
    "now over such our man me even most made after also did many before must through back years where much way"
).split()


class PromptKind(StrEnum):
    IDS = "ids"
    TEXT = "text"


@dataclass(frozen=True)
class PromptShape:
    """How long prompts are and what they are made of.

    Args:
        shared_prefix_tokens: how many leading tokens all prompts of one seed have in common.
        id_start: first token id drawn; 1000 is above every special token of the usual vocabularies.
        id_stop: first id no longer drawn; 40,000 is inside all usual vocabularies.
    """

    tokens: int
    kind: PromptKind = PromptKind.IDS
    shared_prefix_tokens: int = 0
    id_start: int = 1000
    id_stop: int = 40_000

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"prompt length {self.tokens} is less than 1")
        if not 0 <= self.shared_prefix_tokens <= self.tokens:
            raise ValueError(f"shared prefix {self.shared_prefix_tokens} is not within 0…{self.tokens}")
        if not 0 <= self.id_start < self.id_stop:
            raise ValueError(f"no token id lies in [{self.id_start}, {self.id_stop})")

    def build(self, seed: int, key: str) -> list[int] | str:
        """The prompt of one key: equal (seed, key) give equal prompts.

        Note: text is only about `tokens` long; the server's usage has the true number.
        """
        shared = random.Random(f"{seed}/shared")
        own = random.Random(f"{seed}/{key}")
        parts = ((shared, self.shared_prefix_tokens), (own, self.tokens - self.shared_prefix_tokens))
        if self.kind is PromptKind.IDS:
            ids = range(self.id_start, self.id_stop)
            return [token for rng, count in parts for token in rng.choices(ids, k=count)]
        return " ".join(word for rng, count in parts for word in rng.choices(_WORDS, k=count))
