"""A server that starts on the catalogue of one that has ended serves what that one served, or says why not."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.process import ADMIN_KEY, END_S, Server

HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}
PROMPT = [1, 2, 3, 4]


def test_a_restart(tiny_model: Path, tiny_sources: list[Path], tmp_path: Path) -> None:
    root = shutil.copytree(tiny_sources[0].parent, tmp_path / "root")
    arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "16MiB"]
    arguments += ["--adapter-memory", "16MiB", "--adapter-root", str(root), "--catalogue", str(tmp_path / "names.db")]

    def started(log: str, *more: str) -> Server:
        return Server([*arguments, *more], tmp_path / log, MOTET_ADMIN_KEY=ADMIN_KEY)

    server = started("first", "--adapter", f"given={root / '0'}").wait_until_ready()
    for name, source in (("fr", "0"), ("fr", "1"), ("lost", "2"), ("given", "2")):
        body = {"source": source, "pin": name == "fr", "quota": {"weight": 2}}
        assert server.http.put(f"/v1/adapters/{name}", json=body, headers=HEADERS).status_code == 200
    listed = server.http.get("/v1/adapters", headers=HEADERS).json()["data"]
    before = {card["name"]: card for card in listed}
    said = server.complete(model="fr", prompt=PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"]

    second = started("second")
    assert second.process.wait(END_S) == 1
    second.http.close()
    log = (tmp_path / "second").read_text()
    assert "in use by another process" in log
    assert str(tmp_path) not in log.replace("\n", "")
    assert server.stop() == 0

    shutil.rmtree(root / "2")
    server = started("third", "--adapter", f"given={root / '0'}").wait_until_ready()
    listed = server.http.get("/v1/adapters", headers=HEADERS).json()["data"]
    after = {card["name"]: card for card in listed}
    assert {name: card["state"] for name, card in after.items()} == {"fr": "ready", "given": "ready", "lost": "failed"}
    for key in ("version", "versions", "pinned", "quota"):
        assert after["fr"][key] == before["fr"][key]
    assert after["given"]["version"] == before["given"]["versions"][1]["version"], "the option's folder"
    assert server.complete(model="fr", prompt=PROMPT, max_tokens=8, temperature=0)["choices"][0]["text"] == said
    refusal = server.post("/v1/completions", {"model": "lost", "prompt": PROMPT})
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "adapter_failed")
    assert str(tmp_path) not in refusal.text
    assert "adapter lost is not served" in (tmp_path / "third").read_text()
    assert server.stop() == 0
