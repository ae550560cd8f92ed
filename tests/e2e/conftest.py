from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from motet.server.model.default_model import ensure_default_model
from tests.e2e import gated as gated_servers, headed as headed_servers, vision as vision_server
from tests.e2e.gated import Gated
from tests.e2e.headed import Headed
from tests.e2e.process import ADMIN_KEY, Server
from tests.support.layout import Layout
from tests.support.layouts import make
from tests.support.models import ALL_LINEARS, load_dense, save_peft, tiny_llama
from tests.support.tokenizer import byte_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
RANDOM_ADAPTERS = ("random-a", "random-b", "random-c")


def examples() -> dict[str, Path]:
    """The committed adapters."""
    return {file.parent.name: file.parent for file in sorted(EXAMPLES.glob("*/adapter_config.json"))}


def _save(model: Any, folder: Path, config: LoraConfig, seed: int, strength: float) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's matter
        return save_peft(model, folder, config, seed, strength)


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below it lie three adapters of the default model with random weights; nothing is loaded at the start."""
    root = tmp_path_factory.mktemp("adapters")
    model = load_dense(ensure_default_model(), torch.bfloat16)
    for seed, name in enumerate(RANDOM_ADAPTERS):
        config = LoraConfig(r=4 << seed, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        _save(model, root / name, config, seed, strength=0.1)
    return root


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, adapter_root: Path) -> Iterator[Server]:
    """The default model with the example adapters and two random ones.

    In float32, because tests compare answers that were computed in different batches.
    """
    adapters = {**examples(), "tenant/a": adapter_root / "random-a", "tenant/b": adapter_root / "random-b"}
    loaded = [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--dtype", "float32", "--adapter-root", str(adapter_root), *loaded]
    yield from _running(Server(arguments, log, MOTET_ADMIN_KEY=ADMIN_KEY))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama in float32."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Folder of an adapter of the random Llama."""
    folder = tmp_path_factory.mktemp("tiny-adapter")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEARS, task_type="CAUSAL_LM")
    return _save(load_dense(tiny_model, torch.float32), folder, config, seed=7, strength=0.3)


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[Path]:
    """Folders of four adapters of the random Llama, below one root."""
    root, model = tmp_path_factory.mktemp("tiny-sources"), load_dense(tiny_model, torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEARS, task_type="CAUSAL_LM")
    return [_save(model, root / str(seed), config, seed, strength=0.3) for seed in range(4)]


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path) -> Iterator[Server]:
    """The random Llama, "tiny", with its adapter, "tuned"."""
    log = tmp_path_factory.mktemp("tiny-server") / "log"
    arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
    yield from _running(Server([*arguments, "--adapter", f"tuned={tiny_adapter}"], log))


@pytest.fixture(scope="session")
def residual_layout(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_root: Path) -> Layout:
    """An adapter of the random Llama that was trained on a residual model, and says so nowhere in its folder."""
    model = load_dense(tiny_model, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's matter
        return make("pissa-residual", model, tiny_root / "on-residual", seed=11)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter root of the administered server."""
    return tmp_path_factory.mktemp("tiny-root")


@pytest.fixture(scope="session")
def administered(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    tiny_adapter: Path,
    tiny_root: Path,
    residual_layout: Layout,
) -> Iterator[Server]:
    """The random Llama, "tiny", with "tuned" and, by declaration, "on-residual"; adapters may come and go."""
    declared = f"on-residual={residual_layout.folder},residual={residual_layout.declared.residual}"
    arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
    arguments += ["--adapter", f"tuned={tiny_adapter}", "--adapter", declared, "--adapter-root", str(tiny_root)]
    log = tmp_path_factory.mktemp("administered") / "log"
    yield from _running(Server(arguments, log, MOTET_ADMIN_KEY=ADMIN_KEY))


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> Iterator[Gated]:
    """The random Llama, "tiny", with adapters whose factors each request gives."""
    yield from gated_servers.serving(tmp_path_factory.mktemp("gated"), tiny_model, tiny_tokenizer)


@pytest.fixture(scope="session")
def headed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> Iterator[Headed]:
    """The random Llama, "tiny", with adapters that have output heads."""
    yield from headed_servers.serving(tmp_path_factory.mktemp("headed"), tiny_model, tiny_tokenizer)


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[vision_server.Vision]:
    """A tiny vision transformer, "vit", with adapters and a pool."""
    yield from vision_server.serving(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return byte_tokenizer()


def _running(process: Server) -> Iterator[Server]:
    """The server of a session; after all tests it must be idle, end well, and never have failed."""
    try:
        yield process.wait_until_ready()
        process.wait_until_idle()
    finally:
        code = process.stop()
    log = process.log.read_text()
    assert code == 0, log
    assert "Traceback" not in log, log
