"""Adapters × concurrency against one server, as ratios to its base. Knows nothing of how a run is measured.

Repeats go round all cases in turn, so that what else the machine does falls on all alike, and each figure is the
median of its repeats. Run it from the repository root:

    python -m tests.bench.sweep --url http://127.0.0.1:8000 --adapters 0,1,8,64 --concurrency 1,8,32 --repeats 3
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.arrivals import ClosedLoop
from tests.bench.catalogue import Served, served_models
from tests.bench.load import WarmupError
from tests.bench.options import (
    add_shared_options,
    alpha_of,
    conduct_of,
    prompt_shape_of,
    recorded_arguments,
    seed_of,
)
from tests.bench.report import Record
from tests.bench.run import run
from tests.bench.workload import Workload


@dataclass(frozen=True, order=True)
class Case:
    """Requests over this many adapters, 0 for the base alone, with this many in flight."""

    concurrency: int
    adapters: int


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sweep", description=(__doc__ or "").partition("\n")[0])
    add_shared_options(parser)
    parser.add_argument("--base", help="name of the base (default: the server's only one)")
    parser.add_argument("--adapters", type=_counts, default=(0, 1, 8, 64), help="0 is the base alone")
    parser.add_argument("--concurrency", type=_counts, default=(1, 8, 32))
    parser.add_argument("--requests-per-slot", type=int, default=4, help="requests = this × concurrency, and")
    parser.add_argument("--min-requests", type=int, default=16, help="at least this many")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="no warm-up: adapters load while measured")
    return parser


def case_models(case: Case, served: Served, base: str | None) -> tuple[str, ...]:
    """The first adapters by name, or the base.

    Raises:
        ValueError: the server has too few adapters, or not one base.
    """
    if case.adapters > len(served.adapters):
        raise ValueError(
            f"{case.adapters} adapters asked, the server lists {len(served.adapters)}; "
            "load more (tests.bench.make_adapters writes some) or lower --adapters"
        )
    if case.adapters:
        return served.adapters[: case.adapters]
    if base is not None:
        return (base,)
    if len(served.bases) != 1:
        raise ValueError(f"the server has {len(served.bases)} base models {served.bases}; name one with --base")
    return served.bases


async def sweep(options: argparse.Namespace) -> dict[Case, list[Record]]:
    """Measures every case `repeats` times."""
    conduct = conduct_of(options)
    served = await served_models(conduct.endpoint)
    cases = sorted(Case(c, a) for c in set(options.concurrency) for a in set(options.adapters))
    models = {case: case_models(case, served, options.base) for case in cases}
    seed = seed_of(options)
    records: dict[Case, list[Record]] = {case: [] for case in cases}
    for turn in range(options.repeats):
        for number, case in enumerate(cases):
            workload = Workload(
                models=models[case],
                pacing=ClosedLoop(case.concurrency),
                requests=max(options.min_requests, options.requests_per_slot * case.concurrency),
                warmup=0 if options.cold else max(case.adapters, case.concurrency),
                prompt=prompt_shape_of(options),
                output_tokens=options.output_tokens,
                # a seed of its own, or the prefix cache would know the prompts of the case before
                seed=seed + turn * len(cases) + number,
                assignment=options.assignment,
                alpha=alpha_of(options),
                extra_body=options.extra_body,
            )
            label = f"{options.label or 'sweep'}/a{case.adapters}/c{case.concurrency}/{turn}"
            arguments = recorded_arguments(
                options,
                seed=workload.seed,
                models=list(workload.models),
                concurrency=case.concurrency,
                adapters=case.adapters,
                requests=workload.requests,
                warmup=workload.warmup,
            )
            record = await run(
                conduct, workload, label, arguments, options.out, options.requests_out, options.slo_ttft_s
            )
            results = record.results
            print(f"{label}: {results.output_tokens_per_s:.1f} tokens/s, {results.failed} failed", file=sys.stderr)
            records[case].append(record)
    return records


def comparison(records: dict[Case, list[Record]]) -> str:
    """One line per case; ratios are to the base at the same concurrency."""
    titles = ("conc", "adapters", "tok/s", "× base", "TTFT p50", "TTFT p99", "TPOT p50", "× base", "ITL p99")
    lines = ["".join(f"{title:>10}" for title in (*titles, "failed", "steal %"))]
    for case, runs in sorted(records.items()):
        base = records.get(Case(case.concurrency, 0), [])
        rate, tpot_ms = _rate(runs), _tpot_ms(runs)
        cells = (
            str(case.concurrency),
            str(case.adapters) if case.adapters else "base",
            _cell(rate, 1),
            _cell(_ratio(rate, _rate(base)), 3),
            _cell(_median_ms([r.results.ttft_s.p50 for r in runs if r.results.ttft_s]), 1),
            _cell(_median_ms([r.results.ttft_s.p99 for r in runs if r.results.ttft_s]), 1),
            _cell(tpot_ms, 2),
            _cell(_ratio(tpot_ms, _tpot_ms(base)), 3),
            _cell(_median_ms([r.results.itl_s.p99 for r in runs if r.results.itl_s]), 1),
            str(sum(r.results.failed for r in runs)),
            _cell(max((r.cpu.steal_percent for r in runs if r.cpu.steal_percent is not None), default=None), 1),
        )
        lines.append("".join(f"{cell:>10}" for cell in cells))
    return "\n".join([*lines, "times in ms, medians over the repeats; steal is the worst repeat's"])


def _rate(runs: list[Record]) -> float | None:
    return median(r.results.output_tokens_per_s for r in runs) if runs else None


def _tpot_ms(runs: list[Record]) -> float | None:
    return _median_ms([r.results.tpot_s.p50 for r in runs if r.results.tpot_s])


def _median_ms(values_s: list[float]) -> float | None:
    return 1000 * median(values_s) if values_s else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        records = asyncio.run(sweep(options))
    except (OSError, ValueError, WarmupError) as error:
        print(f"sweep stopped: {error}", file=sys.stderr)
        return 2
    print(comparison(records))
    return 1 if any(record.results.failed for runs in records.values() for record in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
