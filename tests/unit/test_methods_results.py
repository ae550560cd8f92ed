"""The tables of docs/methods.md that are drawn from result files other than the claims'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "methods.md"


def results(name: str) -> list[dict[str, Any]]:
    """The lines of a result file, each measured with a clean commit."""
    lines = [json.loads(line) for line in (DOCS / "results" / name).read_text().splitlines()]
    assert lines
    assert not any(line["machine"]["git_dirty"] for line in lines)
    return lines


def sparse_table(lines: list[dict[str, Any]]) -> str:
    """Switching an adapter and serving eight, by width, in float32."""
    table = [
        "| width | bytes of S = 32, rank 16, rank 32 | write into the weight, µs: columns, rows, rank 16, rank 32 "
        "| 8 adapters on 32 rows, µs: columns, rows, rank 16, rank 32 |",
        "| --- | --- | --- | --- |",
    ]
    for line in lines:
        if line["arguments"]["dtype"] != "float32":
            continue
        work = {
            (each["effect"], each["rank"]): each for each in line["work"] if (each["rows"], each["adapters"]) == (32, 8)
        }
        switch = {
            (each["effect"], each["rank"]): each["write"]["median_us"]
            for each in line["switch"]
            if each["restore_by"] == "copy"
        }
        kinds = [("column", 32), ("row", 32), ("lora", 16), ("lora", 32)]
        sizes = (f"{work[kind]['operand_bytes'] // 8:,}" for kind in (kinds[0], *kinds[2:]))
        written = (f"{switch[kind]:,.0f}" for kind in kinds)
        steps = (f"{work[kind]['step']['median_us']:,.0f}" for kind in kinds)
        table.append(
            f"| {line['arguments']['width']} | {' · '.join(sizes)} | {' · '.join(written)} | {' · '.join(steps)} |"
        )
    return "\n".join(table)


def memory_table(lines: list[dict[str, Any]]) -> str:
    """What training keeps beside the base, by method."""
    table = [
        "| method | parameters at a time | gradients, MB | optimiser, MB | largest resident memory, MB "
        "| processor seconds a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        found = line["results"]
        cells = (
            line["label"],
            f"{found['trained']:,}",
            f"{found['gradient_bytes'] / 1e6:,.1f}",
            f"{found['moment_bytes'] / 1e6:,.1f}",
            f"{found['peak_bytes'] / 1e6:,.0f}",
            f"{median(found['step_cpu_s']):.2f}",
        )
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def emtal_latency_table(lines: list[dict[str, Any]]) -> str:
    """Medians of the training form and of served decode steps."""
    ways = ("base", "lora", "emtal, router active", "emtal, router faded")
    table = [
        "| what runs, ms | base | LoRA, rank 4 | EMTAL, router active | EMTAL, faded |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        for batch, found in line["results"].items():
            cells = (f"{found[way]['median_ms']:,.1f}" if way in found else "–" for way in ways)
            table.append(f"| {line['arguments']['form']}, {batch} | {' | '.join(cells)} |")
    return "\n".join(table)


def emtal_quality_table(lines: list[dict[str, Any]]) -> str:
    """Accuracy and loss over the label words, by run and task; the runs of one task each stand in one row."""
    tasks = ("boolq", "wikisql-aggregate", "advising-kind")
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        arguments = line["arguments"]
        name = {"base": "base, told the form", "emtal": "EMTAL", "lora": "LoRA on all three"}[arguments["method"]]
        name += "" if arguments["retaining"] else " without quality retaining"
        name = name if "+" in arguments["task"] else "LoRA, one a task"
        rows.setdefault(name, {}).update(line["results"]["tasks"])
    table = [f"| run | {' | '.join(f'{task}: accuracy, loss' for task in tasks)} |", "| --- | --- | --- | --- |"]
    for name, found in rows.items():
        cells = (
            f"{one['accuracy']:.3f} ± {one['accuracy_standard_error']:.3f}, {one['loss']:.2f}"
            for one in (found[task] for task in tasks)
        )
        table.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(table)


def lossy_table(lines: list[dict[str, Any]]) -> str:
    """What each form of a full fine-tune takes and misses."""
    table = [
        "| fine-tune | form | bytes | seconds to load | ‖Δ - Δ̂‖/‖Δ‖ | difference of log-probabilities: mean, largest "
        "| decode step, ms: 1, 8 rows |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        for found in line["results"]:
            error, steps = found["logprob_error"], found["decode_ms"]
            cells = (
                line["arguments"]["fine_tune"],
                found["form"],
                f"{found['resident_bytes']:,}" if found["resident_bytes"] else "–",
                f"{found['load_s']:.1f}" if found["load_s"] else "–",
                f"{found['missed']:.3f}" if found["missed"] else "–",
                f"{error['mean']:.3f}, {error['largest']:.2f}" if error else "–",
                f"{steps['1']:.0f}, {steps['8']:.0f}",
            )
            table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def gate_table(lines: list[dict[str, Any]]) -> str:
    """Decode steps with and without a gate for each request, by backend."""
    rows = [(line["arguments"]["backend"], cost) for line in lines if line["label"] == "step" for cost in line["costs"]]
    table = [
        "| backend | requests, adapters | step without gates, with gates, ms | ratio "
        "| ratio when the requests change |",
        "| --- | --- | --- | --- | --- |",
    ]
    table += [
        f"| {backend} | {cost['requests']}, {cost['adapters']} | {cost['plain_ms']:.1f}, {cost['gated_ms']:.1f} "
        f"| {cost['ratio']:.3f} | {cost['first_ratio']:.3f} |"
        for backend, cost in rows
    ]
    return "\n".join(table)


def test_the_gate_table_is_the_committed_result() -> None:
    lines = results("gates-cpu.jsonl")
    assert gate_table(lines) in PAGE.read_text()
    served = [line["costs"] for line in lines if (line["label"], line["arguments"]["backend"]) == ("step", "cpu")]
    assert served
    assert all(max(cost["ratio"], cost["first_ratio"]) <= 1.05 for costs in served for cost in costs)


def ilora_table(lines: list[dict[str, Any]]) -> str:
    """Hits of every trained run and of the base; what SASRec ranks without text."""
    table = [
        "| run | HitRatio@1 | ValidRatio | HitRatio@1 by likelihood | loss of the right one of five |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = {"base": "base, told the form", "lora": "LoRA", "llara": "LLaRA", "ilora": "iLoRA"}
    for line in sorted(lines, key=lambda line: [*names, "sasrec"].index(line["arguments"]["method"])):
        method, found = line["arguments"]["method"], line["results"]
        if method == "sasrec":
            table += [f"| {name} | – | – | {hits(found['test'][key])} | – |" for key, name in ALONE.items()]
            continue
        name = names[method] + ("" if method == "base" else f", seed {line['arguments']['seed']}")
        asked, rank = found["answers"], found["ranked"]
        loss = f"{rank['loss']:.2f} ± {rank['loss_standard_error']:.2f}"
        table.append(f"| {name} | {hits(asked)} | {asked['valid_ratio']:.3f} | {hits(rank)} | {loss} |")
    return "\n".join(table)


ALONE = {
    "sasrec": "SASRec's own ranking",
    "embedding": "cosine of SASRec's item embeddings",
    "nearest_id": "nearest item id",
}


def hits(found: dict[str, Any]) -> str:
    return f"{found['hit_ratio']:.3f} ± {found['hit_ratio_standard_error']:.3f}"


def spread_table(lines: list[dict[str, Any]]) -> str:
    """How far ω tells users apart, in nats, and what another user's costs."""
    table = [
        "| run | entropy of ω, mean over users | entropy of the mean user's ω | standard deviation of each factor "
        "| loss by another user's ω less that by the own |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        if line["arguments"]["method"] != "ilora":
            continue
        found = line["results"]
        for when, gate in found["factors"].items():
            strange, own = (found[key]["row_losses"] for key in ("ranked_by_another_users_gate", "ranked"))
            cost = [one - other for one, other in zip(strange, own, strict=True)]
            cells = (
                f"iLoRA, seed {line['arguments']['seed']}, {when} training",
                f"{gate['entropy']:.4f}",
                f"{gate['entropy_of_mean']:.4f}",
                ", ".join(f"{each:.3f}" for each in gate["standard_deviation"]),
                "" if when == "before" else f"{fmean(cost):+.4f} ± {stdev(cost) / math.sqrt(len(cost)):.4f}",
            )
            table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def test_the_ilora_tables_are_the_committed_results() -> None:
    lines, page = results("ilora-cpu.jsonl"), PAGE.read_text()
    assert ilora_table(lines) in page
    assert spread_table(lines) in page


def test_the_lossy_table_is_the_committed_result() -> None:
    page = DOCS / "adr" / "0009-lossy-forms-on-request.md"
    assert lossy_table(results("approximate-cpu.jsonl")) in page.read_text()


def test_the_emtal_tables_are_the_committed_results() -> None:
    page = PAGE.read_text()
    assert emtal_latency_table(results("emtal-cpu.jsonl")) in page
    assert emtal_quality_table(results("emtal-quality-cpu.jsonl")) in page


def test_the_memory_table_is_the_committed_result() -> None:
    assert memory_table(results("training-memory-cpu.jsonl")) in PAGE.read_text()


def test_the_sparse_table_is_the_committed_result() -> None:
    assert sparse_table(results("sparse-cpu.jsonl")) in PAGE.read_text()


def uncertainty_table(lines: list[dict[str, Any]]) -> str:
    """Every way of answering a set, mean ± standard deviation of its seeds."""
    table = [
        "| set, way | passes | accuracy | ECE | NLL | Brier | told from the other two sets by total doubt "
        "| by epistemic doubt | processor ms a question: last layers, head |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        ways: dict[str, list[dict[str, Any]]] = {}
        for found in line["results"]:
            ways.setdefault(found["way"], []).append(found)
        members = [found["passes_cpu_ms"] for found in ways["LoRA, plain head"]]
        for way, seeds in ways.items():
            scores = (
                spread([seed[name] for seed in seeds]) for name in ("accuracy", "calibration_error", "nll", "brier")
            )
            doubts = (
                ", ".join(
                    spread([seed["auroc"][other][kind] for seed in seeds]) for other in line["arguments"]["others"]
                )
                for kind in ("total", "epistemic")
            )
            passes_ms = fmean(seed.get("passes_cpu_ms", sum(members)) for seed in seeds)
            head_ms = f", {fmean(seed['head_cpu_ms'] for seed in seeds):.1f}" if "head_cpu_ms" in seeds[0] else ""
            cells = (f"{line['label']}, {way}", f"{seeds[0]['passes']}", *scores, *doubts, f"{passes_ms:.0f}{head_ms}")
            table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def spread(values: list[float | None]) -> str:
    """Mean ± standard deviation of several seeds; one value as it is, and nothing where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{fmean(known):.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")


def test_the_uncertainty_table_is_the_committed_result() -> None:
    lines = results("uncertainty-cpu.jsonl")
    assert len(lines) == 3
    assert uncertainty_table(lines) in PAGE.read_text()
