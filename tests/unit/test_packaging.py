"""What `pip install` delivers: names, files and versions that pyproject.toml and constraints.txt spell out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PARTS = ["adapters", "kernels", "server"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

MOST_LINES = 300


def python_files(*folders: str) -> list[Path]:
    found = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if "__pycache__" not in path.parts)


def test_the_packages_are_the_folders_with_python_files() -> None:
    folders = {".".join(("motet", *path.parent.parts)) for path in python_files(*PARTS)}
    assert PROJECT["tool"]["setuptools"]["packages"] == sorted(folders)


def test_only_sub_folders_are_regular_packages() -> None:
    """A root without __init__.py can not shadow a distribution of the same name; `kernels` and `adapters` exist."""
    folders = {path.parent for path in python_files(*PARTS)}
    regular = {folder for folder in folders if (ROOT / folder / "__init__.py").exists()}
    assert folders - regular == {Path(part) for part in PARTS}
    assert not list(ROOT.glob("motet*/__init__.py"))


def test_every_root_is_typed() -> None:
    assert all((ROOT / part / "py.typed").is_file() for part in PARTS)


def test_test_folders_are_packages() -> None:
    """Two test files of one name in folders without __init__.py are the same module to pytest."""
    folders = {path.parent for path in python_files("tests")}
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("compiler", [True, False], ids=["with a compiler", "without"])
def test_the_wheel_holds_every_module_and_no_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: bool
) -> None:
    if not compiler:
        for variable in ("CC", "CXX"):
            monkeypatch.setenv(variable, "/nowhere/c++")
    source = tmp_path / "source"  # a build leaves files behind
    source.mkdir()
    for name in ["pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]:
        shutil.copy(ROOT / name, source)
    for folder in [*PARTS, "tests/unit/deploy"]:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("motet-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in archive.namelist()} - {Path(name).name for name in names}
    expected = {f"motet/{path}" for path in python_files(*PARTS)} | {f"motet/{part}/py.typed" for part in PARTS}
    assert {name for name in names if name.endswith((".py", ".typed"))} == expected
    assert [Path(name).name.partition(".")[0] for name in names if name.endswith(".so")] == ["_native"] * compiler
    assert [name for name in names if not name.startswith(("motet/adapters/", "motet/kernels/", "motet/server/"))] == []
    assert {"LICENSE", "entry_points.txt"} <= metadata


def test_the_installed_package_does_not_depend_on_the_working_directory(tmp_path: Path) -> None:
    for part in PARTS:  # what a user's project may well contain
        (tmp_path / f"{part}.py").write_text("raise SystemExit('the wrong module')")
    modules = "motet.adapters.version", "motet.kernels.errors", "motet.server.engine.types"
    code = f"import sys, {', '.join(modules)}; print(*(sys.modules[m].__file__ for m in {modules!r}), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line).name for line in found.stdout.split()] == ["version.py", "errors.py", "types.py"]


def requirements(lines: Iterable[str]) -> list[Requirement]:
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "motet"]


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line) for line in lines]
    wrong = [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    assert wrong == [], "only name==version: no local versions, places or options"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


@pytest.mark.parametrize("extra", ["", *PROJECT["project"]["optional-dependencies"]])
def test_the_constraints_pin_a_version_that_is_allowed(extra: str) -> None:
    project, pins = PROJECT["project"], constraints()
    for requirement in requirements(project["optional-dependencies"][extra] if extra else project["dependencies"]):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_files_are_short() -> None:
    files = python_files("adapters", "kernels", "server", "tests", "examples")
    lines = {str(path): len((ROOT / path).read_text("utf-8").splitlines()) for path in files}
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}
