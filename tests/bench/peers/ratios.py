"""From the records of a run to the ratios that were aimed at. Knows nothing of how a figure was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.bench.peers.cells import Cell
from tests.bench.peers.servers import IN_TURNS, LLAMA, MOTET, PEFT, VLLM

Key = tuple[str, int, int, int]
"""Server, adapters registered, adapters in the traffic, concurrency."""
Figures = Mapping[Key, Mapping[str, Any]]
"""Results of one round."""


@dataclass(frozen=True)
class Aim:
    """`of` is divided by `by`; without one, `of` itself is aimed at."""

    what: str
    target: float
    of: Key
    by: Key | None = None
    at_most: bool = False
    read: Callable[[Mapping[str, Any]], float] = lambda results: float(results["output_tokens_per_s"])


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds, and each of them; None where something was not measured."""

    what: str
    value: float | None
    rounds: list[float]
    target: float
    at_most: bool

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


def _motet(adapters: int, concurrency: int) -> Key:
    return MOTET, max(64, adapters), adapters, concurrency


def _peer(server: str, adapters: int, concurrency: int) -> Key:
    return server, 64 if adapters else 0, adapters, concurrency


def _aims() -> list[Aim]:
    aims = [
        Aim("adapter tax: 8 adapters over the base, c32", 0.90, (IN_TURNS, 64, 8, 32), (IN_TURNS, 64, 0, 32)),
        Aim("the base with 64 registered over none, c32", 0.99, (IN_TURNS, 64, 0, 32), (IN_TURNS, 0, 0, 32)),
        Aim("64 adapters, Zipf, over 8, c8", 0.90, _motet(64, 8), _motet(8, 8)),
        Aim("64 adapters, Zipf, over 8, c32", 0.90, (IN_TURNS, 64, 64, 32), (IN_TURNS, 64, 8, 32)),
    ]
    aims += [
        Aim(f"1,000 adapters, Zipf, over 8, c{concurrency}", 0.90, _motet(1000, concurrency), _motet(8, concurrency))
        for concurrency in (8, 32)
    ]
    aims += [
        Aim(f"{cell.adapters} adapters over {server}, c{cell.concurrency}", target, of, by)
        for server, target in ((LLAMA, 4.0), (VLLM, 6.0))
        for cell in (Cell(8, 8), Cell(8, 32), Cell(64, 8), Cell(64, 32))
        for of, by in [(_motet(*_of(cell)), _peer(server, *_of(cell)))]
    ]
    aims += [
        Aim(f"base over {server}, c32", target, _motet(0, 32), _peer(server, 0, 32))
        for server, target in ((VLLM, 1.1), (LLAMA, 1.6))
    ]
    aims.append(
        Aim("single-stream TPOT over llama.cpp's", 1.1, _motet(0, 1), _peer(LLAMA, 0, 1), at_most=True, read=_tpot_s)
    )
    aims.append(Aim("8 adapters over PEFT's mixed batch, c8", 8.0, _motet(8, 8), (PEFT, 8, 8, 8)))
    aims.append(Aim("TTFT p99 with 8 adapters, c8, s", 1.5, _motet(8, 8), at_most=True, read=_ttft_p99_s))
    return aims


def _of(cell: Cell) -> tuple[int, int]:
    return cell.adapters, cell.concurrency


def _tpot_s(results: Mapping[str, Any]) -> float:
    return float(results["tpot_s"]["p50"])


def _ttft_p99_s(results: Mapping[str, Any]) -> float:
    return float(results["ttft_s"]["p99"])


def key_of(record: Mapping[str, Any]) -> Key:
    arguments = record["arguments"]
    return arguments["server"], arguments["registered"], arguments["adapters"], arguments["concurrency"]


def rounds_of(records: Sequence[Mapping[str, Any]]) -> list[dict[Key, Mapping[str, Any]]]:
    """The results of every round; a record of a failed request is no figure."""
    rounds: dict[int, dict[Key, Mapping[str, Any]]] = {}
    for record in records:
        if not record["results"]["failed"]:
            rounds.setdefault(record["arguments"]["round"], {})[key_of(record)] = record["results"]
    return [rounds[number] for number in sorted(rounds)]


def ratios(records: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    """Every aim; both sides of a ratio are of the same round."""
    rounds = rounds_of(records)
    found = []
    for aim in _aims():
        values = [value for figures in rounds if (value := _value(aim, figures)) is not None]
        found.append(Ratio(aim.what, median(values) if values else None, values, aim.target, aim.at_most))
    return found


def _value(aim: Aim, figures: Figures) -> float | None:
    if aim.of not in figures or (aim.by is not None and aim.by not in figures):
        return None
    value = aim.read(figures[aim.of])
    return value if aim.by is None else value / aim.read(figures[aim.by])
