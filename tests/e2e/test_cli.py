"""The command line against a running server, and what it prints for programs."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from motet.server.cli import cli, main
from tests.e2e.process import ADMIN_KEY, Server, environment, free_port

MOTET = str(Path(sys.executable).with_name("motet"))


@pytest.fixture
def motet(monkeypatch: pytest.MonkeyPatch, server: Server) -> Iterator[Any]:
    """Calls a command on the running server as its administrator."""
    monkeypatch.setenv("MOTET_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("MOTET_URL", server.url)

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(cli, arguments, catch_exceptions=False)

    yield call
    if "from-cli" in server.models:
        server.unload("from-cli")


def test_version() -> None:
    done = subprocess.run([MOTET, "version"], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == importlib.metadata.version("motet")
    assert done.stderr == ""


def test_the_life_of_an_adapter(motet: Any, server: Server) -> None:
    models = set(server.models)
    loaded = motet("adapters", "load", "from-cli", "random-c", "--json")
    assert loaded.exit_code == 0, loaded.output
    assert json.loads(loaded.stdout) == server.models["from-cli"]

    rows = json.loads(motet("adapters", "list", "--json").stdout)
    assert {row["id"] for row in rows} == {*models, "from-cli"} - {server.base}
    assert all(row["parent"] == server.base for row in rows)
    table = motet("adapters", "list").stdout
    assert all(row["id"] in table and row["adapter"]["version"][:12] in table for row in rows)

    again = motet("adapters", "load", "from-cli", "random-a")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "400: adapter 'from-cli' is already loaded" in again.stderr
    replaced = motet("adapters", "load", "from-cli", "random-a", "--replace")
    assert replaced.exit_code == 0
    assert server.models["from-cli"]["adapter"]["version"] == server.models["tenant/a"]["adapter"]["version"]

    unloaded = motet("adapters", "unload", "from-cli", "--json")
    assert json.loads(unloaded.stdout) == {"unloaded": "from-cli"}
    assert set(server.models) == models
    assert motet("adapters", "unload", "from-cli").exit_code == 1


def test_publishing_rolling_back_and_deleting(motet: Any, server: Server) -> None:
    first = json.loads(motet("adapters", "publish", "from-cli", "random-a", "--new", "--json").stdout)
    assert first["version"] == server.models["from-cli"]["adapter"]["version"]
    taken = motet("adapters", "publish", "from-cli", "random-b", "--new")
    assert (taken.exit_code, taken.stdout) == (1, "")
    assert "409: adapter 'from-cli' is published already" in taken.stderr
    moved = motet("adapters", "publish", "from-cli", "random-b", "--if-match", first["version"], "--pin")
    second = server.models["tenant/b"]["adapter"]["version"]
    assert moved.stdout == f"from-cli is at version {second[:12]}\n"
    for command in (("publish", "from-cli", "random-c"), ("rollback", "from-cli"), ("delete", "from-cli")):
        refused = motet("adapters", *command, "--if-match", first["version"])
        assert "409: adapter 'from-cli' is at version" in refused.stderr
    wrong = motet("adapters", "publish", "from-cli", "random-a", "--sha256", second)
    assert "409: the source of adapter 'from-cli' has digest" in wrong.stderr
    back = json.loads(motet("adapters", "rollback", "from-cli", "--json").stdout)
    assert (back["version"], back["pinned"]) == (first["version"], True)
    assert json.loads(motet("adapters", "rollback", "from-cli", "--to", second[:12], "--json").stdout)["leases"] == 0
    gone = motet("adapters", "delete", "from-cli", "--wait", "5")
    assert gone.stdout == f"deleted from-cli ({second[:12]})\n"
    assert "from-cli" not in server.models


def test_a_wrong_admin_key(motet: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTET_ADMIN_KEY", "wrong")
    result = motet("adapters", "unload", "tenant/a")
    assert result.exit_code == 1
    assert "401" in result.stderr
    assert "wrong" not in result.output, "keys are never printed"
    assert "tenant/a" in server.models


def test_no_server_there(motet: Any) -> None:
    result = motet("adapters", "list", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "is the server running" in result.stderr


def test_inspect(tiny_model: Path, tiny_adapter: Path) -> None:
    arguments = ["adapters", "inspect", str(tiny_adapter), "--model", str(tiny_model)]
    result = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["method"], facts["ranks"], facts["exact"]) == ("lora", [4, 4], True)
    assert (facts["targets_matched"], facts["targets_expected"], len(facts["relative_norms"])) == (21, 21, 21)
    assert len(facts["digest"]) == 64
    table = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert facts["digest"] in table.replace("\n", "")


def test_inspect_refuses_what_serving_would(
    tiny_model: Path, adapter_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["motet", "adapters", "inspect", str(adapter_root / "random-a"), "--model", str(tiny_model), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error  ")


def test_a_start_reports_each_stage_and_a_summary(tiny_server: Server) -> None:
    computes, *lines = [" ".join(line.split()) for line in tiny_server.log.read_text().splitlines()]
    assert computes.startswith(("· native CPU backend: ", "· computing with torch alone, "))
    assert lines[:2] == ["· loading tiny", "· loading adapter tuned"]
    summary = dict(line.split(" ", 1) for line in lines[2:] if " " in line)
    assert summary["model"].startswith("tiny ")
    assert (summary["dtype"], summary["device"], summary["adapters"]) == ("float32", "cpu", "tuned")
    assert "of 16 positions" in next(line for line in lines if line.startswith("KV blocks"))
    assert summary["address"] == tiny_server.url
    command = next(line for line in lines if line.startswith("curl "))
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert json.loads(answer.stdout)["model"] == "tuned"


def test_a_start_without_a_model() -> None:
    command = [MOTET, "serve", "--port", str(free_port()), "--model", "/does/not/exist"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error  model 'exist' cannot be loaded")
    assert "Traceback" not in done.stderr
