"""A plan of training runs, each measured once and written as one JSON line: what the results hold already is left out.

Must not know: what is trained or measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tests.bench.lines import append, surroundings

Run = TypeVar("Run")


@dataclass(frozen=True, slots=True)
class Plan(Generic[Run]):
    """What a benchmark is.

    Attributes:
        label: a run's name for people.
        arguments: everything that shapes a run, as JSON reads it back; equal arguments are one run.
        measure: trains and judges, from the folder of the base model and that of the data.
        tell: the result in a few figures.
        packages: whose versions are written down.
    """

    name: str
    description: str
    runs: Sequence[Run]
    label: Callable[[Run], str]
    arguments: Callable[[Run], dict[str, Any]]
    measure: Callable[[Run, Path, Path], dict[str, Any]]
    tell: Callable[[dict[str, Any]], object]
    packages: Sequence[str] = ("torch", "transformers", "peft")

    def carry_out(self, argv: Sequence[str] | None) -> int:
        """Do the runs that are missing; the options are the command line's."""
        options = self._options(argv)
        if (model := options.model) is None:
            from motet.server.model.default_model import ensure_default_model

            model = ensure_default_model()
        start_s = time.monotonic()
        lines = options.results.read_text().splitlines() if options.results.exists() else []
        known = [json.loads(line)["arguments"] for line in lines]
        for run in self.runs:
            if self.arguments(run) in known:
                continue
            if options.until is not None and time.monotonic() - start_s > options.until:
                break
            head = surroundings(*self.packages)
            results = self.measure(run, model, options.data)
            line = {
                "label": self.label(run),
                **head,
                "arguments": self.arguments(run),
                "results": results,
            }
            append(options.results, line)
            print(line["label"], self.tell(results), flush=True)
        return 0

    def _options(self, argv: Sequence[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=self.name, description=self.description.partition("\n")[0])
        parser.add_argument("--data", type=Path, default=os.environ.get("MOTET_DATA", "../shared/data"))
        parser.add_argument("--model", type=Path, help="folder of the base model; by default the default model")
        parser.add_argument("--results", type=Path, required=True, help="JSON lines to append to")
        parser.add_argument(
            "--until", type=float, metavar="SECONDS", help="start no run later than this after the start"
        )
        return parser.parse_args(argv)
