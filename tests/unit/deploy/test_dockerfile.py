"""What the image holds and as whom it runs, read from the Dockerfile; hadolint checks its style."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str

    @property
    def arguments(self) -> list[str]:
        """Operands without --flags, of the shell or the JSON form."""
        if self.rest.startswith("["):
            return [str(item) for item in json.loads(self.rest)]
        return [item for item in shlex.split(self.rest) if not item.startswith("--")]


@dataclass(frozen=True)
class Stage:
    name: str | None
    base: str
    instructions: list[Instruction]

    def all(self, word: str) -> list[Instruction]:
        return [item for item in self.instructions if item.word == word]

    def last(self, word: str) -> Instruction:
        found = self.all(word)
        assert found, f"no {word}"
        return found[-1]

    @property
    def env(self) -> dict[str, str]:
        pairs = (pair.partition("=") for item in self.all("ENV") for pair in shlex.split(item.rest))
        return {name: value for name, _, value in pairs}


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Returns the build arguments before the first stage, and the stages."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    logical = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    build_args: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, logical)):
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name or None, base, []))
        elif not stages:
            assert word == "ARG", line
            key, _, value = rest.partition("=")
            build_args[key] = value
        else:
            stages[-1].instructions.append(Instruction(word, rest))
    return build_args, stages


BUILD_ARGS, STAGES = parse((ROOT / "Dockerfile").read_text())
BUILD, FINAL = STAGES
ALLOWED_IN_CONTEXT = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


def context_sources(stage: Stage) -> list[str]:
    copies = [item for item in stage.all("COPY") if "--from=" not in item.rest]
    return [source for item in copies for source in item.arguments[:-1]]


def test_both_stages_share_one_base_pinned_by_tag() -> None:
    assert BUILD.base == FINAL.base == "${PYTHON_IMAGE}"
    _image, _, tag = BUILD_ARGS["PYTHON_IMAGE"].partition(":")
    assert tag == "3.11-slim-bookworm"


def test_the_base_is_a_python_we_support() -> None:
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    found = re.search(r":(\d+)\.(\d+)", BUILD_ARGS["PYTHON_IMAGE"])
    least = re.fullmatch(r">=(\d+)\.(\d+)", floor)
    assert found
    assert least
    assert tuple(map(int, found.groups())) >= tuple(map(int, least.groups()))


def test_the_final_stage_takes_only_the_environment_of_the_build_stage() -> None:
    assert not FINAL.all("ADD")
    (copy,) = FINAL.all("COPY")
    assert copy.rest.startswith(f"--from={BUILD.name} ")
    assert copy.arguments == ["/opt/motet", "/opt/motet"]
    assert not any("pip " in item.rest for item in FINAL.all("RUN"))


def test_the_environment_holds_a_wheel_pinned_by_the_constraints() -> None:
    commands = " && ".join(re.sub(r"--mount=\S+\s*", "", item.rest) for item in BUILD.all("RUN"))
    assert "pip wheel . --no-deps --wheel-dir /wheels" in commands
    assert "/opt/motet/bin/pip install -c constraints.txt /wheels/*.whl" in commands
    assert " -e " not in commands


def test_the_build_context_is_named_piece_by_piece() -> None:
    sources = context_sources(BUILD)
    assert "." not in sources
    assert set(sources) == ALLOWED_IN_CONTEXT
    missing = [source for source in sources if not (ROOT / source).exists()]
    assert not missing


def test_everything_is_ignored_unless_allowed() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"


def test_the_build_stage_gets_all_that_setuptools_reads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    wanted |= set(project["tool"]["setuptools"]["package-dir"].values())
    assert wanted <= set(context_sources(BUILD))


def test_the_user_is_a_number_and_not_root() -> None:
    user, _, group = FINAL.last("USER").rest.partition(":")
    assert int(user) > 0
    assert int(group) > 0
    position = FINAL.instructions.index(FINAL.last("USER"))
    assert not [item for item in FINAL.instructions[position:] if item.word in {"RUN", "COPY"}]


def test_the_environment_variables() -> None:
    env = FINAL.env
    assert env["PYTHONSAFEPATH"] == "1"
    assert env["PYTHONUNBUFFERED"] == "1"
    assert env["XDG_CACHE_HOME"] == "/cache"
    assert env["PATH"].startswith("/opt/motet/bin:")
    # One would silently override what a mounted motet.toml says.
    assert not [name for name in env if name.startswith("MOTET_")]


def test_the_cache_is_a_volume_that_the_user_owns() -> None:
    user, _, group = FINAL.last("USER").rest.partition(":")
    assert FINAL.last("VOLUME").rest == FINAL.env["XDG_CACHE_HOME"] == FINAL.env["HOME"]
    assert f"install --directory --owner {user} --group {group} /cache" in FINAL.last("RUN").rest


def test_it_starts_the_console_script_itself() -> None:
    """The JSON form: a shell as process 1 would swallow SIGTERM, and nothing would drain."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entry = FINAL.last("ENTRYPOINT")
    assert entry.rest.startswith("[")
    assert FINAL.last("CMD").rest.startswith("[")
    assert entry.arguments[0] in scripts
    assert FINAL.last("CMD").arguments == ["serve", "--host", "0.0.0.0"]
    assert FINAL.last("EXPOSE").rest == "8000"


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_runs(status: int, healthy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, _, command = FINAL.last("HEALTHCHECK").rest.partition("CMD ")
    assert "--start-period=" in flags
    python, *arguments = json.loads(command)
    assert python == "python"
    monkeypatch.setattr(_Health, "status", status)
    with HTTPServer(("127.0.0.1", 0), _Health) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        # A proxy that refuses: the check must not ask it about ourselves.
        env = {"MOTET_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, check=False)
        server.shutdown()
        thread.join()
    assert (done.returncode == 0) is healthy, done.stderr.decode()
