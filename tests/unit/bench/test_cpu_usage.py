import os
import subprocess
import sys
from time import process_time

import pytest

from tests.bench import cpu_usage
from tests.bench.cpu_usage import CpuMeter


def burn(cpu_s: float) -> None:
    until_s = process_time() + cpu_s
    while process_time() < until_s:
        pass


def test_the_clients_own_time_is_measured() -> None:
    meter = CpuMeter()
    burn(0.05)
    usage = meter.stop()
    assert 0.05 <= usage.client_s < 0.2
    assert 0 < usage.client_core_percent <= 110
    assert usage.server_s is None


def test_the_servers_children_are_counted_as_the_server() -> None:
    program = (
        "import os, sys, time\n"
        "sys.stdin.readline()\n"
        "if os.fork() == 0:\n"
        "    while time.process_time() < 0.1: pass\n"
        "    print(flush=True); time.sleep(30)\n"
        "time.sleep(30)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            meter = CpuMeter(server.pid)
            server.stdin.write(b"\n")
            server.stdin.flush()
            server.stdout.readline()
            usage = meter.stop()
        finally:
            os.killpg(server.pid, 9)
    assert usage.server_s is not None
    assert usage.server_s >= 0.08


def test_a_missing_server_is_refused() -> None:
    with pytest.raises(ProcessLookupError, match="--server-pid"):
        CpuMeter(2**31)


def test_percentages_are_of_the_ticks_between(monkeypatch: pytest.MonkeyPatch) -> None:
    hz = os.sysconf("SC_CLK_TCK")
    stats = iter(
        ["cpu 100 0 50 1000 10 0 0 5 9 9", f"cpu {100 + 2 * hz} 0 {50 + hz} {1000 + 5 * hz} 10 0 {hz} {5 + hz} 9 9"]
    )
    monkeypatch.setattr(cpu_usage, "_machine_ticks", lambda: cpu_usage._Ticks.parse(next(stats)))
    monkeypatch.setattr(cpu_usage, "_own_cpu_s", iter([1.0, 2.0]).__next__)
    usage = CpuMeter().stop()
    assert usage.busy_percent == pytest.approx(40)
    assert usage.steal_percent == pytest.approx(10)
    assert usage.client_s == pytest.approx(1)
    assert usage.other_s == pytest.approx(3)
    assert usage.other_percent == pytest.approx(30)
