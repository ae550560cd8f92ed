"""A server publishes from the hub, from web servers and from registries, and loads what requests name."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ADMIN_KEY, Server
from tests.support.file_server import FileServer, hub, oci_registry, push
from tests.unit.adapters.sources.conftest import tar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Served:
    server: Server
    pages: FileServer
    registry: FileServer
    files: dict[str, bytes]
    downloads: Path

    def put(self, name: str, source: str, **more: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return self.server.http.put(f"/v1/adapters/{name}", json={"source": source, **more}, headers=headers)

    def published(self, name: str, source: str, **more: str) -> str:
        """The digest that the name means now, which also answers."""
        response = self.put(name, source, **more)
        assert response.status_code in (200, 201), response.text
        self.server.complete(model=name, prompt="a", max_tokens=2)
        digest: str = self.server.models[name]["adapter"]["version"]
        return digest


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("sources")
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {name: (tiny_adapter / name).read_bytes() for name in names}
    repository = {"org/fr": {COMMIT: {**files, "README.md": b"hello"}}}
    with FileServer().running() as pages, oci_registry("t0ken") as registry, hub(repository, {"main": COMMIT}) as hubs:
        arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
        arguments += ["--adapter", f"tuned={tiny_adapter}", "--download-dir", str(place / "downloads")]
        for prefix in (f"{pages.url}/", f"oci://{registry.host}/", "hf://org/"):
            arguments += ["--adapter-source", prefix]
        arguments += ["--autoload", f"{pages.url}/auto/{{name}}", "--adapter-revisions", "floating"]
        arguments += ["--log-level", "debug"]
        variables = {"HF_ENDPOINT": hubs.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "s3cr3t"}
        server = Server(arguments, place / "log", MOTET_ADMIN_KEY=ADMIN_KEY, **variables)
        try:
            yield Served(server.wait_until_ready(), pages, registry, files, place / "downloads")
            log = server.log.read_text()
            assert "Traceback" not in log
            assert "s3cr3t" not in log
        finally:
            server.stop()


def test_every_kind_of_source_is_the_same_version(served: Served) -> None:
    packed = tar({f"fr/{name}": content for name, content in served.files.items()})
    served.pages.put_folder("/fr", served.files)
    served.pages.put("/stored.tar.gz", packed)
    served.pages.put("/fr.tar.gz", b"", status=302, location="/stored.tar.gz?signature=s3cr3t")
    layers: list[tuple[str, str | None, bytes]] = [
        ("application/octet-stream", name, content) for name, content in served.files.items()
    ]
    manifest = push(served.registry, "team/fr", layers)
    expected = served.server.models["tuned"]["adapter"]["version"]
    for number, source in enumerate(
        (
            f"{served.pages.url}/fr",
            f"{served.pages.url}/fr.tar.gz#sha256={hashlib.sha256(packed).hexdigest()}",
            f"oci://{served.registry.host}/team/fr@{manifest}",
            f"hf://org/fr@{COMMIT}",
            "hf://org/fr@main",
        )
    ):
        assert served.published(f"kind-{number}", source, sha256=expected) == expected
    assert len(list((served.downloads / "contents").iterdir())) == 1, "equal content is kept once"


def test_another_digest_than_the_pinned_one(served: Served) -> None:
    served.pages.put_folder("/fr", served.files)
    response = served.put("pinned", f"{served.pages.url}/fr", sha256="0" * 64)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adapter_source_changed")
    assert "pinned" not in served.server.models


def test_a_download_that_breaks_off_publishes_nothing_and_goes_on(served: Served) -> None:
    weights = "adapter_model.safetensors"
    served.pages.put_folder("/broken", served.files)
    served.pages.put(f"/broken/{weights}", served.files[weights], cut_at=[2000, 0, 0])
    response = served.put("broken", f"{served.pages.url}/broken")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert "broken" not in served.server.models
    served.pages.asked.clear()
    served.published("broken", f"{served.pages.url}/broken")
    assert "bytes=2000-" in [headers.get("range") for _, headers in served.pages.asked]


def test_the_first_request_loads_what_it_names(served: Served) -> None:
    served.pages.put_folder("/auto/late", served.files)
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"model": "late", "prompt": "a", "max_tokens": 2, "temperature": 0}
        answers.append(httpx.post(f"{served.server.url}/v1/completions", json=body, timeout=60))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    asked = [path for path in served.pages.paths() if path == "/auto/late/adapter_model.safetensors"]
    assert len(asked) == 1
    assert "late" in served.server.models


def test_what_is_not_there_is_asked_for_once(served: Served) -> None:
    for _ in range(3):
        response = served.server.post("/v1/completions", {"model": "absent", "prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert len([path for path in served.pages.paths() if path == "/auto/absent/adapter_config.json"]) == 2
    for name in ("../secret", "a/b", "%2e%2e", "a\0b", "a@b"):
        assert served.server.post("/v1/completions", {"model": name, "prompt": "a"}).status_code == 404
    assert not [path for path in served.pages.paths() if "secret" in path or "/a/" in path]


def test_what_is_there_and_refused_says_why(served: Served) -> None:
    served.pages.put_folder("/auto/bad", {**served.files, "adapter_config.json": b"{}"})
    response = served.server.post("/v1/completions", {"model": "bad", "prompt": "a"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "adapter_refused", "model")
