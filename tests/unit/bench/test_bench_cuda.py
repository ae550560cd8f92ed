from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench.bench_cuda import main

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_whole_script_runs_at_toy_sizes(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_cuda", "--dry", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["copy", "low_rank", "tiles", "decode", "decode"]
    assert {line["device"] for line in lines} == {"dry"}
    product, tiles = lines[1]["results"], lines[2]["results"]
    assert set(product["times_ms"]) == {"triton", "loop", "padded"}
    assert product["bytes_read"] == 4 * (2 * 16 * (32 + 48) + 3 * 32 + 2 * 3 * 48)
    times = [choice["took_ms"] for choice in tiles["choices"]]
    assert len(times) == 2
    assert times == sorted(times)
    assert [line["results"]["batch"] for line in lines[3:]] == [1, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out.jsonl")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
