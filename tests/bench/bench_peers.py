"""Motet, llama.cpp's server, vLLM's CPU build and PEFT's mixed batch under one client, one after the other in rounds.

Starts the servers itself; `python -m tests.bench.peers.environment` makes those of the others, and one that is not
there is skipped with its reason. No speed is printed unless Motet's answers are PEFT's in the same run. Run it from
the repository root, alone on the machine; a round of all takes a quarter of an hour. A file that git does not ignore
would make its own records those of a tree with changes:

    OMP_NUM_THREADS=2 setsid python -m tests.bench.bench_peers --rounds 3 --out build/peers-cpu.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.client import Endpoint
from tests.bench.lines import append, surroundings
from tests.bench.load import Conduct, WarmupError, measure
from tests.bench.peers import cells, parity, peft_batch, table
from tests.bench.peers.cells import SETUPS, SETUPS_IN_TURNS, Cell, Setup
from tests.bench.peers.environment import FOLDER, missing_llama, missing_vllm
from tests.bench.peers.process import StartError, free_port, go_first, running
from tests.bench.peers.ratios import ratios
from tests.bench.peers.registering import register
from tests.bench.peers.servers import BASE, BUILDS, IN_TURNS, LLAMA, MOTET, PEFT, VLLM, Launch
from tests.bench.run import run

ADAPTERS = FOLDER / "adapters"
STRENGTH = 0.06
"""Of B: two of three most likely tokens become others, so that answers tell an adapter from the base."""
MISSING: Mapping[str, Callable[[], str | None]] = {LLAMA: missing_llama, VLLM: missing_vllm}


@dataclass
class Run:
    """What a run depends on and what it found so far.

    Attributes:
        folders: of the adapters, in the order of their names.
        expected: what PEFT answers.
        skipped: server → why.
        parity: of every start of Motet with adapters.
    """

    model: Path
    folders: Sequence[Path]
    waves: int
    seed: int
    out: Path
    expected: Sequence[Mapping[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)
    parity: list[parity.Parity] = field(default_factory=list)

    def arguments(self, setup: Setup, cell: Cell, number: int) -> dict[str, object]:
        return {
            "label": f"{setup.server}/{setup.registered}/{cell}/{number}",
            "server": setup.server,
            "registered": setup.registered,
            "adapters": cell.adapters,
            "concurrency": cell.concurrency,
            "assignment": cell.assignment.value,
            "round": number,
            "waves": self.waves,
            "seed": self.seed_of(cell, number),
            "prompt_tokens": cells.PROMPT_TOKENS,
            "output_tokens": cells.OUTPUT_TOKENS,
        }

    def seed_of(self, cell: Cell, number: int) -> int:
        """The same for every server, another one for every cell and round: no prefix cache can help."""
        return self.seed + 10_000 * number + 100 * cell.concurrency + cell.adapters


@dataclass(frozen=True)
class Served:
    """A setup whose server runs."""

    setup: Setup
    url: str
    conduct: Conduct
    launch: Launch
    pid: int


@contextlib.contextmanager
def serving(run_: Run, setup: Setup) -> Iterator[Served]:
    """Start it and compare Motet's answers; it serves until the block is left.

    Raises:
        StartError: it does not serve.
        ParityError: it is Motet, and its answers are not PEFT's.
    """
    port = free_port()
    launch = BUILDS[setup.server](run_.model, run_.folders[: setup.registered], port)
    url = f"http://127.0.0.1:{port}"
    log = FOLDER / "logs" / f"{setup.server}-{setup.registered}.log"
    with running(launch.command, launch.environment, url + launch.health, log) as pid:
        if setup.server == MOTET and setup.registered:
            run_.parity.append(parity.check(url, run_.expected, BASE))
        conduct = Conduct(Endpoint.from_url(url), timeout_s=1800, allow_merged_chunks=True, server_pid=pid)
        yield Served(setup, url, conduct, launch, pid)


async def touch(run_: Run, served: Served, number: int) -> None:
    """Raises WarmupError: a request failed."""
    warmed = await measure(served.conduct, cells.touch(served.setup, BASE, run_.seed + number, served.launch.fields_of))
    if failures := [one.failure for one in warmed.timelines if one.failure is not None]:
        raise WarmupError(f"{served.setup.server}: {failures[0].kind}: {failures[0].detail}")


async def measure_cells(run_: Run, served: Served, number: int) -> None:
    for cell in served.setup.cells:
        asked = cells.workload(cell, BASE, run_.waves, run_.seed_of(cell, number), served.launch.fields_of)
        raised = {"server_priority": go_first(served.pid), "client_priority": go_first()}
        arguments = {**run_.arguments(served.setup, cell, number), "version": served.launch.version, **raised}
        record = await run(served.conduct, asked, str(arguments["label"]), arguments, run_.out)
        rate, failed = record.results.output_tokens_per_s, record.results.failed
        print(f"{record.label}: {rate:.1f} tokens/s, {failed} failed", file=sys.stderr, flush=True)


async def measure_server(run_: Run, setup: Setup, number: int) -> None:
    """One server alone.

    Raises:
        StartError, WarmupError, ParityError: as `serving` and `touch` do.
    """
    with serving(run_, setup) as served:
        await touch(run_, served, number)
        await measure_cells(run_, served, number)


async def measure_in_turns(run_: Run, setups: Sequence[Setup], turns: int) -> None:
    """One server as each of the setups, again and again: two servers of the same kind differ by some percent.

    Raises:
        StartError, WarmupError, ParityError: as `measure_server` does.
        HTTPError: it did not load or unload an adapter.
    """
    with serving(run_, Setup(IN_TURNS, 0, ())) as served:
        for number in range(turns):
            for setup in setups if number % 2 == 0 else reversed(setups):
                register(served.url, run_.folders[: setup.registered])
                if number == 0 and setup.registered:
                    run_.parity.append(parity.check(served.url, run_.expected, BASE))
                now = replace(served, setup=setup)
                await touch(run_, now, number)
                # Other prompts than the other setups', or its prefix cache would know them.
                own = replace(run_, seed=run_.seed + 1_000_000 * setup.registered)
                await measure_cells(own, now, number)


def measure_peft(run_: Run, setup: Setup, number: int) -> None:
    """Raises PeftError."""
    seeds = {cell: run_.seed_of(cell, number) for cell in setup.cells}
    arguments = {cell: run_.arguments(setup, cell, number) for cell in setup.cells}
    for record in peft_batch.measure(run_.model, run_.folders[: setup.registered], seeds, arguments):
        rate = record["results"]["output_tokens_per_s"]
        print(f"{record['label']}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
        append(run_.out, record)


def measure_round(run_: Run, setups: Sequence[Setup], number: int) -> None:
    """Every setup once; a peer that does not serve is skipped from then on.

    Raises:
        StartError, WarmupError, ParityError: of Motet.
    """
    for setup in setups:
        if setup.server in run_.skipped:
            continue
        try:
            if setup.server == PEFT:
                measure_peft(run_, setup, number)
            else:
                asyncio.run(measure_server(run_, setup, number))
        except (StartError, WarmupError, peft_batch.PeftError) as error:
            if setup.server == MOTET:
                raise
            run_.skipped[setup.server] = str(error)


def finish(run_: Run) -> None:
    """The last line of the file: the ratios, and what they rest on."""
    records = [json.loads(line) for line in run_.out.read_text().splitlines()]
    line = {
        "label": "ratios",
        **surroundings(),
        "skipped": run_.skipped,
        "parity": [asdict(one) for one in run_.parity],
        "results": [{**asdict(one), "met": one.met} for one in ratios(records)],
    }
    append(run_.out, line)
    print(table.speeds(records), table.ratios(line), sep="\n\n")


def adapter_folders(model: Path, count: int) -> list[Path]:
    """The first so many, made where they are not there yet."""
    folders = [ADAPTERS / name for name in cells.adapter_names(count)]
    if not all((folder / "adapter_config.json").exists() for folder in folders):
        from tests.bench.make_adapters import make_adapters  # torch is nothing the client otherwise needs

        made = [folder for folder in folders if folder.exists()]
        if made:
            raise FileExistsError(f"{len(made)} of {count} adapters are in build/peers; delete them to make all")
        make_adapters(str(model), ADAPTERS, count, std=STRENGTH)
    return folders


def default_model() -> Path:
    from motet.server.model.default_model import ensure_default_model

    return ensure_default_model()


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - {setup.server for setup in SETUPS}:
        raise argparse.ArgumentTypeError(f"no server is called {sorted(unknown)}")
    return names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the base model (default: the default model)")
    parser.add_argument("--servers", type=_names, default=(MOTET, LLAMA, VLLM, PEFT), help="separated by commas")
    parser.add_argument("--most-registered", type=int, default=1000, help="leave out setups with more adapters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=8, help="with and without adapters (default %(default)s)")
    parser.add_argument("--waves", type=int, default=2, help="requests for each in flight (default %(default)s)")
    parser.add_argument("--seed", type=int, help="default: a fresh one, recorded")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of this run; must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    if options.out.exists():
        print(f"nothing measured: {options.out} exists; it would mix two runs", file=sys.stderr)
        return 2
    options.out.touch()
    go_first()
    model = options.model or default_model()
    setups = [s for s in SETUPS if s.server in options.servers and s.registered <= options.most_registered]
    folders = adapter_folders(model, max(setup.registered for setup in setups))
    first = {folder.name: folder for folder in folders[:8]}
    needs_parity = any(setup.server == MOTET and setup.registered for setup in setups)
    run_ = Run(
        model=model,
        folders=folders,
        waves=options.waves,
        seed=random.SystemRandom().randrange(2**31) if options.seed is None else options.seed,
        out=options.out,
        expected=parity.reference(model, first, BASE) if needs_parity else [],
        skipped={name: why for name in options.servers if name in MISSING and (why := MISSING[name]()) is not None},
    )
    try:
        for number in range(options.rounds):
            measure_round(run_, setups, number)
        if MOTET in options.servers:
            asyncio.run(measure_in_turns(run_, SETUPS_IN_TURNS, options.turns))
    except (OSError, StartError, WarmupError, parity.ParityError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    for name, why in run_.skipped.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    finish(run_)
    return 0


if __name__ == "__main__":
    sys.exit(main())
