"""A small byte-level tokenizer: any text has tokens, any character outside ASCII has several."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ("the quick brown fox jumps over the lazy dog and then the other fox, too. " * 3, "one two three: 1, 2, 3!\n")
CHAT_TEMPLATE = (
    "{% if messages[0].role not in ('system', 'user') %}{{ raise_exception('a chat begins with the user') }}{% endif %}"
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def word_tokenizer(words: int, added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a word: "w0", "w1", … up to `words`, then the added ones. No special tokens, no end."""
    vocabulary = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    fast.add_tokens(list(added))
    return fast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens 0, 1 and 2 are <pad>, <s> and </s>; encoding adds none of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
