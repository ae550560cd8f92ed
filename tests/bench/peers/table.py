"""The figures of a finished run as the pages quote them. `python -m tests.bench.peers.table FILE` prints them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.peers.cells import SETUPS, SETUPS_IN_TURNS, Cell
from tests.bench.peers.ratios import Key, rounds_of


def read(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of the cells, and the last line, which holds the ratios."""
    *records, end = [json.loads(line) for line in file.read_text().splitlines()]
    return records, end


def speeds(records: Sequence[Mapping[str, Any]]) -> str:
    """Output tokens/s, TPOT and TTFT of every cell, medians over the rounds."""
    rounds = rounds_of(records)
    keys = [
        (s.server, s.registered, cell.adapters, cell.concurrency)
        for s in (*SETUPS, *SETUPS_IN_TURNS)
        for cell in s.cells
    ]
    lines = [
        "| server | adapters registered | requests | tokens/s | TPOT p50 | TTFT p50 | TTFT p99 | other CPU use |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in keys:
        found = [figures[key] for figures in rounds if key in figures]
        if found:
            server, registered, adapters, concurrency = key
            cells = [server, f"{registered:,}", str(Cell(adapters, concurrency)), f"{_rate(found):.0f}"]
            cells += [_ms(found, "tpot_s", "p50"), _ms(found, "ttft_s", "p50"), _ms(found, "ttft_s", "p99")]
            lines.append(f"| {' | '.join([*cells, _other(records, key)])} |")
    return "\n".join(lines)


def ratios(end: Mapping[str, Any]) -> str:
    """Every ratio beside what was aimed at."""
    lines = ["| ratio | aimed at | measured |", "| --- | --- | --- |"]
    for one in end["results"]:
        if one["value"] is None:
            measured = "not measured"
        else:
            spread = f" ({min(one['rounds']):.2f} to {max(one['rounds']):.2f})" if len(one["rounds"]) > 1 else ""
            measured = f"{one['value']:.2f}{spread}{'' if one['met'] else ', missed'}"
        lines.append(f"| {one['what']} | {'≤' if one['at_most'] else '≥'} {one['target']:g} | {measured} |")
    return "\n".join(lines)


def _rate(found: Sequence[Mapping[str, Any]]) -> float:
    return median(results["output_tokens_per_s"] for results in found)


def _ms(found: Sequence[Mapping[str, Any]], what: str, percentile: str) -> str:
    values = [results[what][percentile] for results in found if results[what]]
    return f"{1000 * median(values):,.0f} ms" if values else "–"


def _other(records: Sequence[Mapping[str, Any]], key: Key) -> str:
    """The largest of any round, of all cores."""
    shares = [
        record["cpu"]["other_percent"]
        for record in records
        if tuple(record["arguments"][name] for name in ("server", "registered", "adapters", "concurrency")) == key
    ]
    return f"{max(shares):.0f} %" if shares and None not in shares else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    records, end = read(parser.parse_args().file)
    print(speeds(records), ratios(end), sep="\n\n")


if __name__ == "__main__":
    main()
