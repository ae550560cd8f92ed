import json
from pathlib import Path

import pytest

from tests.bench.sweep import main
from tests.unit.bench.fake_server import FakeModels, in_thread


def test_each_case_is_compared_with_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    with in_thread(FakeModels(adapters=4)) as fake:
        arguments = f"--url {fake.url} --adapters 0,1,3 --concurrency 1,2 --repeats 2 --min-requests 4 --out {out}"
        assert main([*arguments.split(), "--prompt-tokens", "9", "--output-tokens", "3"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    cases = [(r["arguments"]["concurrency"], r["arguments"]["models"]) for r in records]
    one_turn = [(c, m) for c in (1, 2) for m in (["base"], ["a00"], ["a00", "a01", "a02"])]
    assert cases == one_turn * 2
    prompts = [str(body["prompt"]) for body in fake.bodies]
    assert len(set(prompts)) == len(prompts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["conc", "adapters"]
    assert [line.split()[:2] for line in lines[1:7]] == [[c, a] for c in ("1", "2") for a in ("base", "1", "3")]
    rates = [[r["results"]["output_tokens_per_s"] for r in records[case::6]] for case in range(6)]
    for case, base in ((2, 0), (5, 3)):  # both with three adapters, each against the base of its own concurrency
        ratio = sum(rates[case]) / sum(rates[base])
        assert float(lines[1 + case].split()[3]) == pytest.approx(ratio, abs=0.001)
        assert float(lines[1 + base].split()[3]) == 1


def test_too_few_adapters_is_said_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(FakeModels(adapters=2)) as fake:
        assert main(f"--url {fake.url} --adapters 0,8 --concurrency 1".split()) == 2
    assert fake.bodies == []
    assert "8 adapters asked, the server lists 2" in capsys.readouterr().err


def test_without_the_base_there_are_no_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(FakeModels(adapters=1)) as fake:
        assert main(f"--url {fake.url} --adapters 1 --concurrency 1 --output-tokens 2 --cold".split()) == 0
    assert len(fake.bodies) == 16
    assert capsys.readouterr().out.splitlines()[1].split()[3] == "-"
