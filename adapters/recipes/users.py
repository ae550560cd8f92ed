"""What a task says of its users: who asks each row's question, and the network that was trained to read histories.

Must not know: methods, tokens, what is made of either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from motet.adapters.recipes.errors import DataError
from motet.adapters.recipes.readers import User
from motet.adapters.recipes.tasks import TASKS, Task, prepared

RANKING = "s_fc."
"""SASRec's layer that ranks items, which no state needs."""


def users(tasks: Sequence[Task], data: Path, split: str) -> list[User]:
    """The user of each row, in the order of `examples`.

    Raises:
        DataError: the tasks are several, or have no users; a file is absent.
    """
    task = _personal(tasks)
    assert task.user is not None
    return [task.user(row) for row in prepared(task, data, split)]


def encoder(tasks: Sequence[Task], data: Path) -> Mapping[str, torch.Tensor]:
    """SASRec's weights, by the names that its gate reads.

    Raises:
        DataError: the tasks are several, or have no users; the file is absent or damaged.
    """
    task = _personal(tasks)
    assert task.encoder is not None
    try:
        tensors = load_file(data / task.encoder)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the network {task.encoder} that reads histories cannot be read; "
            "name the folder that has it with --data or MOTET_DATA"
        ) from error
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(RANKING)}


def _personal(tasks: Sequence[Task]) -> Task:
    if len(tasks) != 1 or tasks[0].user is None:
        fit = ", ".join(name for name, task in TASKS.items() if task.user is not None)
        raise DataError(f"the method reads the history of each row's user; --task must be one that has it: {fit}")
    return tasks[0]
