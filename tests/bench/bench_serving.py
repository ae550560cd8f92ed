"""Load generator for any server with OpenAI's streaming /v1/completions. Knows the server only by its URL.

Run it from the repository root; exit status 1 means that a request failed, 2 that nothing was measured:

    python -m tests.bench.bench_serving --url http://127.0.0.1:8000 --models-from-server --concurrency 8 \
        --requests 64 --warmup 8 --label eight-adapters --out results.jsonl
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from tests.bench.arrivals import ClosedLoop, OpenLoop, Pacing
from tests.bench.catalogue import served_models
from tests.bench.client import Endpoint
from tests.bench.load import WarmupError
from tests.bench.options import (
    add_shared_options,
    alpha_of,
    conduct_of,
    prompt_shape_of,
    recorded_arguments,
    seed_of,
)
from tests.bench.report import Record, table
from tests.bench.run import run
from tests.bench.workload import Workload


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_serving", description=(__doc__ or "").partition("\n")[0])
    add_shared_options(parser)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--models", help="names separated by commas (default: the server's only base)")
    models.add_argument("--models-from-server", action="store_true", help="every model that has a parent")
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--concurrency", type=int, help="closed loop: requests always in flight")
    loop.add_argument("--rate", type=float, help="open loop: requests per second")
    parser.add_argument("--burstiness", choices=["poisson", "gamma"], default="poisson")
    parser.add_argument("--cv", type=float, help="of the gaps under --burstiness gamma")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=0, help="requests sent first, round all models, not counted")
    return parser


async def chosen_models(options: argparse.Namespace, endpoint: Endpoint) -> tuple[str, ...]:
    """Raises ValueError when the server has no such model, or leaves a choice."""
    if options.models is not None:
        return tuple(name for name in options.models.split(",") if name)
    served = await served_models(endpoint)
    if options.models_from_server:
        if not served.adapters:
            raise ValueError("/v1/models lists no model with a parent; load adapters or name --models")
        return served.adapters
    if len(served.bases) != 1:
        raise ValueError(f"the server has {len(served.bases)} base models {served.bases}; name one with --models")
    return served.bases


def pacing_of(options: argparse.Namespace) -> Pacing:
    """Raises ValueError when --cv and --burstiness disagree."""
    if (options.burstiness == "gamma") != (options.cv is not None):
        raise ValueError("--burstiness gamma and --cv go together: poisson is gamma with cv 1")
    if options.concurrency is not None:
        if options.cv is not None:
            raise ValueError("--burstiness is of an open loop: give --rate instead of --concurrency")
        return ClosedLoop(options.concurrency)
    return OpenLoop(options.rate, 1.0 if options.cv is None else options.cv)


async def bench(options: argparse.Namespace) -> Record:
    conduct = conduct_of(options)
    pacing = pacing_of(options)
    models = await chosen_models(options, conduct.endpoint)
    workload = Workload(
        models=models,
        pacing=pacing,
        requests=options.requests,
        warmup=options.warmup,
        prompt=prompt_shape_of(options),
        output_tokens=options.output_tokens,
        seed=seed_of(options),
        assignment=options.assignment,
        alpha=alpha_of(options),
        extra_body=options.extra_body,
    )
    arguments = recorded_arguments(options, seed=workload.seed, models=list(models))
    return await run(conduct, workload, options.label, arguments, options.out, options.requests_out, options.slo_ttft_s)


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        record = asyncio.run(bench(options))
    except (OSError, ValueError, WarmupError) as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 2
    print(table(record))
    return 1 if record.results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
