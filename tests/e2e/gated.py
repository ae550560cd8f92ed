"""A server of a tiny model with adapters that requests give gates for, and the dense models that the gates mean."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from motet.server.api.text import token_text
from tests.e2e.process import ADMIN_KEY, Server, eventually
from tests.support.layouts_amt import PoolLayout, amt
from tests.support.layouts_ilora import GatedLayout, ilora
from tests.support.models import load_dense, save_peft
from tests.support.tolerances import TOLERANCES

LORAS: Mapping[str, dict[str, Any]] = {
    "left": {"r": 4, "lora_alpha": 6},
    "tenant/right": {"r": 4, "lora_alpha": 6},
    "wide": {"r": 8, "lora_alpha": 8},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}
MEMORY = "motet_adapter_memory_bytes"


@dataclass
class Gated:
    """The server of a session; its adapters are LORAS, "users" of iLoRA and the pool "tenant/pool".

    Attributes:
        derived: different TIES merges that tests asked for, each as large as "left".
    """

    server: Server
    model: Path
    tokenizer: Any
    folders: Mapping[str, Path]
    users: GatedLayout
    pool: PoolLayout
    derived: set[Any] = field(default_factory=set)

    @property
    def dense(self) -> Any:
        """A fresh copy of the base."""
        return copy.deepcopy(self.users.base)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    def peft(self, combine: Callable[[PeftModel], None]) -> Any:
        """PEFT's model of left and right, named "a" and "b", after `combine` made "mixed" of them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's matter
            model = PeftModel.from_pretrained(self.dense, str(self.folders["left"]), adapter_name="a")
            model.load_adapter(str(self.folders["tenant/right"]), adapter_name="b")
            combine(model)
            model.set_adapter("mixed")
        return model.eval()

    def check(self, oracle: Any, prompt: str = "the quick brown fox jumps", **body: Any) -> dict[str, Any]:
        """A completion's prompt log-probabilities and greedy tokens are the dense model's; the answer."""
        ids = self.ids(prompt)
        asked = {"prompt": prompt, "max_tokens": 5, "echo": True, "logprobs": 0, "temperature": 0, "ignore_eos": True}
        answer = self.server.complete(**asked, **body)
        found = answer["choices"][0]["logprobs"]
        made = generated(oracle, torch.tensor([ids]), 5)
        close(found["token_logprobs"][1:], logprobs(oracle, torch.tensor([ids + made])))
        assert found["tokens"][-5:] == [token_text(self.tokenizer, token) for token in made]
        return answer


def close(found: Sequence[float], expected: torch.Tensor) -> None:
    TOLERANCES["log-probabilities", torch.float32].assert_close(torch.tensor(found), expected)


@torch.no_grad()
def logprobs(model: Any, ids_1T: torch.Tensor, rows: Mapping[int, torch.Tensor] | None = None) -> torch.Tensor:
    """Of every token from the second on; `rows` stand in the place of embeddings."""
    embeds_1TD = model.get_input_embeddings()(ids_1T).clone()
    for place, row in (rows or {}).items():
        embeds_1TD[0, place] = row
    all_TV = model(inputs_embeds=embeds_1TD).logits[0].float().log_softmax(-1)
    return all_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0]  # type: ignore[no-any-return]


@torch.no_grad()
def generated(
    model: Any, ids_1T: torch.Tensor, count: int, rows: Mapping[int, torch.Tensor] | None = None
) -> list[int]:
    """Greedy tokens, each from the whole text before it."""
    start = ids_1T.shape[1]
    for _ in range(count):
        embeds_1TD = model.get_input_embeddings()(ids_1T).clone()
        for place, row in (rows or {}).items():
            embeds_1TD[0, place] = row
        ids_1T = torch.cat([ids_1T, model(inputs_embeds=embeds_1TD).logits[:, -1:].argmax(-1)], 1)
    found: list[int] = ids_1T[0, start:].tolist()
    return found


def serving(root: Path, model: Path, tokenizer: Any) -> Iterator[Gated]:
    """The server; at the end no adapter may be leased: each is gone from memory once its name is."""
    dense = load_dense(model, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's matter
        folders = {
            name: save_peft(
                dense, root / name, LoraConfig(target_modules=["q_proj", "v_proj"], **options), seed, strength=0.3
            )
            for seed, (name, options) in enumerate(LORAS.items(), 20)
        }
    users, pool = ilora(dense, root / "users"), amt()(dense, root / "tenant" / "pool", 5)
    folders |= {"users": users.folder, "tenant/pool": pool.folder}
    arguments = ["--model", str(model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
    arguments += [part for name, folder in folders.items() for part in ("--adapter", f"{name}={folder}")]
    arguments += ["--adapter-root", str(root)]
    server = Server(arguments, root / "log", MOTET_ADMIN_KEY=ADMIN_KEY)
    gated = Gated(server, model, tokenizer, folders, users, pool)
    try:
        server.wait_until_ready()
        yield gated
        server.wait_until_idle()
        size = server.models["left"]["adapter"]["bytes"]
        for name in folders:
            assert server.unload(name).status_code == 200
        eventually(lambda: server.metrics[MEMORY] == len(gated.derived) * size)
    finally:
        code = server.stop()
    log = server.log.read_text()
    assert code == 0, log
    assert "Traceback" not in log, log
