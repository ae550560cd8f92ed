"""Command-line options that a single run and a sweep have in common. Knows nothing of running them."""

import argparse
import json
import random
from pathlib import Path

from tests.bench.assignment import Assignment
from tests.bench.client import Endpoint
from tests.bench.load import Conduct
from tests.bench.prompts import PromptKind, PromptShape

UNRECORDED = frozenset({"out", "requests_out", "server_pid"})


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--url", required=True, help="root of the server, or its /v1")
    server.add_argument("--api-key")
    server.add_argument("--server-pid", type=int, help="count this process tree's CPU apart from the rest")
    server.add_argument("--timeout-s", type=float, default=600, help="per request (default %(default)s)")
    server.add_argument("--allow-merged-chunks", action="store_true", help="several tokens in one chunk are no error")
    server.add_argument(
        "--extra-body", type=json.loads, default={}, metavar="JSON", help="further fields of every request"
    )
    shape = parser.add_argument_group("requests")
    shape.add_argument("--prompt-tokens", type=int, default=128)
    shape.add_argument("--output-tokens", type=int, default=64)
    shape.add_argument("--prompt-kind", type=PromptKind, choices=list(PromptKind), default=PromptKind.IDS)
    shape.add_argument("--shared-prefix-tokens", type=int, default=0)
    shape.add_argument("--id-start", type=int, default=1000, help="lowest token id drawn (default %(default)s)")
    shape.add_argument("--id-stop", type=int, default=40_000, help="one above the highest (default %(default)s)")
    shape.add_argument("--assignment", type=Assignment, choices=list(Assignment), default=Assignment.ROUND_ROBIN)
    shape.add_argument("--zipf-alpha", type=float, default=1.0, help="popularity is rank^-alpha")
    shape.add_argument("--power-alpha", type=float, default=0.3, help="S-LoRA's alpha: smaller is more skewed")
    shape.add_argument(
        "--seed",
        type=int,
        default=None,
        help="default: a fresh one, recorded; a seed used twice on one server lets its prefix cache help",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--label", default="")
    output.add_argument("--out", type=Path, help="append one JSON line per run")
    output.add_argument("--requests-out", type=Path, help="append one JSON line per request")
    output.add_argument("--slo-ttft-s", type=float, help="report the share of first tokens within this time")


def conduct_of(options: argparse.Namespace) -> Conduct:
    return Conduct(
        endpoint=Endpoint.from_url(options.url, options.api_key),
        timeout_s=options.timeout_s,
        allow_merged_chunks=options.allow_merged_chunks,
        server_pid=options.server_pid,
    )


def prompt_shape_of(options: argparse.Namespace) -> PromptShape:
    return PromptShape(
        tokens=options.prompt_tokens,
        kind=options.prompt_kind,
        shared_prefix_tokens=options.shared_prefix_tokens,
        id_start=options.id_start,
        id_stop=options.id_stop,
    )


def alpha_of(options: argparse.Namespace) -> float:
    alpha: float = options.power_alpha if options.assignment is Assignment.POWER else options.zipf_alpha
    return alpha


def seed_of(options: argparse.Namespace) -> int:
    seed: int | None = options.seed
    return random.SystemRandom().randrange(2**32) if seed is None else seed


def recorded_arguments(options: argparse.Namespace, **decided: object) -> dict[str, object]:
    """What the run depended on, as JSON can hold it: all arguments, with what was decided for those left open.

    Without the key, and without where the results went and which process served, which mean nothing elsewhere.
    """
    arguments = {name: value for name, value in vars(options).items() if name not in UNRECORDED} | decided
    arguments["api_key"] = None if options.api_key is None else "given"
    return {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
