import subprocess
from pathlib import Path

import pytest

from tests.bench import machine
from tests.bench.machine import Machine


def test_here_knows_the_machine() -> None:
    here = Machine.here()
    assert here.cpu
    assert 1 <= here.cores <= here.cores_online
    assert here.python.startswith("3.")


def test_commit_and_uncommitted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert (Machine.here().git_commit, Machine.here().git_dirty) == (None, None)

    def git(*arguments: str) -> str:
        named = ("-c", "user.name=n", "-c", "user.email=e", "-c", "core.hooksPath=none", *arguments)
        done = subprocess.run(["git", "-C", tmp_path, *named], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = Machine.here()
    assert clean.git_commit == git("rev-parse", "HEAD")
    assert clean.git_dirty is False
    (tmp_path / "new").touch()
    assert Machine.here().git_dirty is True
