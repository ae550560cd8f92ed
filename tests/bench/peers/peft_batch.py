"""Measures `peft_program` in a process of its own. Knows nothing of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from tests.bench.cpu_usage import CpuMeter
from tests.bench.machine import Machine
from tests.bench.peers.cells import OUTPUT_TOKENS, PROMPT_TOKENS, Cell
from tests.bench.peers.process import go_first


class PeftError(RuntimeError):
    """The program ended."""


def measure(
    model: Path, adapters: Sequence[Path], cells: Mapping[Cell, int], arguments: Mapping[Cell, dict[str, object]]
) -> list[dict[str, Any]]:
    """One record per cell, of the form of `tests.bench.report.Record`, with the fields that a batch has.

    Args:
        cells: those of the base first → the seed of their prompts.
        arguments: what the record says of each cell.

    Raises:
        PeftError: the program failed.
    """
    command = [sys.executable, "-m", "tests.bench.peers.peft_program"]
    records = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        go_first(process.pid)
        _ask(process.stdin, {"model": str(model), "adapters": [str(folder) for folder in adapters]})
        _answer(process.stdout)
        for cell, seed in cells.items():
            go_first(process.pid)
            load_before, meter = os.getloadavg(), CpuMeter(process.pid)
            asked = {"adapters": cell.adapters, "concurrency": cell.concurrency, "seed": seed}
            _ask(process.stdin, asked)
            took_s = _answer(process.stdout)["duration_s"]
            records.append(
                {
                    "label": arguments[cell]["label"],
                    "utc": datetime.now(UTC).isoformat(timespec="seconds"),
                    "arguments": arguments[cell],
                    "machine": asdict(Machine.here()),
                    "load_before": load_before,
                    "server_version": {name: version(name) for name in ("peft", "transformers", "torch")},
                    "cpu": asdict(meter.stop()),
                    "results": {
                        "requests": cell.concurrency,
                        "failed": 0,
                        "duration_s": took_s,
                        "output_tokens": cell.concurrency * OUTPUT_TOKENS,
                        "prompt_tokens": cell.concurrency * PROMPT_TOKENS,
                        "output_tokens_per_s": cell.concurrency * OUTPUT_TOKENS / took_s,
                        "ttft_s": None,
                        "tpot_s": None,
                    },
                }
            )
    return records


def _ask(stdin: IO[str], what: object) -> None:
    stdin.write(json.dumps(what) + "\n")
    stdin.flush()


def _answer(stdout: IO[str]) -> Any:
    line = stdout.readline()
    if not line:
        raise PeftError("the program of PEFT's mixed batch ended; what it said is above")
    return json.loads(line)
