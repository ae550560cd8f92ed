"""`motet train` from the command line, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from motet.adapters.recipes.errors import DataError, OutputError, TargetError
from motet.adapters.recipes.run import Base
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.tasks import TASKS
from motet.server.cli import cli
from motet.server.commands import training

Train = Callable[..., Result]


@pytest.fixture(scope="module")
def model(base: Callable[[], Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, folder = base(), tmp_path_factory.mktemp("models") / "tiny"
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(model: Path, data: Path, tmp_path: Path) -> Iterator[Train]:
    def call(method: str, *options: str) -> Result:
        fixed = ["--task", "wikisql", "--out", str(tmp_path / "out"), "--model", str(model), "--data", str(data)]
        small = ["--steps", "3", "--threads", "1", *(["--rank", "3"] if RECIPES[method].targets else [])]
        return CliRunner().invoke(training.train, [method, *fixed, *small, *options])

    yield call
    torch.set_num_threads(1)
    transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def test_an_adapter_is_trained_with_the_recipes_defaults_and_scored(train: Train, tmp_path: Path) -> None:
    result = train("pissa", "--score", "2")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    recipe = RECIPES["pissa"]
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == ("pissa", 3, recipe.alpha)
    assert config["target_modules"] == list(recipe.targets)
    assert config["base_model_name_or_path"] == "tiny"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["n"], scores["batch"], scores["learning_rate"]) == (2, recipe.batch, recipe.learning_rate)
    for shown in ("loading tiny", "preparing pissa", "loss", "exact_match"):
        assert shown in result.output


def test_every_option_reaches_the_run(train: Train, tmp_path: Path) -> None:
    options = "--alpha 5 --targets down_proj,o_proj --lr 0.5 --batch 2 --seed 7 --base-name org/other --score 1"
    result = train("lora", *options.split())
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["target_modules"]) == (5, ["down_proj", "o_proj"])
    assert config["base_model_name_or_path"] == "org/other"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    wanted = {"alpha": 5, "targets": ["down_proj", "o_proj"], "learning_rate": 0.5, "batch": 2, "seed": 7, "threads": 1}
    assert wanted.items() <= scores.items()


def test_a_stopped_run_is_resumed(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("lora", "--checkpoint-every", "1")
    assert whole.exit_code == 0, whole.output
    wanted = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "out").rename(tmp_path / "whole")
    follow = training._follow
    with monkeypatch.context() as patched:
        patched.setattr(training, "_follow", lambda losses, done, steps: next(iter(losses)))
        train("lora", "--checkpoint-every", "1")
    assert isinstance(train("lora").exception, OutputError)
    seen: list[int] = []

    def noted(losses: Iterable[float], done: int, steps: int) -> None:
        seen.append(done)
        follow(losses, done, steps)

    monkeypatch.setattr(training, "_follow", noted)
    result = train("lora", "--resume")
    assert result.exit_code == 0, result.output
    assert seen == [1]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == wanted


def test_a_whole_model_is_trained_and_scored(train: Train, tmp_path: Path) -> None:
    result = train("lisa", "--score", "1")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "scores.json",
    }
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["rank"], scores["alpha"], scores["targets"]) == (0, 0, [])


def test_a_rank_for_a_whole_model_is_refused_before_anything_is_loaded(train: Train) -> None:
    result = train("full", "--rank", "4", "--score", "1")
    assert isinstance(result.exception, TargetError)
    assert str(result.exception) == "--rank 4 means nothing to 'full', which trains whole layers; drop it"
    assert "loading" not in result.output


def test_a_gate_of_users_is_trained_and_scored(train: Train, tmp_path: Path, model: Path) -> None:
    result = train("ilora", "--task", "lastfm", "--rank", "4", "--score", "2")
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["split"], scores["n"], scores["of"]) == ("rec/lastfm/test", 2, 24)
    shown = CliRunner().invoke(cli, ["adapters", "inspect", str(tmp_path / "out"), "--model", str(model)])
    assert shown.exit_code == 0, shown.output
    assert "iLoRA folder, stored batch-norm statistics" in shown.output.replace("\n", " ")


def test_a_pool_is_trained_on_episodes(train: Train, tmp_path: Path, model: Path) -> None:
    result = train("amt", "--task", "subjects", "--batch", "30", "--targets", "q_proj,down_proj")
    assert result.exit_code == 0, result.output
    assert "loss" in result.output
    shown = CliRunner().invoke(cli, ["adapters", "inspect", str(tmp_path / "out"), "--model", str(model)])
    assert shown.exit_code == 0, shown.output
    assert "pool of 4 members, centred on their start" in shown.output.replace("\n", " ")


def test_scores_of_a_pool_are_refused_before_anything_is_loaded(train: Train) -> None:
    result = train("amt", "--task", "subjects", "--score", "2")
    assert result.exit_code == 2
    assert "--score: amt makes no answers" in " ".join(result.output.split())
    assert "loading" not in result.output


def test_several_tasks_are_learnt_at_once_and_scored_apart(train: Train, tmp_path: Path) -> None:
    result = train("emtal", "--task", "wikisql+boolq", "--targets", "q_proj", "--score", "2")
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["task"] == "wikisql+boolq"
    assert {name: part["n"] for name, part in scores["tasks"].items()} == {"wikisql": 2, "boolq": 2}
    for shown in ("wikisql exact_match", "boolq logit_accuracy", "boolq logit_auc"):
        assert shown in result.output


def test_a_part_that_is_no_task_is_refused(train: Train) -> None:
    result = train("lora", "--task", "wikisql+bolq")
    assert result.exit_code == 2
    assert "there is no task 'bolq'; choose from wikisql, advising-slots" in " ".join(result.output.split())


def test_without_scipy_the_remedy_is_named(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    assert "the package scipy, which is not installed" in train("lora").output


def test_without_peft_the_remedy_is_named(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = train("lora")
    assert result.exit_code == 1
    assert 'the package peft, which is not installed; pip install "motet[train]"' in result.output
    assert not (tmp_path / "out").exists()


def test_absent_data_is_an_error_of_ours(train: Train, tmp_path: Path) -> None:
    assert isinstance(train("lora", "--data", str(tmp_path / "nothing")).exception, DataError)


def test_a_folder_without_a_model_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = train("lora", "--model", str(tmp_path / "empty"))
    assert result.exit_code == 1
    assert "--model 'empty' cannot be loaded" in result.output


def test_the_help_lists_the_methods_and_tasks() -> None:
    text = CliRunner().invoke(training.train, ["--help"], terminal_width=120).output
    for name, recipe in RECIPES.items():
        assert any(line.split()[:1] == [name] and recipe.summary in line for line in text.splitlines())
    assert all(task in text for task in TASKS)


def test_the_command_line_starts_without_the_libraries_of_training() -> None:
    code = "import sys, motet.server.commands.training; print({'torch', 'peft', 'transformers'} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
