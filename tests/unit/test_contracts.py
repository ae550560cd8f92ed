"""Import rules that import-linter's contracts do not express; the others are in pyproject.toml (`make lint`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["adapters", "kernels", "server"]

MAY_IMPORT = {
    "adapters": ["motet.adapters"],
    "kernels": ["motet.kernels"],
    "server/engine": ["motet.server.engine", "motet.adapters.version"],
    "server/heads": ["motet.server.heads", "motet.adapters"],
    "server/model": [
        "motet.server.model",
        "motet.server.heads",
        "motet.server.engine.types",
        "motet.adapters",
        "motet.kernels",
    ],
    "server/api": [
        "motet.server.api",
        "motet.server.engine",
        "motet.server.config",
        "motet.server.errors",
        "motet.server.metrics",
        "motet.server.heads",
        "motet.adapters",
    ],
}
"""What the files of a folder may import of motet, at any depth of their code."""

TENSOR_LIBRARIES = {"torch", "triton", "transformers", "safetensors"}


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of all that a file imports: `from a.b import c` is a.b.c, relative ones are resolved."""
    package = ["motet", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_the_reader_of_imports_sees_all_forms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "server" / "api").mkdir(parents=True)
    path = tmp_path / "server" / "api" / "x.py"
    path.write_text(
        "import a.b as c\nfrom d import e, f\ndef g():\n  from . import h\n  from ..engine.types import Plan\n"
    )
    assert list(imports(path)) == ["a.b", "d.e", "d.f", "motet.server.api.h", "motet.server.engine.types.Plan"]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    found = {(path, name) for path in files(folder) for name in imports(path) if within(name, "motet")}
    wrong = [(path, name) for path, name in found if not any(within(name, allowed) for allowed in MAY_IMPORT[folder])]
    assert wrong == []


def test_triton_is_imported_in_its_backend_only() -> None:
    found = {path.relative_to(ROOT) for path in files(*PARTS) for name in imports(path) if within(name, "triton")}
    assert [path for path in found if path.parts[:2] != ("kernels", "triton")] == []


def test_the_three_parts_are_imported_as_motet_only() -> None:
    """The bare names are other people's distributions."""
    found = [(path, name) for path in files(*PARTS, "tests", "examples") for name in imports(path)]
    assert [(path, name) for path, name in found if name.split(".")[0] in PARTS] == []


def test_the_engine_and_what_it_imports_run_without_tensors() -> None:
    engine = ["motet.server.engine." + path.stem for path in files("server/engine") if path.stem != "__init__"]
    modules = ", ".join(["motet.adapters.version", *engine])
    code = f"import sys, {modules}; print({TENSOR_LIBRARIES!r} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
