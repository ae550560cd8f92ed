"""Hostile adapters and requests: each is refused with its own error, in bounded time and memory, and leaves nothing.

The server is a process; what a refusal costs it is read from /proc.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.process import ADMIN_KEY, Server
from tests.support.file_server import FileServer
from tests.support.hostile_files import FILES, Refusal
from tests.support.hostile_sources import ARCHIVES, PAGES, SOURCES

MOST_CPU_S = 2.0
"""Of the server and its children, for one refusal; wall-clock time is the other tests' and machines' matter too."""
MOST_WALL_S = 20.0
MOST_BYTES = 96 << 20
"""Growth of the server's peak: the header of 10^6 tensors is a file of 61 MB."""
DOWNLOAD_S = 1.5


@dataclass(frozen=True)
class Hostile:
    server: Server
    root: Path
    pages: FileServer

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")

    def memory(self, name: str) -> int:
        lines = Path(f"/proc/{self.server.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """What happens inside costs the server little, and leaves no adapter."""
        before_bytes, cpu_s, wall_s = self.memory("VmRSS"), self.cpu_s(), time.monotonic()
        Path(f"/proc/{self.server.process.pid}/clear_refs").write_text("5")  # the peak begins anew
        yield
        assert self.cpu_s() - cpu_s < MOST_CPU_S
        assert time.monotonic() - wall_s < MOST_WALL_S
        assert self.memory("VmHWM") - before_bytes < MOST_BYTES
        assert set(self.server.models) == {"tiny"}

    def refuses(self, source: str, refusal: Refusal, name: str = "hostile") -> str:
        """The message."""
        with self.bounded():
            response = self.server.load(name, source)
        return self.checked(response, refusal)

    def checked(self, response: httpx.Response, refusal: Refusal) -> str:
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == refusal, error
        message: str = error["message"]
        assert len(message) < 1000
        assert str(self.root) not in message
        assert "s3cr3t" not in message
        return message


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Hostile]:
    place = tmp_path_factory.mktemp("hostile")
    root = place / "root"
    root.mkdir()
    with FileServer().running() as pages:
        arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
        arguments += ["--adapter-root", str(root), "--adapter-source", f"{pages.url}/allowed/"]
        arguments += ["--download-dir", str(place / "downloads"), "--download-timeout", str(DOWNLOAD_S)]
        server = Server(arguments, place / "log", MOTET_ADMIN_KEY=ADMIN_KEY)
        try:
            yield Hostile(server.wait_until_ready(), root, pages)
            log = server.log.read_text()
            assert "Traceback" not in log
            assert "s3cr3t" not in log
        finally:
            server.stop()


@pytest.fixture
def folder(hostile: Hostile, tiny_adapter: Path) -> Iterator[Path]:
    """An intact adapter below the root."""
    yield shutil.copytree(tiny_adapter, hostile.root / "adapter")
    shutil.rmtree(hostile.root / "adapter")


def test_there_are_enough() -> None:
    assert len(FILES) + len(ARCHIVES) + len(PAGES) + len(SOURCES) + len(NAMES) + len(BODIES) >= 60


@pytest.mark.parametrize("what", FILES)
def test_files(hostile: Hostile, folder: Path, what: str) -> None:
    spoil, refusal = FILES[what]
    spoil(folder)
    hostile.refuses("adapter", refusal)


def test_the_same_files_unspoilt(hostile: Hostile, folder: Path) -> None:
    assert hostile.server.load("intact", "adapter").status_code == 200
    assert hostile.server.unload("intact").status_code == 200


@pytest.mark.parametrize("where", ["here", "there"])
@pytest.mark.parametrize("what", ARCHIVES)
def test_archives(hostile: Hostile, tiny_adapter: Path, what: str, where: str) -> None:
    make, refusal = ARCHIVES[what]
    content = make({file.name: file.read_bytes() for file in tiny_adapter.iterdir() if file.is_file()})
    if where == "here":
        (hostile.root / "a.tar.gz").write_bytes(content)
        hostile.refuses("a.tar.gz", refusal)
    else:
        hostile.pages.put("/allowed/a.tar.gz", content)
        hostile.refuses(f"{hostile.pages.url}/allowed/a.tar.gz", refusal)


@pytest.mark.parametrize("what", PAGES)
def test_servers(hostile: Hostile, tiny_adapter: Path, what: str) -> None:
    change, refusal = PAGES[what]
    names = ("adapter_config.json", "adapter_model.safetensors")
    hostile.pages.put_folder("/allowed/fr", {name: (tiny_adapter / name).read_bytes() for name in names})
    change(hostile.pages)
    hostile.refuses(f"{hostile.pages.url}/allowed/fr", refusal)
    assert not [path for path in hostile.pages.paths() if not path.startswith("/allowed/")]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: ascii(source)[:50])
def test_sources(hostile: Hostile, source: str) -> None:
    (hostile.root.parent / "secret").mkdir(exist_ok=True)
    if not (hostile.root / "out").is_symlink():
        (hostile.root / "out").symlink_to(hostile.root.parent / "secret")
        (hostile.root / "loop").symlink_to("loop")
    asked = len(hostile.pages.asked)
    hostile.refuses(source.format(url=hostile.pages.url, host=hostile.pages.host), SOURCES[source])
    assert len(hostile.pages.asked) == asked


NAMES = [
    *("../x", "/x", "a b", "a\nb", "a\0b", "-x", ".x", "x" * 129, "ä", "ﬁ", "а", "a\u202eb", "a\u200bb", "\ufeffa"),
    *("🙂", "a%2e", "a\\b", "a#b", "a?b", "tiny"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names(hostile: Hostile, folder: Path, name: str) -> None:
    hostile.refuses("adapter", (400, "adapter_refused"), name)


FINE: dict[str, Any] = {"lora_name": "x", "lora_path": "adapter"}
BODIES: dict[str, bytes | dict[str, Any]] = {
    "nothing": b"",
    "half an object": b'{"lora_name": "x"',
    "a list": b"[]",
    "null": b"null",
    "no UTF-8": b'{"lora_name": "\xff"}',
    "100,000 levels": b'{"lora_name":' * 100_000,
    "a million brackets": b"[" * 10**6,
    "no path": {"lora_name": "x"},
    "no name": {"lora_path": "adapter"},
    "an empty name": {**FINE, "lora_name": ""},
    "an empty path": {**FINE, "lora_path": ""},
    "a name that is a number": {**FINE, "lora_name": 5},
    "a path that is a list": {**FINE, "lora_path": ["adapter"]},
    "an unknown field": {**FINE, "trust_remote_code": True},
    "a flag in words": {**FINE, "load_inplace": "perhaps"},
    "half of a surrogate pair": b'{"lora_name": "\\ud800", "lora_path": "adapter"}',
    "a path of half a pair": b'{"lora_name": "x", "lora_path": "\\ud800"}',
    "a form that is none": {**FINE, "approximate": "svd-0"},
}


@pytest.mark.parametrize("what", BODIES)
def test_bodies(hostile: Hostile, folder: Path, what: str) -> None:
    body = BODIES[what]
    headers = {"content-type": "application/json", "authorization": f"Bearer {ADMIN_KEY}"}
    with hostile.bounded():
        given: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = hostile.server.http.post("/v1/load_lora_adapter", headers=headers, **given)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["message"]
