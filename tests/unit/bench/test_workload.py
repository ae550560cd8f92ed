import json
from collections import Counter
from dataclasses import replace

import pytest

from tests.bench.arrivals import ClosedLoop, OpenLoop
from tests.bench.assignment import Assignment
from tests.bench.prompts import PromptShape
from tests.bench.workload import Workload, plan

WORKLOAD = Workload(
    models=("a", "b", "c"),
    pacing=ClosedLoop(2),
    requests=6,
    prompt=PromptShape(16),
    output_tokens=9,
    seed=3,
    warmup=4,
)


def test_the_body_is_a_deterministic_stream_of_fixed_length() -> None:
    request = plan(WORKLOAD).measured[1]
    body = json.loads(request.body)
    prompt = body.pop("prompt")
    assert len(prompt) == 16
    assert request.output_tokens == 9
    assert request.model == "b"
    assert body == {
        "model": "b",
        "max_tokens": 9,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_extra_fields_reach_the_body() -> None:
    workload = replace(WORKLOAD, extra_body={"lora": [{"id": 0}]})
    assert json.loads(plan(workload).measured[0].body)["lora"] == [{"id": 0}]


def test_no_prompt_comes_twice_even_in_warmup() -> None:
    planned = plan(WORKLOAD)
    prompts = Counter(str(json.loads(r.body)["prompt"]) for r in (*planned.warmup, *planned.measured))
    assert len(prompts) == 10


def test_warmup_touches_every_model_whatever_the_assignment() -> None:
    planned = plan(WORKLOAD)
    assert [request.model for request in planned.warmup] == ["a", "b", "c", "a"]


def test_one_seed_gives_one_plan() -> None:
    workload = replace(WORKLOAD, assignment=Assignment.UNIFORM, pacing=OpenLoop(10))
    assert plan(workload) == plan(workload)
    assert plan(workload) != plan(replace(workload, seed=4))


def test_only_an_open_loop_has_times() -> None:
    assert plan(WORKLOAD).offsets_s is None
    offsets_s = plan(replace(WORKLOAD, pacing=OpenLoop(10))).offsets_s
    assert offsets_s is not None
    assert len(offsets_s) == 6


@pytest.mark.parametrize("change", [{"requests": 0}, {"warmup": -1}, {"output_tokens": 0}])
def test_impossible_workloads_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        replace(WORKLOAD, **change)  # type: ignore[arg-type]
