"""What a figure was measured with: the machine, the interpreter, the commit. Knows nothing of requests."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The client's surroundings.

    Args:
        cores: usable by this process; `cores_online` are those of the machine.
        git_dirty: uncommitted or untracked files; both git fields are None outside a checkout with a commit.
    """

    cpu: str
    cores: int
    cores_online: int
    python: str
    git_commit: str | None
    git_dirty: bool | None

    @classmethod
    def here(cls) -> "Machine":
        commit = _git("rev-parse", "--verify", "HEAD")
        status = _git("status", "--porcelain")
        return cls(
            cpu=_cpu_model(),
            cores=len(os.sched_getaffinity(0)),
            cores_online=os.cpu_count() or 1,
            python=platform.python_version(),
            git_commit=commit,
            git_dirty=None if status is None else bool(status),
        )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
