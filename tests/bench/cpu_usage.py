"""Where the processor's time went during a run: client, server, everything else, and the hypervisor.

Knows nothing of requests. Linux only (/proc); elsewhere `CpuMeter` measures the client alone.
"""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

_PROC = Path("/proc")


@dataclass(frozen=True)
class CpuUsage:
    """Percentages are of the whole machine (all cores), except the client's own, which is of one core.

    Args:
        server_s: of the server process and its descendants alive at the end; None unless its pid was given.
        other_s: busy time that is neither the client's nor, where known, the server's.
        other_percent: without a server pid this contains the server.
    """

    client_s: float
    client_core_percent: float
    server_s: float | None
    other_s: float | None
    busy_percent: float | None
    other_percent: float | None
    steal_percent: float | None


@dataclass(frozen=True)
class _Ticks:
    total: int
    busy: int
    steal: int

    @classmethod
    def parse(cls, stat: str) -> "_Ticks":
        # cpu user nice system idle iowait irq softirq steal …; guest time is inside user
        user, nice, system, idle, iowait, irq, softirq, steal = (int(n) for n in stat.split()[1:9])
        busy = user + nice + system + irq + softirq
        return cls(total=busy + idle + iowait + steal, busy=busy, steal=steal)


class CpuMeter:
    """Started when made; `stop` reads the difference."""

    def __init__(self, server_pid: int | None = None) -> None:
        self._server_pid = server_pid
        self._server_s = None if server_pid is None else _tree_cpu_s(server_pid)
        self._ticks = _machine_ticks()
        self._client_s = _own_cpu_s()
        self._start_s = perf_counter()

    def stop(self) -> CpuUsage:
        elapsed_s = perf_counter() - self._start_s
        client_s = _own_cpu_s() - self._client_s
        ticks = _machine_ticks()
        server_s = None
        if self._server_pid is not None and self._server_s is not None:
            server_s = _tree_cpu_s(self._server_pid) - self._server_s
        other_s = busy = other = steal = None
        if ticks is not None and self._ticks is not None and ticks.total > self._ticks.total:
            total = ticks.total - self._ticks.total
            total_s = total / os.sysconf("SC_CLK_TCK")
            busy_s = (ticks.busy - self._ticks.busy) / os.sysconf("SC_CLK_TCK")
            # ticks are coarser than the client's own clock, so the difference may come out just below zero
            other_s = max(0.0, busy_s - client_s - (server_s or 0.0))
            busy, other = 100 * busy_s / total_s, 100 * other_s / total_s
            steal = 100 * (ticks.steal - self._ticks.steal) / total
        return CpuUsage(
            client_s=client_s,
            client_core_percent=100 * client_s / elapsed_s,
            server_s=server_s,
            other_s=other_s,
            busy_percent=busy,
            other_percent=other,
            steal_percent=steal,
        )


def _machine_ticks() -> _Ticks | None:
    stat = _PROC / "stat"
    return _Ticks.parse(stat.read_text().splitlines()[0]) if stat.exists() else None


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _tree_cpu_s(pid: int) -> float:
    """CPU of a process, its living descendants and those they have waited for.

    Raises:
        ProcessLookupError: no such process.
    """
    fields = dict(_process_fields())
    if pid not in fields:
        raise ProcessLookupError(f"server process {pid} does not exist; give the right --server-pid or none")
    tree, ticks = [pid], 0
    while tree:
        process = tree.pop()
        ticks += sum(fields[process][1:])
        tree += [child for child, (parent, *_) in fields.items() if parent == process]
    return ticks / os.sysconf("SC_CLK_TCK")


def _process_fields() -> Iterator[tuple[int, tuple[int, int, int, int, int]]]:
    """Each process: parent, own user and system ticks, waited-for children's user and system ticks."""
    for folder in _PROC.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # it ended meanwhile
        # the command name, in parentheses, may itself hold spaces and parentheses
        after_name = stat.rpartition(")")[2].split()
        parent, user, system, waited_user, waited_system = (int(after_name[i]) for i in (1, 11, 12, 13, 14))
        yield int(folder.name), (parent, user, system, waited_user, waited_system)
