"""A server process in a session of its own, at raised priority. Knows nothing of what it serves.

The kernel shares the processor between sessions first: a plain nice value means nothing against another session.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PRIORITY = -15
START_S = 900
"""vLLM compiles at its start, and a thousand adapters are read."""
END_S = 60
_POLL_S = 0.2


class StartError(RuntimeError):
    """A server did not come up."""


def go_first(pid: int | None = None) -> int | None:
    """Raise the priority of a process's session, of this process's without a pid; the nice value that it has then.

    Returns:
        None where the kernel has no such groups. 0 where they may not be raised.
    """
    file = Path("/proc", "self" if pid is None else str(pid), "autogroup")
    with contextlib.suppress(OSError):
        file.write_text(str(PRIORITY))
    try:
        return int(file.read_text().split()[-1])
    except OSError:
        return None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], health_url: str, log: Path) -> Iterator[int]:
    """The process's id while it serves; it is stopped at the end, with all that it started.

    Raises:
        StartError: it ended, or does not answer in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        go_first(process.pid)
        _wait(process, health_url, log)
        yield process.pid
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], health_url: str, log: Path) -> None:
    give_up_s = time.monotonic() + START_S
    while not _answers(health_url):
        if process.poll() is not None:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StartError(f"the server ended with {process.returncode}:\n{said}")
        if time.monotonic() > give_up_s:
            raise StartError(f"the server does not answer within {START_S} s; its log is {log.name}")
        time.sleep(_POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind
    process.wait()
