"""What is measured of every server: how many adapters, how spread, how many requests at once. Knows no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.bench.arrivals import ClosedLoop
from tests.bench.assignment import Assignment
from tests.bench.prompts import PromptShape
from tests.bench.workload import Workload

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64


@dataclass(frozen=True, order=True)
class Cell:
    """Requests over this many adapters, 0 for the base alone, with this many in flight."""

    adapters: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.adapters or 'base'} c{self.concurrency}"

    @property
    def assignment(self) -> Assignment:
        """Few adapters in turn, many as popularity has it."""
        return Assignment.ZIPF if self.adapters > 8 else Assignment.ROUND_ROBIN


@dataclass(frozen=True)
class Setup:
    """One server as it is started for some of the cells.

    Attributes:
        server: a name in `tests.bench.peers.servers`, or "peft".
        registered: adapters that it knows.
    """

    server: str
    registered: int
    cells: tuple[Cell, ...]


_BASE = (Cell(0, 1), Cell(0, 8), Cell(0, 32))
_ADAPTED = (Cell(8, 8), Cell(8, 32), Cell(64, 8), Cell(64, 32))
SETUPS = (
    Setup("motet", 64, (*_BASE, *_ADAPTED)),
    Setup("llama.cpp", 0, _BASE),
    Setup("llama.cpp", 64, _ADAPTED),
    Setup("vllm", 0, _BASE),
    Setup("vllm", 64, _ADAPTED),
    Setup("peft", 8, (*_BASE, Cell(8, 8), Cell(8, 32))),
    Setup("motet", 1000, (Cell(1000, 8), Cell(1000, 32))),
)
"""A peer's base is measured without adapters, where it is fastest; Motet's with."""
SETUPS_IN_TURNS = (
    Setup("motet in turns", 0, (Cell(0, 32),)),
    Setup("motet in turns", 64, (Cell(0, 32), Cell(8, 32), Cell(64, 32))),
)
"""What adapters cost, registered and asked for: less than a server differs by from one round to the next."""


def adapter_names(count: int) -> tuple[str, ...]:
    """As `tests.bench.make_adapters` calls their folders."""
    return tuple(f"adapter-{index:03d}" for index in range(count))


def workload(
    cell: Cell, base: str, waves: int, seed: int, fields_of: Mapping[str, Mapping[str, object]] | None = None
) -> Workload:
    """Of one cell.

    Args:
        base: what the server calls its base model.
        waves: requests for each of those in flight; of one in flight eight times as many.
        fields_of: see `Workload`.
    """
    return Workload(
        models=adapter_names(cell.adapters) or (base,),
        pacing=ClosedLoop(cell.concurrency),
        requests=waves * (cell.concurrency if cell.concurrency > 1 else 8),
        prompt=PromptShape(PROMPT_TOKENS),
        output_tokens=OUTPUT_TOKENS,
        seed=seed,
        assignment=cell.assignment,
        fields_of=fields_of or {},
    )


def touch(setup: Setup, base: str, seed: int, fields_of: Mapping[str, Mapping[str, object]] | None = None) -> Workload:
    """A short request of the base and of every adapter of the cells, the most popular of very many, 32 at a time."""
    adapters = min(64, max(cell.adapters for cell in setup.cells))
    models = adapter_names(adapters) + ((base,) if any(not cell.adapters for cell in setup.cells) else ())
    return Workload(
        models=models,
        pacing=ClosedLoop(32),
        requests=max(len(models), 32),
        prompt=PromptShape(16),
        output_tokens=4,
        seed=seed,
        fields_of=fields_of or {},
    )
