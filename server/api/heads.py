"""Asks output heads: all questions of one turn of the event loop together, beside the steps.

A step hands all its features to the event loop in one call, so that its requests are answered in one batch whatever
heads they have.

Must not know: HTTP, adapters' names, what is said of an answer.

Shapes: D width of the features.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from motet.adapters.heads import HeadFile
from motet.server.heads.batch import Head, Row, predict
from motet.server.heads.errors import HeadError
from motet.server.heads.predictive import Predictive

CPU = torch.device("cpu")
"""Where features arrive."""


@dataclass(frozen=True, slots=True, eq=False)
class Asking:
    """One question.

    Attributes:
        x_D: what the adapter's output head read at the prompt's last token.
        samples: draws of a Monte Carlo answer; None is the exact one.
        seed: of the draws.
    """

    head: HeadFile
    x_D: torch.Tensor
    samples: int | None = None
    seed: int = 0


Waiting = list[tuple[Asking, asyncio.Future[Predictive]]]


@dataclass(slots=True, eq=False)
class Heads:
    """The heads that were asked, ready to compute, for as long as their adapters are resident.

    Note: `ask` is for one event loop; the answers are computed in a thread of its default executor.
    """

    _ready: weakref.WeakKeyDictionary[HeadFile, Head] = field(default_factory=weakref.WeakKeyDictionary)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: Waiting = field(default_factory=list)

    def ask(self, asking: Asking) -> asyncio.Future[Predictive]:
        """The answer, some turns later.

        Raises, when awaited:
            HeadError: the head's logits are no distribution.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Predictive] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._send)
        self._waiting.append((asking, answer))
        return answer

    def _send(self) -> None:
        sent, self._waiting = self._waiting, []
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(None, self._answers, [asking for asking, _ in sent])
        work.add_done_callback(lambda done: _hand_out(sent, done))

    def _answers(self, askings: Sequence[Asking]) -> list[Predictive | HeadError]:
        """Of one batch; a head that cannot answer harms no other one."""
        rows = [Row(self._head(asking.head), asking.x_D, asking.samples, asking.seed) for asking in askings]
        with torch.inference_mode():
            try:
                return list(predict(rows))
            except HeadError as error:
                return [error] if len(rows) == 1 else [self._answers([asking])[0] for asking in askings]

    def _head(self, file: HeadFile) -> Head:
        with self._lock:
            if file not in self._ready:
                self._ready[file] = Head.of(file, CPU)
            return self._ready[file]


def _hand_out(sent: Waiting, done: asyncio.Future[list[Predictive | HeadError]]) -> None:
    for place, (_, answer) in enumerate(sent):
        if answer.done():
            continue  # whoever asked is gone
        if (error := done.exception()) is not None:
            answer.set_exception(error)
        elif isinstance(found := done.result()[place], HeadError):
            answer.set_exception(found)
        else:
            answer.set_result(found)
