"""Puts the server together and runs it: base model, engine, adapters, HTTP, in that order.

Must not know: the command line. Reports each stage to the caller, so that people see where a start stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

from motet.adapters.arena import Arena
from motet.adapters.cache import LoweredCache
from motet.adapters.catalogue import Catalogue
from motet.adapters.effects import Lowered
from motet.adapters.host import HostTier
from motet.adapters.lease import Lease
from motet.adapters.receipt import Receipt
from motet.adapters.registry import Registry
from motet.adapters.residency import Residency
from motet.adapters.spec import Declared
from motet.adapters.tiers import Tiers
from motet.kernels.cpu.compiled import Engine as NativeEngine
from motet.kernels.cpu.pages import in_large_pages
from motet.server.api.app import RequestLimits, create_app
from motet.server.api.classifying import Classifying
from motet.server.api.keys import Keys
from motet.server.api.measuring import no_score, text_score
from motet.server.api.merging import Merging
from motet.server.api.publishing import autoloading
from motet.server.api.quotas import Quotas
from motet.server.api.scoring import Scorer, golden_check
from motet.server.api.service import Service
from motet.server.api.warm_up import warm_up
from motet.server.bases import Loaded, Steps, text_steps, vision_steps
from motet.server.budgets import adapter_cache, device_budget, host_budget
from motet.server.config import OptionError, ServeConfig, parse_adapter
from motet.server.draining import DrainingServer
from motet.server.engine.blocks import BlockPool
from motet.server.engine.engine import Engine
from motet.server.engine.policy import Fair, Fcfs
from motet.server.engine.scheduler import Scheduler
from motet.server.engine.stream import Streams
from motet.server.engine.types import Lease as EngineLease
from motet.server.first import open_catalogue, publish_first, require_possible
from motet.server.guards import keys_of, limits_of, quotas_of
from motet.server.model.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from motet.server.model.loader import LoadedModel, load
from motet.server.model.vision import is_vision, load_vision
from motet.server.native import native_engine, with_rows
from motet.server.slow_headers import patient_for
from motet.server.sourcing import OpenSources, open_sources
from motet.server.tier_metrics import everything

Report = Callable[[str], None]
"""Takes one line per stage of the start."""

LAST_WORDS_S = 3
"""Time for answers that are complete to reach their clients."""


@dataclass(frozen=True, slots=True, eq=False)
class Assembled:
    """What a service is made of, before there is a loop to run it in.

    Attributes:
        adapters: to load once the engine runs.
        threads: processors that torch may compute on in a step.
        report: takes the stages that are still to come.
        quotas: of adapters, and of keys.
    """

    loaded: Loaded
    residency: Residency
    cache: LoweredCache | None
    tiers: Tiers
    adapters: tuple[tuple[str, Path, Declared], ...]
    steps: Steps
    keys: Keys
    sources: OpenSources
    threads: int
    report: Report
    limits: RequestLimits
    quotas: tuple[Quotas, Quotas]


def choose_device(asked: str) -> torch.device:
    """Resolve "auto": CUDA where there is one.

    Raises:
        OptionError: CUDA was asked for and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device(asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def load_base(config: ServeConfig, report: Report, engine: NativeEngine | None = None) -> Loaded:
    """The base model the options name, or the default one; without an engine torch computes all.

    Raises:
        OptionError: weights in int8 are asked for, and nothing here multiplies with them.
    """
    device = choose_device(config.device)
    path = base_path(config.model)
    name = config.name or (DEFAULT_MODEL_NAME if config.model is None else Path(path).name)
    report(f"loading {name}")
    int8 = config.base_weights == "int8"
    if int8 and (engine is None or is_vision(path)):
        raise OptionError(
            "--base-weights int8: only the compiled CPU backend multiplies with them, and only for language models; "
            "leave it out"
        )
    if is_vision(path):
        return load_vision(path, name, config.dtype, device)
    return load(path, name, config.dtype, device, engine, int8=int8)


def base_path(model: str | None) -> str:
    """Directory or hub id of the base model; the default model is obtained first where it is missing."""
    return str(ensure_default_model()) if model is None else model


def new_residency(loaded: Loaded, budget_bytes: int) -> Residency:
    """An empty arena with its tables."""
    targets = loaded.base.targets
    widths = {width for target in targets.values() for width in (target.in_width, target.out_width)}
    arena = Arena(widths, budget_bytes, loaded.dtype, loaded.device)
    in_large_pages(arena.units_NU)
    return Residency(targets, arena)


def new_registry(loaded: Loaded, budget_bytes: int) -> Registry:
    """An empty registry with its arena, without cache and golden checks."""
    return Registry(loaded.base, new_residency(loaded, budget_bytes))


def assemble(config: ServeConfig, report: Report) -> Assembled:
    """Load the base and allocate the memory; the adapters follow once the engine runs.

    Raises:
        OptionError, ModelError, AdapterError: something the options name cannot be served.
    """
    keys, limits, quotas = keys_of(config), limits_of(config), quotas_of(config)
    adapters = tuple(parse_adapter(text) for text in config.adapter)
    require_possible(config, adapters)
    cache, sources = adapter_cache(config), open_sources(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # see own_the_processors
    loaded = load_base(config, report, native_engine(config, choose_device(config.device), threads, report))
    residency = new_residency(loaded, device_budget(config.adapter_memory, "adapter-memory", loaded.device))
    if isinstance(loaded, LoadedModel):
        steps = text_steps(config, loaded, residency, device_budget(config.kv_memory, "kv-memory", loaded.device))
        threads = threads if loaded.engine is None else 1  # torch's own would spin against the native backend's
    else:
        steps = vision_steps(config, loaded, residency)
    host = HostTier(host_budget(config))
    tiers = Tiers(residency, host, cache, loaded.base.fingerprint)
    return Assembled(loaded, residency, cache, tiers, adapters, steps, keys, sources, threads, report, limits, quotas)


def own_the_processors(engine: Engine) -> None:
    """Start the step thread as the only one that computes on all processors; every later thread gets one.

    OpenMP keeps a pool of threads per calling thread. With more of them than processors it stops spinning at barriers,
    and each step of the default model took 35 ms instead of 24 because the main thread had once computed something.
    """
    engine.start()
    torch.set_num_threads(1)


def _prepare_steps(steps: Steps, threads: int) -> None:
    """In the step thread: take the processors, then warm up, so that the first request does not pay for that."""
    torch.set_num_threads(threads)
    for plan in steps.warm_up:
        steps.runner.run(plan)


def keep_for_good() -> None:
    """Take what exists by now out of the collector's sight: looking through it stopped every stream for 0.24 s."""
    gc.collect()
    gc.freeze()


def run(config: ServeConfig, assembled: Assembled, ready: Callable[[list[str]], None]) -> None:
    """Serve until a signal ends it; `ready` hears the adapters' names once requests are answered."""
    asyncio.run(_run(config, assembled, ready))


async def _run(config: ServeConfig, assembled: Assembled, ready: Callable[[list[str]], None]) -> None:
    async with opened(config, assembled) as service:
        await asyncio.to_thread(publish_first, service.registry, assembled.adapters, assembled.report)
        settings = uvicorn.Config(
            create_app(service, assembled.limits),
            config.host,
            config.port,
            log_level=config.log_level,
            access_log=False,
            lifespan="off",
            http=patient_for(assembled.limits.body_timeout_s),
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        service.apply_quotas(service.registry.published())
        await warm_up(service)
        keep_for_good()
        names = [info.version.name for info in service.registry.published()]
        await DrainingServer(settings, service, config.drain_timeout, lambda: ready(names)).serve()


@contextlib.asynccontextmanager
async def opened(config: ServeConfig, assembled: Assembled, *, golden: bool = True) -> AsyncIterator[Service]:
    """The service with its engine running and no adapter loaded, until the block is left.

    Args:
        golden: whether golden log-probabilities are checked, and a lossy form's error is measured, before an adapter is
            published.
    """
    catalogue = open_catalogue(config, assembled.loaded.base)
    try:
        service = _service(config, assembled, catalogue, golden)
        own_the_processors(service.engine)
        try:
            yield service
        finally:
            assembled.sources.all.close()
            service.engine.stop()
    finally:
        assembled.tiers.stop()
        catalogue.close()


def _service(config: ServeConfig, assembled: Assembled, catalogue: Catalogue, golden: bool) -> Service:
    """Join engine and adapters; must run in the event loop that will serve."""
    steps, residency, loop = assembled.steps, assembled.residency, asyncio.get_running_loop()
    streams = Streams(loop)
    adapter_quotas, key_quotas = assembled.quotas
    shares = Fair(lambda party: adapter_quotas.weight(party or steps.info.name))
    policy = shares if config.policy == "fair" else Fcfs()
    scheduler = Scheduler(BlockPool(steps.blocks, steps.block_size), steps.limits, assembled.tiers, policy)

    def end_lease(lease: EngineLease) -> None:
        assert isinstance(lease, Lease)
        registry.release(lease)

    prepare = functools.partial(_prepare_steps, steps, assembled.threads)
    engine = Engine(scheduler, steps.runner, streams.publish, end_lease, prepare)
    assembled.tiers.listen(engine.wake)
    check = score = None
    scorer = Scorer(steps.info, engine, streams)
    if golden:
        check = golden_check(scorer, loop)
        score = no_score if steps.tokenizer is None else text_score(scorer, loop, steps.tokenizer)
    sources, resolve = assembled.sources, assembled.sources.all.folders
    registry = Registry(
        assembled.loaded.base, residency, assembled.cache, check, score, assembled.tiers, catalogue, resolve
    )
    sources.keep_what_is_in(catalogue)
    service = Service(
        base=steps.info,
        tokenizer=steps.tokenizer,
        registry=registry,
        engine=engine,
        streams=streams,
        merging=Merging(registry, scorer, steps.inputs, in_flight=2 * steps.limits.generations),
        classifying=Classifying(steps.info, registry, scorer, steps.inputs),
        metrics=with_rows(everything(lambda: engine.state, assembled.tiers, registry, steps.info.name), steps.paths),
        keys=assembled.keys,
        max_waiting=config.max_waiting,
        adapter_quotas=adapter_quotas,
        key_quotas=key_quotas,
    )
    if sources.autoload is not None:
        service.autoload = autoloading(service, sources.autoload, config.autoload_wait)
    return service


def lower_alone(
    config: ServeConfig, folder: Path, declared: Declared, report: Report
) -> tuple[Loaded, Lowered, Receipt]:
    """Lower an adapter for the base model that the options name, without serving it.

    Raises:
        ModelError, AdapterError: the base or the adapter cannot be served.
    """
    loaded = load_base(config, report)
    return loaded, *Registry(loaded.base, new_residency(loaded, budget_bytes=0)).examine(folder, declared)
