from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.bench import bench_peers
from tests.bench.assignment import Assignment
from tests.bench.peers import converted, parity, servers, table
from tests.bench.peers.cells import SETUPS, SETUPS_IN_TURNS, Cell, adapter_names, touch, workload
from tests.bench.peers.process import StartError, free_port, running
from tests.bench.peers.ratios import ratios
from tests.bench.workload import plan

TARGETS = 19


def record(
    server: str, registered: int, adapters: int, concurrency: int, rate: float, number: int = 0, failed: int = 0
) -> dict[str, Any]:
    arguments = {
        "server": server,
        "registered": registered,
        "adapters": adapters,
        "concurrency": concurrency,
        "round": number,
    }
    times = {"p50": 1 / rate, "p99": 100 / rate}
    results = {"output_tokens_per_s": rate, "failed": failed, "tpot_s": times, "ttft_s": times}
    return {"arguments": arguments, "cpu": {"other_percent": 3.0}, "results": results}


class TestRatios:
    def test_both_sides_are_of_one_round(self) -> None:
        records = [
            record("motet in turns", 64, 8, 32, rate, number) for number, rate in enumerate((90.0, 40.0, 10.0))
        ] + [record("motet in turns", 64, 0, 32, rate, number) for number, rate in enumerate((100.0, 80.0, 10.0))]
        tax = ratios(records)[0]
        assert tax.rounds == [0.9, 0.5, 1.0]
        assert tax.value == 0.9
        assert tax.met is True

    def test_what_was_not_measured_has_no_value(self) -> None:
        found = ratios([record("motet", 64, 8, 8, 50.0), record("peft", 8, 8, 8, 5.0, failed=1)])
        assert len(found) == TARGETS
        assert [one.what for one in found if one.value is not None] == ["TTFT p99 with 8 adapters, c8, s"]
        assert {one.met for one in found if one.value is None} == {None}

    def test_times_must_be_low(self) -> None:
        slow = [record("motet", 64, 0, 1, 50.0), record("llama.cpp", 0, 0, 1, 100.0)]
        (tpot,) = [one for one in ratios(slow) if one.value is not None]
        assert (tpot.what, tpot.value, tpot.met) == ("single-stream TPOT over llama.cpp's", 2.0, False)

    def test_every_target_is_measured_by_the_setups(self) -> None:
        everything = [
            record(setup.server, setup.registered, cell.adapters, cell.concurrency, 10.0)
            for setup in (*SETUPS, *SETUPS_IN_TURNS)
            for cell in setup.cells
        ]
        assert [one.what for one in ratios(everything) if one.value is None] == []


def test_a_table_says_which_targets_were_missed() -> None:
    records = [
        record("motet in turns", 64, 8, 32, 50.0),
        record("motet in turns", 64, 0, 32, 100.0),
        record("peft", 8, 8, 8, 7.0),
    ]
    end = {"results": [{**vars(one), "met": one.met} for one in ratios(records)]}
    assert "| adapter tax: 8 adapters over the base, c32 | ≥ 0.9 | 0.50, missed |" in table.ratios(end)
    assert "| 8 adapters over PEFT's mixed batch, c8 | ≥ 8 | not measured |" in table.ratios(end)
    assert "| motet in turns | 64 | 8 c32 | 50 | 20 ms | 20 ms | 2,000 ms | 3 % |" in table.speeds(records)


def test_every_server_gets_the_same_requests() -> None:
    for cell in {cell for setup in SETUPS for cell in setup.cells}:
        with_fields, without = (
            plan(workload(cell, "base", 2, 7, fields_of))
            for fields_of in ({name: {"lora": []} for name in adapter_names(cell.adapters)}, None)
        )
        assert [one.model for one in with_fields.measured] == [one.model for one in without.measured]
        prompts = [[json.loads(one.body)["prompt"] for one in planned.measured] for planned in (with_fields, without)]
        assert prompts[0] == prompts[1]
        assert len(with_fields.measured) >= 2 * cell.concurrency
    assert Cell(64, 8).assignment is Assignment.ZIPF


def test_a_setup_is_touched_before_it_is_measured() -> None:
    for setup in SETUPS:
        touched = {one.model for one in plan(touch(setup, "base", 1)).measured}
        for cell in setup.cells:
            assert touched >= set(adapter_names(min(64, cell.adapters)) or ("base",))


def test_a_request_of_llama_names_one_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(converted, "model_file", lambda model: model)
    monkeypatch.setattr(converted, "adapter_files", lambda model, adapters: list(adapters))
    folders = [tmp_path / name for name in adapter_names(3)]
    launch = servers.llama(tmp_path, folders, 1)
    one = plan(workload(Cell(3, 1), "base", 1, 0, launch.fields_of)).measured[1]
    assert (one.model, json.loads(one.body)["lora"]) == ("adapter-001", [{"id": 1, "scale": 1}])
    assert launch.command[-2] == ",".join(map(str, folders))
    assert "--lora" not in servers.llama(tmp_path, [], 1).command


class TestProcess:
    def test_it_runs_until_the_block_is_left(self, tmp_path: Path) -> None:
        port = free_port()
        command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path), str(port)]
        with running(command, {}, f"http://127.0.0.1:{port}/", tmp_path / "log") as pid:
            assert Path(f"/proc/{pid}").exists()
        assert not Path(f"/proc/{pid}").exists()

    def test_one_that_ends_says_why(self, tmp_path: Path) -> None:
        command = [sys.executable, "-c", "raise SystemExit('no such model')"]
        with (
            pytest.raises(StartError, match="no such model"),
            running(command, {}, "http://127.0.0.1:9/", tmp_path / "log"),
        ):
            pass


PROMPT = [5, 6]
BASE_SAYS = ["a", "b", "c", "d"]
ADAPTER_SAYS = ["a", "x", "y", "z"]


def expected() -> list[dict[str, Any]]:
    """PEFT's answers; the fourth token may be another."""
    return [
        {"model": model, "prompt": PROMPT, "tokens": tokens, "instead": [*([token] for token in tokens[:3]), last]}
        for model, tokens, last in (("base", BASE_SAYS, ["d", "q"]), ("tuned", ADAPTER_SAYS, ["z", "q"]))
    ]


@contextmanager
def saying(answers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert (body["prompt"], body["max_tokens"], body["temperature"]) == (PROMPT, 4, 0)
            choice = {"logprobs": {"tokens": list(answers[body["model"]])}}
            said = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class TestParity:
    def test_equal_answers_pass(self) -> None:
        with saying({"base": BASE_SAYS, "tuned": ADAPTER_SAYS}) as url:
            assert parity.check(url, expected(), "base") == parity.Parity(answers=2, tokens=8, complete=2, told=1)

    def test_a_near_token_ends_the_comparison(self) -> None:
        with saying({"base": BASE_SAYS, "tuned": ["a", "x", "y", "q"]}) as url, pytest.MonkeyPatch.context() as patch:
            patch.setattr(parity, "LEAST_FOLLOWED", 3)
            assert parity.check(url, expected(), "base") == parity.Parity(answers=2, tokens=7, complete=1, told=1)

    def test_another_token_is_refused(self) -> None:
        with (
            saying({"base": BASE_SAYS, "tuned": ["a", "x", "c", "z"]}) as url,
            pytest.raises(parity.ParityError, match="tuned says 'c' at token 2, PEFT in float32 'y'"),
        ):
            parity.check(url, expected(), "base")

    def test_an_adapter_without_effect_is_refused(self) -> None:
        with (
            saying({"base": BASE_SAYS, "tuned": BASE_SAYS}) as url,
            pytest.raises(parity.ParityError, match="tuned says 'b' at token 1"),
        ):
            parity.check(url, expected(), "base")

    def test_adapters_that_say_what_the_base_says_prove_nothing(self) -> None:
        same = [{**one, "tokens": BASE_SAYS, "instead": [[token] for token in BASE_SAYS]} for one in expected()]
        with (
            saying({"base": BASE_SAYS, "tuned": BASE_SAYS}) as url,
            pytest.raises(parity.ParityError, match="too little"),
        ):
            parity.check(url, same, "base")


class TestMain:
    def test_a_peer_that_is_not_there_is_skipped_with_its_reason(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(bench_peers, "MISSING", {"vllm": lambda: "not installed here"})
        monkeypatch.setattr(bench_peers, "adapter_folders", lambda model, count: [])
        monkeypatch.setattr(bench_peers, "go_first", lambda: None)
        out = tmp_path / "out.jsonl"
        arguments = ["--servers", "vllm", "--model", str(tmp_path), "--rounds", "1", "--out", str(out)]
        assert bench_peers.main(arguments) == 0
        assert "skipped vllm: not installed here" in capsys.readouterr().err
        (line,) = [json.loads(text) for text in out.read_text().splitlines()]
        assert line["skipped"] == {"vllm": "not installed here"}
        assert {one["value"] for one in line["results"]} == {None}

    def test_two_runs_are_not_mixed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out.jsonl"
        out.touch()
        assert bench_peers.main(["--out", str(out)]) == 2
        assert "exists" in capsys.readouterr().err
