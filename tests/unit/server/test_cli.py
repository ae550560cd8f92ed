"""Options: where they come from, and that none is missing. Nothing is served here."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import motet.server.serve
from motet.adapters.errors import UnsupportedError
from motet.server.cli import cli, main
from motet.server.config import OptionError, ServeConfig

FIELDS = {field.name: field for field in dataclasses.fields(ServeConfig)}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("MOTET_"):
            monkeypatch.delenv(name)


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServeConfig]:
    """The configuration that `motet serve` with these arguments starts with."""
    seen: list[ServeConfig] = []
    monkeypatch.setattr(motet.server.serve, "assemble", lambda config, report: seen.append(config))
    monkeypatch.setattr(motet.server.serve, "run", lambda config, assembled, ready: None)

    def call(*arguments: str) -> ServeConfig:
        result = CliRunner().invoke(cli, ["serve", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return seen.pop()

    return call


def test_without_options_the_defaults_of_the_fields_hold(configure: Callable[..., ServeConfig]) -> None:
    assert configure() == ServeConfig()


def test_help_lists_every_field() -> None:
    text = CliRunner().invoke(cli, ["serve", "--help"], terminal_width=200).output
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.metadata["help"] in text
        if field.default not in (None, ()):
            assert f"[default: {field.default}]" in text


VALUES: dict[str, tuple[str, Any]] = {
    "model": ("org/model", "org/model"),
    "name": ("m", "m"),
    "dtype": ("float32", "float32"),
    "device": ("cpu", "cpu"),
    "native": ("off", "off"),
    "base_weights": ("int8", "int8"),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("81", 81),
    "adapter": ("a=b", ("a=b",)),
    "catalogue": ("names.db", "names.db"),
    "versions_kept": ("3", 3),
    "adapter_root": ("roots", ("roots",)),
    "adapter_source": ("hf://org/", ("hf://org/",)),
    "adapter_revisions": ("floating", "floating"),
    "download_dir": ("downloads", "downloads"),
    "download_size": ("1GiB", "1GiB"),
    "download_timeout": ("1.5", 1.5),
    "autoload": ("s3://bucket/{name}", "s3://bucket/{name}"),
    "autoload_wait": ("1.5", 1.5),
    "api_key_file": ("keys", "keys"),
    "admin_key_file": ("admin", "admin"),
    "adapter_memory": ("1GiB", "1GiB"),
    "adapter_cache": ("off", "off"),
    "adapter_cache_size": ("1GiB", "1GiB"),
    "host_memory": ("2GiB", "2GiB"),
    "kv_memory": ("2GiB", "2GiB"),
    "block_size": ("32", 32),
    "max_batch_rows": ("99", 99),
    "max_generations": ("7", 7),
    "max_waiting": ("3", 3),
    "drain_timeout": ("1.5", 1.5),
    "adapter_quota": ("a=tokens:9", ("a=tokens:9",)),
    "key_quota": ("a=tokens:9", ("a=tokens:9",)),
    "cors_origin": ("https://a.example", ("https://a.example",)),
    "max_body": ("1MiB", "1MiB"),
    "body_timeout": ("1.5", 1.5),
    "request_timeout": ("9.5", 9.5),
    "policy": ("fcfs", "fcfs"),
    "log_level": ("debug", "debug"),
}


def test_every_field_has_a_value_to_try() -> None:
    assert VALUES.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_a_flag_a_variable_and_a_key(
    configure: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    given, expected = VALUES[name]
    wanted = dataclasses.replace(ServeConfig(), **{name: expected})
    assert wanted != ServeConfig()
    assert configure(f"--{name.replace('_', '-')}", given) == wanted
    file = tmp_path / "motet.toml"
    literal = f"[{given!r}]" if isinstance(expected, tuple) else repr(expected)
    file.write_text(f"{name} = {literal}\n")
    assert configure("--config", str(file)) == wanted
    monkeypatch.setenv(f"MOTET_{name.upper()}", given)
    assert configure() == wanted


def test_a_flag_goes_before_the_environment_before_the_file(
    configure: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "motet.toml"
    file.write_text('port = 1\nhost = "file"\nname = "file"\nadapter = ["a=file", "b=file"]\n')
    monkeypatch.setenv("MOTET_CONFIG", str(file))
    monkeypatch.setenv("MOTET_HOST", "environment")
    monkeypatch.setenv("MOTET_PORT", "2")
    config = configure("--port", "3")
    assert (config.port, config.host, config.name) == (3, "environment", "file")
    assert config.adapter == ("a=file", "b=file")
    monkeypatch.setenv("MOTET_ADAPTER", "c=environment d=environment")
    assert configure().adapter == ("c=environment", "d=environment")
    assert configure("--adapter", "e=flag", "--adapter", "f=flag").adapter == ("e=flag", "f=flag")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ports = 1", "unknown option 'ports'"),
        ("[serve]\nport = 1", "unknown option 'serve'"),
        ("port = ", "cannot be read"),
        ('port = "a"', "'a' is not a valid integer"),
        ('dtype = "int3"', "'int3' is not one of"),
        (None, "cannot be read"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str | bytes | None, said: str) -> None:
    file = tmp_path / "motet.toml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(cli, ["serve", "--config", str(file)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("arguments", [["--port", "a"], ["--dtype", "int3"], ["--unknown"], ["--port"], ["positional"]])
def test_a_wrong_flag_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["serve", *arguments]).exit_code == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OptionError("--kv-memory 'x' is no size"), "error  --kv-memory 'x' is no size"),
        (UnsupportedError("adapter [bold]x[/bold]"), "error  adapter [bold]x[/bold]"),
    ],
)
def test_a_known_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(motet.server.serve, "assemble", fail)
    monkeypatch.setattr(sys, "argv", ["motet", "serve"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", said)


def test_an_unknown_error_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(motet.server.serve, "assemble", fail)
    monkeypatch.setattr(sys, "argv", ["motet", "serve"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    code = "import sys, motet.server.cli; print({'torch', 'transformers', 'peft', 'safetensors'} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_every_command_explains_itself() -> None:
    def walk(command: click.Command, path: list[str]) -> None:
        result = CliRunner().invoke(cli, [*path, "--help"])
        assert result.exit_code == 0
        assert command.help
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, [*path, name])

    walk(cli, [])
