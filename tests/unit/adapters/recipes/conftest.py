"""A tiny base with a tokenizer, and data folders in the shape of the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from motet.adapters.recipes import headed
from motet.adapters.recipes.readers import word_facts
from motet.adapters.recipes.run import Base, Order
from motet.adapters.recipes.starts import STARTS
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import TASKS, Task
from tests.support.ilora_modules import SasrecModule, look_trained
from tests.support.layouts_ilora import HISTORY_LENGTH, ITEMS
from tests.support.models import tiny_llama
from tests.support.tokenizer import byte_tokenizer

SIDES, PARTS = "sides", "parts"
"""Tasks of the fixture below."""
HEADED = tuple(method for method, start in STARTS.items() if getattr(start, "func", None) is headed.start)
"""They learn a task with a list of answers: test_headed.py."""
COLORS = "red green blue black white brown grey pink gold navy teal plum".split()


def wikisql_row(color: str, n: int) -> dict[str, Any]:
    return {
        "question": f"How many {color} cars have {n} doors ?",
        "sql": f'SELECT COUNT TABLEalias0.CAR_FIELD FROM TABLE AS TABLEalias0 WHERE TABLEalias0.COLOR_FIELD = "{color}"'
        f" AND TABLEalias0.DOORS_FIELD > {n} ;",
    }


def arc_row(subject: str, right: int) -> dict[str, Any]:
    return {
        "instruction": f"Please choose the correct answer to the question: What is {subject}?\n\nAnswer1: a car "
        f"Answer2: a door Answer3: a {subject}\n\nAnswer format: answer1/answer2/answer3",
        "answer": f"answer{right}",
    }


def boolq_row(n: int) -> dict[str, Any]:
    return {"instruction": f"question: is {n} even?\n\nAnswer format", "answer": ("true", "false")[n % 2]}


def listener_row(first: int, length: int) -> dict[str, Any]:
    """Items one after the other, padded on the right."""
    items = [(first + step) % ITEMS for step in range(length + 1)]
    seq = items[:length] + [ITEMS] * (HISTORY_LENGTH - length)
    return {"seq": seq, "len_seq": max(length, 1), "next": items[length]}


def subject_row(subject: str, n: int) -> dict[str, Any]:
    return {"subject": subject, "question": f"Which {subject} is number {n}?", "choices": list("abcd"), "answer": 0}


def write_listeners(data: Path) -> None:
    """Histories of every length, names, and a SASRec that tells them apart."""
    for split, first in (("train", 0), ("test", 5)):
        rows = [listener_row(first + 3 * n, n % (HISTORY_LENGTH + 1)) for n in range(33)]
        write_rows(data, f"rec/lastfm/{split}", rows)
    names = "".join(f"{item}::Band {item}\n" for item in range(ITEMS))
    (data / "rec" / "lastfm" / "id2name.txt").write_text(names)
    sasrec = look_trained(SasrecModule(ITEMS, HISTORY_LENGTH), 3)
    save_file(sasrec.state_dict(), data / "rec" / "lastfm" / "sasrec_lastfm.safetensors")


def write_rows(data: Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    path = data / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, first in (("train", 0), ("test", 3)):
        write_rows(folder, f"text/wikisql.{split}", (wikisql_row(c, n + first) for n in range(3) for c in COLORS))
        write_rows(folder, f"qa/boolq.{split}", (boolq_row(n + first) for n in range(12)))
        write_rows(folder, f"qa/ARC-Easy.{split}", (arc_row(c, 1 + i % 3) for i, c in enumerate(COLORS)))
    write_rows(folder, "qa/mmlu.test", (subject_row(c, n) for c in COLORS for n in range(10)))
    write_listeners(folder)
    return folder


@pytest.fixture(scope="session")
def base() -> Callable[[], Base]:
    """The same base each time, new, since training gives it away."""
    tokenizer = byte_tokenizer()

    def make() -> Base:
        model = tiny_llama(num_hidden_layers=2, vocab_size=320, max_position_embeddings=512)
        return Base("public/name", model, tokenizer)

    return make


@pytest.fixture
def order() -> Callable[..., Order]:
    def make(method: str = "lora", **changes: Any) -> Order:
        adapted = bool(RECIPES[method].targets)
        defaults: dict[str, Any] = {
            "task": {"ilora": "lastfm", "llara": "lastfm", "amt": "subjects"}.get(method, "wikisql"),
            "rank": (4 if method == "ilora" else 3) if adapted else 0,
            "alpha": 6 if adapted else 0,
            "targets": ("q_proj", "v_proj") if adapted else (),
            "steps": 6,
            "learning_rate": 1e-2,
            "batch": 30 if method == "amt" else 4,
            "seed": 0,
            "threads": 1,
        }
        return Order(method, **{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def wide() -> Callable[[], Base]:
    """Channels that sixteen experts divide."""
    tokenizer = byte_tokenizer()

    def make() -> Base:
        sizes = {"num_hidden_layers": 2, "vocab_size": 320, "max_position_embeddings": 512, "intermediate_size": 96}
        return Base("public/name", tiny_llama(**sizes), tokenizer)

    return make


@pytest.fixture
def label_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two tasks whose answers are one token each, and their data."""
    for name, words in ((SIDES, ("l", "r")), (PARTS, ("x", "y", "z"))):
        task = Task(
            data=f"own/{name}",
            read=lambda row: (row["question"], row["answer"]),
            facts=lambda text, words=words: word_facts(words, text),  # type: ignore[misc]
            hint="One letter: ",
            answer_tokens=2,
            demo="Which?",
            choices=words,
        )
        monkeypatch.setitem(TASKS, name, task)  # type: ignore[misc]
        for split in ("train", "test"):
            rows = [
                {"question": f"{color} {name} {n}?", "answer": words[n]} for color in COLORS for n in range(len(words))
            ]
            write_rows(tmp_path / "data", f"own/{name}.{split}", rows)
    return tmp_path / "data"
