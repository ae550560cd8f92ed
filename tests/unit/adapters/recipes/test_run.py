"""A run with its folder: interrupted, continued, refused."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.recipes import checkpoint
from motet.adapters.recipes.errors import CheckpointError, DataError, OutputError, TargetError
from motet.adapters.recipes.loop import Schedule, State
from motet.adapters.recipes.run import UNFINISHED, Base, Order, Run, begin
from motet.adapters.recipes.table import RECIPES
from tests.unit.adapters.recipes.conftest import HEADED, wikisql_row, write_rows

Orders = Callable[..., Order]
Bases = Callable[[], Base]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(order: Order, base: Base, data: Path, out: Path, resume: bool = False, stop: int | None = None) -> Run:
    running = Run(order, base, data, out, resume=resume, keep_every=2)
    for _ in itertools.islice(running, stop):
        pass
    return running


@pytest.mark.parametrize("method", [method for method in RECIPES if method not in HEADED])
def test_a_resumed_run_gives_the_same_bytes(
    method: str, base: Bases, order: Orders, data: Path, tmp_path: Path
) -> None:
    whole = run(order(method), base(), data, tmp_path / "whole")
    stopped = run(order(method), base(), data, tmp_path / "parts", stop=5)
    assert stopped.loop.done == 5
    made = base()
    torch.manual_seed(99)  # another process would be elsewhere
    resumed = Run(order(method), made, data, tmp_path / "parts", resume=True, keep_every=2)
    assert resumed.loop.done == 4, "the last checkpoint, not the last step"
    assert len(list(resumed)) == 2
    assert resumed.loop.losses == whole.loop.losses
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_finished_run_leaves_the_adapter_only(base: Bases, order: Orders, data: Path, tmp_path: Path) -> None:
    run(order(), base(), data, tmp_path / "out")
    assert files(tmp_path / "out").keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_a_run_stopped_before_it_was_saved_is_saved_by_resuming(
    base: Bases, order: Orders, data: Path, tmp_path: Path
) -> None:
    whole = run(order(), base(), data, tmp_path / "whole")
    run(order(), base(), data, tmp_path / "parts", stop=6)
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    resumed = run(order(), base(), data, tmp_path / "parts", resume=True)
    assert resumed.loop.losses == whole.loop.losses
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_the_seed_fixes_everything(base: Bases, order: Orders, data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = base()
        torch.manual_seed(ord(name))
        run(order("dora", seed=seed), made, data, tmp_path / name)
    weights = [files(tmp_path / name)["adapter_model.safetensors"] for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_the_loss_falls(base: Bases, order: Orders, data: Path, tmp_path: Path) -> None:
    wide = order(steps=30, rank=8, alpha=16, targets=("o_proj", "down_proj", "up_proj"), learning_rate=3e-2)
    losses = run(wide, base(), data, tmp_path / "out").loop.losses
    assert max(losses[-5:]) < losses[0] - 0.1


def test_an_adapter_is_not_overwritten(base: Bases, order: Orders, data: Path, tmp_path: Path) -> None:
    run(order(), base(), data, tmp_path / "out")
    before = files(tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(OutputError, match="--out 'out' holds an adapter already; name another"):
            run(order(), base(), data, tmp_path / "out", resume=resume)
    assert files(tmp_path / "out") == before


def test_an_unfinished_run_is_not_overwritten(base: Bases, order: Orders, data: Path, tmp_path: Path) -> None:
    run(order(), base(), data, tmp_path / "out", stop=3)
    with pytest.raises(OutputError, match="--out 'out' holds an unfinished run; go on with --resume"):
        run(order(), base(), data, tmp_path / "out")


def test_there_must_be_something_to_resume(base: Bases, order: Orders, data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to go on from; start again without --resume"):
        run(order(), base(), data, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"learning_rate": 2e-2}, "learning_rate=0.01, not 0.02"), ({"threads": 2}, "threads=1, not 2")],
)
def test_other_options_do_not_continue_a_run(
    changes: dict[str, Any], named: str, base: Bases, order: Orders, data: Path, tmp_path: Path
) -> None:
    run(order(), base(), data, tmp_path / "out", stop=3)
    with pytest.raises(CheckpointError, match=f"belongs to a run with {named}; repeat its options"):
        run(order(**changes), base(), data, tmp_path / "out", resume=True)
    torch.set_num_threads(1)


def test_another_base_or_other_data_do_not_continue_a_run(
    base: Bases, order: Orders, data: Path, tmp_path: Path
) -> None:
    run(order(), base(), data, tmp_path / "out", stop=3)
    other = base()
    with torch.no_grad():
        other.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="belongs to a run with base="):
        run(order(), other, data, tmp_path / "out", resume=True)
    write_rows(tmp_path / "data", "text/wikisql.train", [wikisql_row("red", n) for n in range(40)])
    with pytest.raises(CheckpointError, match="belongs to a run with data="):
        run(order(), base(), tmp_path / "data", tmp_path / "out", resume=True)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint.keep(tmp_path, State((1.0,), {"a": torch.ones(3)}), {"rank": 1})
    path = tmp_path / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="the checkpoint is damaged; remove the output folder"):
        checkpoint.take_up(tmp_path, {"rank": 1})


def test_a_checkpoint_keeps_the_state_and_the_generator(tmp_path: Path) -> None:
    state = State((1.5, 0.1 + 0.2), {"a": torch.randn(3), "a@step": torch.tensor(2.0)})
    checkpoint.keep(tmp_path, state, {"targets": ("q", "v")})
    expected = torch.rand(4)
    found = checkpoint.take_up(tmp_path, {"targets": ("q", "v")})
    assert torch.equal(torch.rand(4), expected)
    assert found.losses == state.losses
    assert found.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.tensors.items())


@pytest.mark.parametrize(("module", "name"), [(checkpoint, "save_file"), (os, "replace")])
def test_a_stop_while_writing_leaves_the_previous_checkpoint(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.keep(tmp_path, State((1.0,), {}), {})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.keep(tmp_path, State((1.0, 2.0), {}), {})
    assert checkpoint.take_up(tmp_path, {}).losses == (1.0,)


def test_an_unknown_target_is_refused_with_those_there_are(base: Bases, order: Orders, data: Path) -> None:
    with pytest.raises(TargetError, match="--targets names 'w_proj'; the base has down_proj, gate_proj"):
        begin(order(targets=("q_proj", "w_proj")), base(), data)


def test_a_rank_as_wide_as_a_target_is_refused(base: Bases, order: Orders, data: Path) -> None:
    with pytest.raises(TargetError, match=r"--rank 24 is not below 24, the width of '.*v_proj'; lower it"):
        begin(order(rank=24), base(), data)


def test_a_batch_larger_than_the_data_is_refused(base: Bases, order: Orders, data: Path) -> None:
    _, loop = begin(order(batch=1000), base(), data)
    with pytest.raises(DataError, match="fewer than --batch 1000"):
        next(iter(loop))


def test_the_rate_rises_for_a_twentieth_and_falls_to_almost_nothing() -> None:
    schedule = Schedule(steps=100, learning_rate=2.0, batch=1, seed=0)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert max(rates) == rates[4] == pytest.approx(2.0, rel=0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[50] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.001


def test_every_step_has_its_own_rate(base: Bases, order: Orders, data: Path) -> None:
    """AdamW moves an element by about the rate: at first by half of the highest, at last by next to nothing."""
    trainee, loop = begin(order(steps=40, learning_rate=1e-2), base(), data)
    moved = []
    before = [parameter.detach().clone() for parameter in trainee.trainable.values()]
    for _ in loop:
        after = [parameter.detach().clone() for parameter in trainee.trainable.values()]
        moved.append(max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)))
        before = after
    assert moved[0] == pytest.approx(5e-3, rel=0.02)
    assert max(moved[1:6]) > 7e-3
    assert moved[-1] < 1e-4
