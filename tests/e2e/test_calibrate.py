"""`motet calibrate` from the files to the files: PEFT, transformers and vbll say what must be found."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from PIL import Image
from vbll import DiscClassification

from motet.adapters.convert.head import vbll_head
from motet.adapters.heads import HEAD_CONFIG, HEAD_WEIGHTS, HeadFile, Parameterization, read, write
from motet.server.cli import cli
from motet.server.heads.calibrating import halves
from tests.support.models import load_dense
from tests.support.tokenizer import CORPUS
from tests.support.tolerances import TOLERANCES
from tests.unit.server.heads.oracles import plain_grid

LABELS = ("no", "maybe", "yes")
ROWS = 240
TOO_SURE = 3.0
"""By this factor the head's logits are too large for the labels."""
PREDICTIVE = TOLERANCES["scores of a calibrated head", torch.float32].atol
Run = Callable[..., Result]


@dataclass(frozen=True)
class Task:
    """An adapter with a head of vbll, rows whose labels a right temperature explains, and vbll's logits of them."""

    folder: Path
    data: Path
    mean_NC: Any
    variance_NC: Any
    y_N: torch.Tensor

    def p(self, temperature: float) -> torch.Tensor:
        rows = zip(self.mean_NC / temperature, self.variance_NC / temperature**2, strict=True)
        return torch.stack([torch.from_numpy(plain_grid(mean_C, variance_C)[0]) for mean_C, variance_C in rows])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path, tiny_tokenizer: Any) -> Task:
    root = tmp_path_factory.mktemp("calibrate")
    shutil.copytree(tiny_adapter, root / "adapter")
    generator = torch.Generator().manual_seed(3)
    words = CORPUS[0].split()
    rows: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    for number in range(ROWS):
        text = " ".join(words[i] for i in torch.randint(len(words), (8,), generator=generator))
        chat = [{"role": "user", "content": text}]
        if number % 3 == 0:
            rows.append({"messages": chat})
            prompts.append(tiny_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        else:
            rows.append({("text", "prompt")[number % 2]: text})
            prompts.append(tiny_tokenizer(text)["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's matter
        model = PeftModel.from_pretrained(load_dense(tiny_model, torch.float32), root / "adapter").eval()
    with torch.no_grad():
        states = [model(torch.tensor([one]), output_hidden_states=True).hidden_states[-1][0, -1] for one in prompts]
        x_ND = torch.stack(states)
        layer: Any = DiscClassification(x_ND.shape[1], len(LABELS), 0.01, parameterization="diagonal")
        layer.load_state_dict(
            {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in layer.state_dict().items()}
        )
        layer.W_logdiag.sub_(3)
        # Logits that differ between rows more than between classes: features of a random model hardly do.
        layer.W_mean.copy_(torch.linalg.lstsq(x_ND, 6 * torch.randn(ROWS, 3, generator=generator)).solution.T)
        torch.save(layer.state_dict(), root / "head.pt")
        logits = layer.double().eval().logit_predictive(x_ND.double())
        made = mean_NC, variance_NC = logits.mean.numpy(), logits.variance.numpy()
    vbll_head(root / "head.pt", root / "adapter", Parameterization.DIAGONAL, LABELS, temperature=0.5)
    y_N = Task(root, root, *made, torch.empty(0)).p(TOO_SURE).multinomial(1, generator=generator)[:, 0]
    for row, label in zip(rows, y_N.tolist(), strict=True):
        row["label"] = LABELS[label]
    (root / "dev-2026.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Task(root / "adapter", root / "dev-2026.jsonl", mean_NC, variance_NC, y_N)


@pytest.fixture
def run(tiny_model: Path) -> Iterator[Run]:
    threads = torch.get_num_threads()
    fixed = ["--model", str(tiny_model), "--dtype", "float32"]

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli, ["calibrate", *map(str, arguments), *fixed])

    yield call
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def head_of(folder: Path) -> HeadFile:
    found = read(folder)
    assert found is not None
    return found


def test_a_calibrated_copy(run: Run, task: Task, tmp_path: Path) -> None:
    before = contents(task.folder)
    plot = tmp_path / "reliability.png"
    result = run(task.folder, "--data", task.data, "--out", tmp_path / "out", "--plot", plot, "--seed", 1, "--json")
    assert result.exit_code == 0, result.output
    assert contents(task.folder) == before
    after = contents(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == {HEAD_CONFIG}
    head, said = head_of(tmp_path / "out"), json.loads(result.stdout)
    assert head.calibration is not None
    assert head.threshold is not None
    assert said["head"] == head.digest != head_of(task.folder).digest
    assert (said["before"]["temperature"], said["after"]["temperature"]) == (0.5, head.temperature)
    assert said["rows"] == {"temperature": 120, "scores": 120}
    calibration = head.calibration
    assert (calibration.set, calibration.n, calibration.miss_rate) == ("dev-2026", 120, 0.1)
    # 120 rows know log T to a standard error of about 0.15.
    assert abs(math.log(head.temperature / TOO_SURE)) < 0.6
    _, held_M = halves(ROWS, 1)
    y_M = task.y_N[held_M]
    for scores in (said["before"], said["after"]):
        p_MC = task.p(scores["temperature"])[held_M]
        truth_M = p_MC.gather(1, y_M[:, None])[:, 0]
        assert scores["nll"] == pytest.approx(-float(truth_M.log().mean()), abs=PREDICTIVE)
        one_hot_MC = torch.nn.functional.one_hot(y_M, 3)
        assert scores["brier"] == pytest.approx(float((p_MC - one_hot_MC).square().sum(1).mean()), abs=PREDICTIVE)
        assert scores["accuracy"] == pytest.approx(float((p_MC.argmax(1) == y_M).double().mean()))
    assert float((1 - truth_M <= head.threshold + PREDICTIVE).double().mean()) >= 0.9
    assert (calibration.ece, calibration.nll) == (said["after"]["ece"], said["after"]["nll"])
    assert said["after"]["nll"] < said["before"]["nll"]
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_in_place_and_again(run: Run, task: Task, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(task.folder, folder)
    before = contents(folder)
    result = run(folder, "--data", task.data, "--in-place", "--set", "dev", "--miss-rate", 0.25)
    assert result.exit_code == 0, result.output
    first = head_of(folder)
    assert first.calibration is not None
    assert (first.calibration.set, first.calibration.miss_rate) == ("dev", 0.25)
    assert {name for name, content in contents(folder).items() if content != before[name]} == {HEAD_CONFIG}
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "120 rows of 'dev' chose the temperature; the other 120 are scored here and chose the threshold" in lines
    assert f"temperature 0.5 {first.temperature:.4g}" in lines
    assert f"wrote {folder}" in lines
    assert first.threshold is not None
    assert ("the head never abstains" in result.stdout) == (first.threshold >= 2 / 3)
    again = run(folder, "--data", task.data, "--in-place", "--set", "dev", "--miss-rate", 0.25)
    assert again.exit_code == 0, again.output
    second = head_of(folder)
    # The old temperature has no part in the new one, found to 1e-3; features depend on their batch by rounding.
    assert second.temperature == pytest.approx(first.temperature, rel=2e-3)
    assert second.threshold == pytest.approx(first.threshold, abs=2e-3)


def test_it_must_be_said_where_it_goes(run: Run, task: Task, tmp_path: Path) -> None:
    for places in ([], ["--in-place", "--out", tmp_path / "out"]):
        result = run(task.folder, "--data", task.data, *places)
        assert result.exit_code == 2
        assert "--out FOLDER for a copy, or --in-place" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--out", "TAKEN"], "'TAKEN' is there already"),
        (["--out", "out", "--miss-rate", "0.001"], "240 labelled rows; a miss rate of 0.001 needs at least 1998"),
        (["--out", "out", "--set", ""], "--set: set '' is no string"),
        (["--out", "out", "--plot", "plot.pdf"], "must end in .png"),
        (["--out", "out", "--data", "few.jsonl"], "there are 2 labelled rows"),
        (["--out", "out", "--data", "other.jsonl"], "line 2: label 'perhaps' is none of the head's 3"),
        (["--out", "out", "--data", "long.jsonl"], "line 50 has 4000 tokens; the base model takes 2047"),
        (["--out", "out", "--data", "role.jsonl"], "line 50: the chat template refuses these messages"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    run: Run, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("TAKEN").mkdir()
    row, lines = '{"text": "the fox", "label": "no"}\n', 49
    Path("few.jsonl").write_text(row * 2)
    Path("other.jsonl").write_text(row + '{"text": "the fox", "label": "perhaps"}\n')
    Path("long.jsonl").write_text(row * lines + json.dumps({"text": "ä" * 2000, "label": "no"}))
    messages = [{"role": "assistant", "content": "hello"}]
    Path("role.jsonl").write_text(row * lines + json.dumps({"messages": messages, "label": "no"}))
    before = sorted(tmp_path.iterdir())
    result = run(task.folder, "--data", task.data, *change)
    assert result.exit_code != 0
    assert said in " ".join((result.stderr + str(result.exception)).split())
    assert sorted(tmp_path.iterdir()) == before
    assert sorted(contents(task.folder)) == sorted(["README.md", *_files()])


def _files() -> list[str]:
    return ["adapter_config.json", "adapter_model.safetensors", HEAD_CONFIG, HEAD_WEIGHTS]


def test_a_folder_without_a_head(run: Run, task: Task, tiny_adapter: Path, tmp_path: Path) -> None:
    result = run(tiny_adapter, "--data", task.data, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "has no output head" in result.stderr


def test_a_head_of_another_base(run: Run, task: Task, tiny_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    tensors = {"weight": torch.ones(3, 47), "bias": torch.zeros(3)}
    write(HeadFile(parameterization=Parameterization.SOFTMAX, labels=LABELS, tensors=tensors), tmp_path / "adapter")
    result = run(tmp_path / "adapter", "--data", task.data, "--in-place")
    assert result.exit_code == 1
    assert "47" in result.stderr + str(result.exception)
    assert "48" in result.stderr + str(result.exception)
