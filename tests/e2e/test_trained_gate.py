"""An adapter of users as training leaves it: once served, it says what the model in training said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.recipes.corpus import chat_ids
from motet.adapters.recipes.items import with_markers
from motet.adapters.recipes.readers import User
from motet.adapters.recipes.run import Base, Order, begin
from motet.adapters.recipes.tasks import TASKS, examples
from motet.adapters.recipes.trainee import Trainee
from motet.adapters.recipes.users import users
from tests.e2e.gated import close
from tests.e2e.process import Server
from tests.support.models import load_dense
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.recipes.conftest import write_listeners

ANSWER = 5
SHORT = "[HistoryEmb][HistoryEmb] [CansEmb]"
ONE, OTHER = User((1, 2), (3,)), User((1, 2), (30,))
METHODS = ("llara", "ilora")


@dataclass
class Trained:
    """Adapters that the server has by their methods' names, and the models in training."""

    server: Server
    tokenizer: Any
    trainees: dict[str, Trainee]
    questions: list[tuple[str, User]]

    def served(self, method: str, question: str, user: User) -> torch.Tensor:
        """Log-probabilities of a greedy answer."""
        body = {
            "model": method,
            "messages": [{"role": "user", "content": question}],
            "gate": {"history": user.history, "candidates": user.candidates},
        }
        response = self.server.post(
            "/v1/chat/completions",
            {**body, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "logprobs": True},
        )
        assert response.status_code == 200, response.text
        return torch.tensor([token["logprob"] for token in response.json()["choices"][0]["logprobs"]["content"]])

    @torch.no_grad()
    def in_training(self, method: str, question: str, user: User) -> torch.Tensor:
        """The same of the model in training, each token from the whole text before it."""
        trainee = self.trainees[method]
        assert trainee.for_users is not None
        ids_1T = torch.tensor([chat_ids(with_markers(self.tokenizer), question)])
        found = []
        for _ in range(ANSWER):
            model = trainee.model.eval()
            trainee.for_users([user])
            best = model(ids_1T).logits[0, -1].log_softmax(-1).max(-1)
            found.append(best.values)
            ids_1T = torch.cat([ids_1T, best.indices[None, None]], dim=1)
        return torch.stack(found)


@pytest.fixture(scope="module")
def trained(
    administered: Server,
    tiny_model: Path,
    tiny_root: Path,
    tiny_tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Trained]:
    data = tmp_path_factory.mktemp("data")
    write_listeners(data)
    trainees = {}
    for method in METHODS:
        base = Base("tiny", load_dense(tiny_model, torch.float32), tiny_tokenizer)
        targets = ("q_proj", "v_proj", "down_proj")
        order = Order(method, "lastfm", 8, 32, targets, 6, 2e-2, 8, 0, torch.get_num_threads())
        trainee, loop = begin(order, base, data)
        list(loop)
        with torch.no_grad():  # so that what a few steps changed shows in an answer
            for name, parameter in trainee.trainable.items():
                if "lora_B" in name:
                    parameter.mul_(20)
        trainee.round_as_saved(torch.bfloat16)
        trainee.save(tiny_root / method)
        trainees[method] = trainee
        assert administered.load(method, method).status_code == 200
    task = TASKS["lastfm"]
    asked = [question for question, _ in examples(task, data, "test", marked=True)]
    pairs = list(zip(asked, users([task], data, "test"), strict=True))
    yield Trained(administered, tiny_tokenizer, trainees, pairs[:3])
    for method in METHODS:
        assert administered.unload(method).status_code == 200


@pytest.mark.parametrize("method", METHODS)
def test_served_users_are_answered_as_in_training(trained: Trained, method: str) -> None:
    for question, user in [*trained.questions, (SHORT, ONE), (SHORT, OTHER)]:
        close(trained.served(method, question, user).tolist(), trained.in_training(method, question, user))


@pytest.mark.parametrize("method", METHODS)
def test_the_items_count_beside_their_names(trained: Trained, method: str) -> None:
    """Otherwise the comparison above would say nothing of them."""
    difference = trained.served(method, SHORT, ONE) - trained.served(method, SHORT, OTHER)
    assert float(difference.abs().max()) > 10 * TOLERANCES["log-probabilities", torch.float32].atol
