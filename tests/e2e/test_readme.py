"""The README's examples run as they stand, against a server with the example adapters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import examples
from tests.e2e.process import Server

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "http://127.0.0.1:8000"


def _block(language: str, mark: str) -> str:
    """The one code block of that language that contains the mark."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL) if mark in text]
    assert len(found) == 1, f"{len(found)} {language} blocks contain {mark!r}"
    return found[0]


@pytest.fixture
def here(server: Server) -> str:
    """The running server's address, in place of the README's."""
    return f"http://127.0.0.1:{server.port}"


def test_curl_example(here: str) -> None:
    command = _block("sh", "curl ").replace(ADDRESS, here)
    done = subprocess.run(
        ["sh", "-c", command.replace("curl ", "curl -sS ")], capture_output=True, text=True, timeout=60
    )
    answer = json.loads(done.stdout)
    assert answer["model"] == "wikisql"
    assert answer["choices"][0]["message"]["content"].startswith("SELECT")


def test_python_example(here: str) -> None:
    script = _block("python", "OpenAI").replace(ADDRESS, here)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked = [name for name in examples() if f'"{name}"' in script]
    assert len(asked) >= 3
    for name in asked:
        assert re.search(rf"^{name}: \S", done.stdout, re.MULTILINE), done.stdout


def test_the_tree_names_what_exists() -> None:
    tree = _block("text", "kernels/")
    named = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert len(named) == 7
    assert all((README.parent / name).is_dir() for name in named)


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert targets
    missing = [target for target in targets if "://" not in target and not (README.parent / target).exists()]
    assert not missing
