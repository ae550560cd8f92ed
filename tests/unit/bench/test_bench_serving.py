import json
from pathlib import Path

import pytest

from tests.bench.bench_serving import main
from tests.unit.bench.fake_server import FakeModels, in_thread


def test_a_closed_loop_run_writes_a_full_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    requests_out = tmp_path / "requests.jsonl"
    with in_thread(FakeModels(adapters=3, token_delay_s=0.002, hold_until=4)) as fake:
        arguments = (
            f"--url {fake.url}/v1 --api-key secret --models-from-server --concurrency 4 --requests 12 --warmup 6 "
            f"--prompt-tokens 10 --output-tokens 5 --label here --slo-ttft-s 5 --seed 8 "
            f"--out {out} --requests-out {requests_out}"
        ).split()
        assert main(arguments) == 0
        assert main(arguments) == 0
    assert fake.most_in_flight == 4
    assert set(fake.authorizations) == {"bearer secret"}
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    results = first["results"]
    assert (results["succeeded"], results["failed"], results["models_used"]) == (12, 0, 3)
    assert (results["output_tokens"], results["prompt_tokens"]) == (60, 120)
    assert results["tpot_s"]["p50"] >= 0.002
    assert set(results["itl_s"]) == {"mean", "p50", "p90", "p99"}
    assert results["slo_attainment"] == 1
    assert first["label"] == "here"
    assert first["server_version"] == {"version": "fake-1"}
    assert first["arguments"]["models"] == ["a00", "a01", "a02"]
    assert first["arguments"]["api_key"] == "given"
    assert first["cpu"]["client_s"] > 0
    assert {"machine", "load_before", "utc"} <= set(first)
    assert second["arguments"] == first["arguments"]
    rows = [json.loads(line) for line in requests_out.read_text().splitlines()]
    assert len(rows) == 24
    assert len(rows[0]["chunk_times_s"]) == 5
    assert "secret" not in out.read_text()
    shown = capsys.readouterr().out
    assert "output tokens/s" in shown
    assert "TTFT" in shown


def test_an_open_loop_does_not_wait_for_answers() -> None:
    with in_thread(FakeModels(hold_until=12)) as fake:
        assert main(f"--url {fake.url} --rate 500 --requests 12 --output-tokens 2 --timeout-s 10".split()) == 0
    assert fake.most_in_flight == 12
    assert {body["model"] for body in fake.bodies} == {"base"}


def test_a_gamma_run_with_text_prompts() -> None:
    with in_thread(FakeModels(adapters=2)) as fake:
        shape = "--prompt-kind text --assignment zipf --zipf-alpha 2 --burstiness gamma --cv 2"
        assert main(f"--url {fake.url} --models a00,a01 --rate 900 --requests 9 --output-tokens 2 {shape}".split()) == 0
    assert all(isinstance(body["prompt"], str) for body in fake.bodies)


def test_prompts_differ_between_runs_without_a_seed() -> None:
    with in_thread(FakeModels()) as fake:
        for _ in range(2):
            assert main(f"--url {fake.url} --concurrency 1 --requests 1 --output-tokens 1".split()) == 0
    assert fake.bodies[0]["prompt"] != fake.bodies[1]["prompt"]


def test_one_failure_makes_the_run_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    with in_thread(FakeModels()) as fake:
        arguments = f"--url {fake.url} --models base,refusing --concurrency 2 --requests 4 --out {out}"
        assert main(arguments.split()) == 1
        assert main([*arguments.split(), "--warmup", "2"]) == 2
    (record,) = (json.loads(line) for line in out.read_text().splitlines())
    assert record["results"]["errors"] == {"http_status": 2}
    shown = capsys.readouterr()
    assert "ERROR http_status: 2" in shown.out
    assert "nothing measured: refusing: http_status: 500" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--models-from-server --concurrency 1", "no model with a parent"),
        ("--models x --rate 1 --burstiness gamma", "--cv go together"),
        ("--models x --rate 1 --cv 2", "--cv go together"),
        ("--models x --concurrency 1 --burstiness gamma --cv 2", "open loop"),
        ("--models x --concurrency 0", "concurrency 0"),
        ("--models x --concurrency 1 --server-pid 2147483648", "--server-pid"),
        ("--models x --concurrency 1 --assignment distinct", "distinct"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(FakeModels()) as fake:
        assert main(f"--url {fake.url} {arguments}".split()) == 2
    assert message in capsys.readouterr().err
