"""An adapter that adds tokens, with a tokenizer, a chat template and an end of its own, beside its base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import _running
from tests.e2e.process import Server
from tests.support.models import save_peft, tiny_llama
from tests.support.tokenizer import byte_tokenizer

WEIGHTS = "adapter_model.safetensors"
PROMPT = "the quick brown fox"
CALL, END = "<call>", "<end>"
TEMPLATE = "{% for message in messages %}{{ '<call>' + message.content + '<end>' }}{% endfor %}"


@dataclass(frozen=True)
class Speaking:
    server: Server
    tokenizer: Any
    known: int
    """Tokens of the base model; its tokenizer has fewer."""

    @property
    def client(self) -> openai.OpenAI:
        return self.server.openai()

    def id_of(self, token: str) -> int:
        found: int = self.tokenizer.convert_tokens_to_ids(token)
        return found


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaking]:
    """The adapter answers PROMPT with CALL and END, which lie beyond the base's tokens."""
    root = tmp_path_factory.mktemp("added")
    tokenizer = byte_tokenizer()
    known = -(-(len(tokenizer) + 1) // 8) * 8
    model = tiny_llama(vocab_size=known, tie_word_embeddings=False, max_position_embeddings=512)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    spare = [f"<spare{i}>" for i in range(known - len(tokenizer))]
    tokenizer.add_tokens([*spare, CALL])
    tokenizer.add_special_tokens({"eos_token": END})
    tokenizer.chat_template = TEMPLATE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        save_peft(
            model,
            root / "adapter",
            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
            seed=3,
            save_embedding_layers=True,
        )
        _answer(model, root / "adapter", tokenizer)
    tokenizer.save_pretrained(root / "adapter")
    arguments = ["--model", str(root / "model"), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
    running = _running(Server([*arguments, "--adapter", f"calling={root / 'adapter'}"], root / "log"))
    yield from (Speaking(server, tokenizer, known) for server in running)


@torch.no_grad()
def _answer(model: Any, folder: Path, tokenizer: Any) -> None:
    """Write head rows that make CALL follow PROMPT, and END follow that."""
    prompt = tokenizer(PROMPT)["input_ids"]
    call, end = tokenizer.convert_tokens_to_ids([CALL, END])
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    ids = torch.tensor([[*prompt, call]])
    states_2D = adapted.base_model.model.model(input_ids=ids).last_hidden_state[0, -2:]
    tensors = load_file(folder / WEIGHTS)
    head = tensors["base_model.model.lm_head.weight"]
    wanted_22 = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])  # logits of CALL and END after either state
    head[[call, end]] = (torch.linalg.pinv(states_2D) @ wanted_22).T
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_its_tokens_come_back_as_text(speaking: Speaking) -> None:
    got = speaking.client.completions.create(model="calling", prompt=PROMPT, max_tokens=9, temperature=0, logprobs=1)
    choice = got.choices[0]
    assert (choice.text, choice.finish_reason) == (CALL, "stop")
    assert got.usage is not None
    assert got.usage.completion_tokens == 2
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [CALL, END]
    assert min(choice.logprobs.token_logprobs or [-1]) > -1e-3


def test_and_streamed(speaking: Speaking) -> None:
    with speaking.client.completions.create(
        model="calling", prompt=PROMPT, max_tokens=9, temperature=0, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == CALL
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_special_ones_are_shown_on_request(speaking: Speaking) -> None:
    extra: Any = {"skip_special_tokens": False, "ignore_eos": True}
    got = speaking.client.completions.create(
        model="calling", prompt=PROMPT, max_tokens=2, temperature=0, extra_body=extra
    )
    assert got.choices[0].text == CALL + END


def test_its_chat_template_is_used(speaking: Speaking) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    got = speaking.client.chat.completions.create(model="calling", messages=messages, max_tokens=3, temperature=0)
    expected = speaking.tokenizer(CALL + PROMPT + END)["input_ids"]
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(expected)
    assert {speaking.id_of(CALL), speaking.id_of(END)} <= set(expected)


def test_its_ids_are_accepted_and_the_base_refuses_them(speaking: Speaking) -> None:
    call = speaking.id_of(CALL)
    assert call >= speaking.known
    prompt = [7, call, 9]
    echoed = speaking.client.completions.create(model="calling", prompt=prompt, max_tokens=1, echo=True, logprobs=0)
    assert CALL in echoed.choices[0].text
    for change in ({"prompt": prompt}, {"logit_bias": {str(call): 5}}, {"extra_body": {"stop_token_ids": [call]}}):
        body: Any = {"prompt": PROMPT, "max_tokens": 1, **change}
        speaking.client.completions.create(model="calling", **body)
        with pytest.raises(openai.BadRequestError, match=f"0 to {speaking.known - 1}"):
            speaking.client.completions.create(model="tiny", **body)
    with pytest.raises(openai.BadRequestError, match=rf"'calling' are 0 to {speaking.id_of(END)}"):
        speaking.client.completions.create(model="calling", prompt=[speaking.id_of(END) + 1], max_tokens=1)


def test_the_base_keeps_its_own_tokenizer(speaking: Speaking) -> None:
    """The same text is bytes to the base, which ends where it always did."""
    text = f"fox{CALL}dog"
    counts = {}
    for name in ("tiny", "calling"):
        got = speaking.client.completions.create(model=name, prompt=text, max_tokens=1, temperature=0)
        assert got.usage is not None
        counts[name] = got.usage.prompt_tokens
    assert counts["calling"] == len(speaking.tokenizer(text)["input_ids"])
    assert counts["tiny"] == len(byte_tokenizer()(text)["input_ids"]) > counts["calling"]
