"""How each server is started with adapters, and what a request of it says. Knows nothing of processes or load."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from tests.bench.peers import converted
from tests.bench.peers.environment import FOLDER, LLAMA_SDIST, LLAMA_SERVER, VLLM_PACKAGES, VLLM_PYTHON
from tests.bench.peers.registering import ADMIN_KEY

MOTET, LLAMA, VLLM, PEFT = "motet", "llama.cpp", "vllm", "peft"
IN_TURNS = "motet in turns"
"""Motet too, one server that is told of adapters and rid of them in turns."""
BASE = "base"
"""What every server calls its base model."""
_THREADS = 2
_PARALLEL = 32
_CONTEXT = 256
"""Tokens of a request, prompt and answer, and to spare."""
_FOR_A_THOUSAND = ("--adapter-memory", "8GiB", "--adapter-cache-size", "40GiB")
"""Adapters of 5 and 10 MB, and what is kept of them on disk; by default 139 are resident, and 10 GiB on disk."""


@dataclass(frozen=True)
class Launch:
    """One server.

    Attributes:
        environment: variables that it needs beside those of this process.
        health: path that answers 200 once requests are served.
        fields_of: model → what its requests say beside its name.
        version: of the program, for the record.
    """

    command: Sequence[str]
    health: str
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    fields_of: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


Build = Callable[[Path, Sequence[Path], int], Launch]
"""From the model's folder, the adapters' folders, each named as its adapter, and the port."""


def motet(model: Path, adapters: Sequence[Path], port: int) -> Launch:
    """The command of this environment; never without its compiled backend.

    With the memory it takes by default, unless there are more adapters than that holds.
    """
    arguments = ["--model", str(model), "--name", BASE, "--dtype", "bfloat16", "--port", str(port), "--native", "on"]
    arguments += ["--adapter-cache", str(FOLDER / "lowered"), *(_FOR_A_THOUSAND if len(adapters) > 64 else ())]
    for folder in adapters:
        arguments += ["--adapter", f"{folder.name}={folder}"]
    return Launch(
        [str(Path(sys.executable).with_name("motet")), "serve", *arguments],
        "/ready",
        version("motet"),
        {"HF_HUB_OFFLINE": "1"},
    )


def motet_in_turns(model: Path, adapters: Sequence[Path], port: int) -> Launch:
    """Motet whose adapters come and go by `registering`."""
    launch = motet(model, adapters, port)
    more = ["--adapter-root", str(FOLDER / "adapters")]
    return replace(
        launch, command=[*launch.command, *more], environment={**launch.environment, "MOTET_ADMIN_KEY": ADMIN_KEY}
    )


def llama(model: Path, adapters: Sequence[Path], port: int) -> Launch:
    """llama.cpp's own server. A request lists the adapters it wants; the others are off."""
    command = [str(LLAMA_SERVER), "--model", str(converted.model_file(model)), "--alias", BASE, "--port", str(port)]
    command += ["--threads", str(_THREADS), "--parallel", str(_PARALLEL), "--ctx-size", str(_PARALLEL * _CONTEXT)]
    command += ["--no-webui", "--cache-ram", "0"]
    if adapters:
        files = ",".join(map(str, converted.adapter_files(model, adapters)))
        command += ["--lora", files, "--lora-init-without-apply"]
    fields_of = {folder.name: {"lora": [{"id": index, "scale": 1}]} for index, folder in enumerate(adapters)}
    return Launch(command, "/health", LLAMA_SDIST, fields_of=fields_of)


def vllm(model: Path, adapters: Sequence[Path], port: int) -> Launch:
    """vLLM's CPU build."""
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", BASE, "--dtype", "bfloat16", "--port", str(port)]
    command += ["--max-model-len", str(_CONTEXT), "--max-num-seqs", str(_PARALLEL), "--disable-uvicorn-access-log"]
    if adapters:
        command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", str(min(len(adapters), _PARALLEL))]
        command += ["--max-cpu-loras", str(len(adapters))]
        command += ["--lora-modules", *(f"{folder.name}={folder}" for folder in adapters)]
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{_THREADS - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Launch(command, "/health", VLLM_PACKAGES[-1], environment)


BUILDS: Mapping[str, Build] = {MOTET: motet, IN_TURNS: motet_in_turns, LLAMA: llama, VLLM: vllm}
