"""A server of a tiny model whose adapters have output heads, and what their answers must be without it.

The oracle is another way from the prompt on: PEFT's model, its last hidden state, vbll's own logits, a plain grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel

from motet.adapters import heads
from motet.adapters.calibration import Calibration
from motet.adapters.heads import HeadFile
from tests.e2e.process import ADMIN_KEY, Server
from tests.support.heads import random_head, vbll_layer
from tests.support.models import load_dense, save_peft
from tests.support.tolerances import TOLERANCES
from tests.unit.server.heads.oracles import plain_grid

WIDTH = 48
CALIBRATION = Calibration(set="dev-2026-08", n=2000, ece=0.03, nll=0.4, brier=0.2, miss_rate=0.1)
HEADS: Mapping[str, HeadFile] = {
    "dense": random_head("dense", ("red", "green", "blue"), WIDTH, seed=1),
    "tenant/diagonal": random_head("diagonal", ("a", "b", "c", "d", "e"), WIDTH, seed=2, spread=3.0),
    "judge": random_head(
        "lowrank", ("No", "Yes"), WIDTH, seed=3, spread=6.0, temperature=1.5, threshold=0.3, calibration=CALIBRATION
    ),
    "softmax": random_head("softmax", ("low", "middle", "high"), WIDTH, seed=4),
}
PLAIN = "plain"


@dataclass(frozen=True)
class Expected:
    """Of one prompt."""

    p_C: torch.Tensor
    aleatoric: float

    @property
    def total(self) -> float:
        return float(torch.special.entr(self.p_C).sum())


class Headed:
    """The server of a session: "tiny", its adapters with HEADS and PLAIN without."""

    def __init__(self, server: Server, model: Path, tokenizer: Any, folders: Mapping[str, Path]) -> None:
        self.server, self.model, self.tokenizer, self.folders = server, model, tokenizer, folders

    @cached_property
    def _peft(self) -> Any:
        first, *others = self.folders
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's matter
            dense = load_dense(self.model, torch.float32)
            model = PeftModel.from_pretrained(dense, str(self.folders[first]), adapter_name="0")
            for place, name in enumerate(others, 1):
                model.load_adapter(str(self.folders[name]), adapter_name=str(place))
        return model.eval()

    @torch.no_grad()
    def feature(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """[D] the last hidden state, after the last norm, at the last token."""
        self._peft.set_adapter(str(list(self.folders).index(name)))
        states = self._peft(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        found: torch.Tensor = states[0, -1]
        return found

    @torch.no_grad()
    def logits(self, name: str, ids: Sequence[int], head: HeadFile | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances, temperature applied."""
        x_1D, head = self.feature(name, ids).double()[None], HEADS[name] if head is None else head
        if "weight" in head.tensors:
            mean_1C = x_1D @ head.tensors["weight"].double().T + head.tensors["bias"].double()
            variance_1C = torch.full_like(mean_1C, 1e-12)
        else:
            predicted = vbll_layer(head).logit_predictive(x_1D)
            mean_1C, variance_1C = predicted.mean, predicted.variance
        return (mean_1C[0] / head.temperature).numpy(), (variance_1C[0] / head.temperature**2).numpy()

    def expected(self, name: str, ids: Sequence[int]) -> Expected:
        p_C, aleatoric = plain_grid(*self.logits(name, ids))
        return Expected(torch.from_numpy(p_C), aleatoric)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    def check(self, name: str, ids: Sequence[int], said: Mapping[str, Any]) -> None:
        """A served `uncertainty` is the oracle's."""
        head, expected = HEADS[name], self.expected(name, ids)
        assert said["method"] == ("softmax" if name == "softmax" else "vbll")
        assert said["version"] == head.digest
        assert said["calibrated"] == (head.calibration is not None)
        assert list(said["probabilities"]) == list(head.labels)
        close(list(said["probabilities"].values()), expected.p_C.tolist())
        entropies = [said["total"], said["aleatoric"], said["epistemic"]]
        close(entropies, [expected.total, expected.aleatoric, expected.total - expected.aleatoric])
        assert said["confidence"] == max(said["probabilities"].values())
        assert said["score"] == 1 - said["confidence"]
        assert said["label"] == max(said["probabilities"], key=said["probabilities"].__getitem__)
        assert said.get("threshold") == head.threshold
        assert said.get("abstain") == (None if head.threshold is None else said["score"] > head.threshold)


def close(found: Sequence[float], expected: Sequence[float]) -> None:
    TOLERANCES["served head", torch.float32].assert_close(torch.tensor(found), torch.tensor(expected))


def serving(root: Path, model: Path, tokenizer: Any) -> Iterator[Headed]:
    """The server, until the generator is left."""
    dense = load_dense(model, torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's matter
        folders = {
            name: save_peft(dense, root / name, config, seed, strength=0.3)
            for seed, name in enumerate([*HEADS, PLAIN], 40)
        }
    for name, head in HEADS.items():
        heads.write(head, folders[name])
    arguments = ["--model", str(model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
    arguments += [part for name, folder in folders.items() for part in ("--adapter", f"{name}={folder}")]
    server = Server([*arguments, "--adapter-root", str(root)], root / "log", MOTET_ADMIN_KEY=ADMIN_KEY)
    try:
        server.wait_until_ready()
        yield Headed(server, model, tokenizer, folders)
        server.wait_until_idle()
    finally:
        code = server.stop()
    log = server.log.read_text()
    assert code == 0, log
    assert "Traceback" not in log, log
