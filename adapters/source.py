"""Reads an adapter's files without trusting them: confined path, safetensors only, limits before bytes.

Must not know: methods, the base model. The digest covers every file and declaration that can change what is lowered.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from motet.adapters import heads, tokens
from motet.adapters.bounded import DEFAULT_LIMITS, Limits, parse_object, parse_tensors, read_file, read_weights
from motet.adapters.checkpoint import MODEL_CONFIG, read_checkpoint
from motet.adapters.errors import ConfigError, SourceNotFoundError, UnsafeFormatError, UnsafePathError
from motet.adapters.heads import HeadFile
from motet.adapters.spec import NOTHING_DECLARED, Declared
from motet.adapters.version import Digest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
GATE_FILE = "gate.safetensors"
"""What a gate is computed from, where the adapter has one."""
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
INITIAL_FOLDERS = ("pissa_init", "corda_init", "olora_init", "lora_ga_init", "initial_adapter")
"""Sub-folders that hold the adapter as it was before training; the first two are the methods' own names."""


class Layout(enum.Enum):
    """What kind of folder it is."""

    PEFT = "adapter"
    MODEL = "model directory"


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """The content of a folder, and of what belongs to it.

    Attributes:
        config: the parsed adapter_config.json, or config.json of a model directory.
        tensors: name → tensor, in the file's dtype, on the CPU.
        gate_tensors: likewise, of the gate's own file.
        digest: SHA-256 over all files and declarations.
        tokenizer: the tokenizer's files, by name; empty where there are none.
        head: the output head beside the adapter, where there is one.
        initial: the adapter before training, from a declaration or a sub-folder.
        initial_folder: the name of its folder, where that is one of INITIAL_FOLDERS.
        residual: the model directory the adapter was declared to be trained on.
        trained_on_base: declared: the pair is the whole change of the base.
    """

    layout: Layout
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    digest: Digest
    initial: AdapterFiles | None = None
    initial_folder: str | None = None
    residual: AdapterFiles | None = None
    trained_on_base: bool = False
    gate_tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    head: HeadFile | None = None

    def require_no_start(self, method: str) -> None:
        """Refuse declarations that the method would have to ignore.

        Raises:
            ConfigError: an initial adapter, a residual model or trained_on_base was declared.
        """
        for what, given in (
            ("an initial adapter", self.initial is not None),
            ("a residual model", self.residual is not None),
            ("trained_on_base", self.trained_on_base),
        ):
            if given:
                raise ConfigError(f"{method} adapters hold their whole change: {what} means nothing to them; drop it")


def confine(path: Path, roots: Sequence[Path]) -> Path:
    """Resolve `path`, following links, and require that it stays below one of `roots`.

    A relative path is looked up below each root in turn. Links inside a root are fine (Kubernetes mounts
    ConfigMaps that way), links that leave it are not.

    Raises:
        UnsafePathError: the path leaves every root, or there are no roots.
        SourceNotFoundError: there is nothing at a relative path.
    """
    if not roots:
        raise UnsafePathError(
            "loading from a path is off: no adapter root is configured; start the server with --adapter-root DIR"
        )
    leaves = path.is_absolute() or ".." in path.parts
    for root in roots:
        try:
            real_root = root.resolve()
            real_path = (real_root / path).resolve()
            below = real_path.is_relative_to(real_root)
            if below and (real_path.exists() or path.is_absolute()):
                return real_path
        except (OSError, RuntimeError, ValueError):
            continue  # no such path can exist: a loop of links, a name too long, a zero byte
        leaves = leaves or not below
    if leaves:
        raise UnsafePathError("the adapter's path is outside every --adapter-root; move it below one, or add a root")
    raise SourceNotFoundError(f"adapter source {str(path)[:200]!r} is below none of the adapter roots; check the path")


def read(folder: Path, declared: Declared = NOTHING_DECLARED, limits: Limits = DEFAULT_LIMITS) -> AdapterFiles:
    """Read and check a folder and what is declared of it.

    Raises:
        SourceNotFoundError: a folder or one of its files is missing or may not be read.
        UnsafeFormatError: the weights are only there as a pickle.
        UnsafePathError: a file is a link that leaves its folder.
        CorruptSourceError: a file is too large, truncated or contradicts its header.
        ConfigError: the declarations contradict each other.
        FormatError: the head's files do not describe a head.
    """
    files = _read_folder(folder, limits)
    initial, initial_folder = declared.initial, None
    if initial is None and files.layout is Layout.PEFT:
        initial_folder = next((name for name in INITIAL_FOLDERS if (folder / name).is_dir()), None)
        initial = _inside(folder, initial_folder) if initial_folder else None
    elif initial is not None and initial.name in INITIAL_FOLDERS:
        initial_folder = initial.name
    if declared.trained_on_base and (initial or declared.residual):
        raise ConfigError(
            "trained_on_base contradicts an initial adapter or a residual model: either the adapter was trained on the "
            "base itself, or on what the initial adapter left of it; declare one"
        )
    return _joined(
        replace(
            files,
            initial=_read_part("initial adapter", initial, Layout.PEFT, limits),
            initial_folder=initial_folder,
            residual=_read_part("residual model", declared.residual, Layout.MODEL, limits),
            trained_on_base=declared.trained_on_base,
            tokenizer=_read_tokenizer(folder),
            head=heads.read(folder, limits),
        )
    )


def _read_tokenizer(folder: Path) -> dict[str, bytes]:
    try:
        return tokens.read(folder)
    except OSError as error:
        raise SourceNotFoundError(f"the adapter's tokenizer cannot be read: {error.strerror}") from error


def _inside(folder: Path, name: str) -> Path:
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise UnsafePathError(f"{name} is a link that leaves the adapter folder; copy the folder instead")
    return folder / name


def _read_part(what: str, folder: Path | None, layout: Layout, limits: Limits) -> AdapterFiles | None:
    if folder is None:
        return None
    files = _read_folder(folder, limits)
    if files.layout is not layout:
        raise ConfigError(f"the {what} {folder.name!r} is of kind {files.layout.value!r}; it must be {layout.value!r}")
    return files


def _joined(files: AdapterFiles) -> AdapterFiles:
    """The files with one digest for all parts; that of the folder alone where there are no others."""
    parts = [(name, part.digest) for name in ("initial", "residual") if (part := getattr(files, name)) is not None]
    if files.trained_on_base:
        parts.append(("trained_on_base", Digest("")))
    if files.head is not None:
        parts.append(("head", files.head.digest))
    for name, content in files.tokenizer.items():
        parts.append((name, Digest(hashlib.sha256(content).hexdigest())))
    if not parts:
        return files
    digest = hashlib.sha256(files.digest.encode())
    for name, part_digest in parts:
        digest.update(f" {name} {part_digest}".encode())
    return replace(files, digest=Digest(digest.hexdigest()))


def _read_folder(folder: Path, limits: Limits) -> AdapterFiles:
    try:
        if not folder.is_dir():
            raise SourceNotFoundError(f"adapter source {folder.name!r} is not a folder; give the folder PEFT saved")
        if (folder / MODEL_CONFIG).exists() and not (folder / CONFIG_FILE).exists():
            config, tensors, digest = read_checkpoint(folder, limits)
            return AdapterFiles(Layout.MODEL, config, tensors, Digest(digest))
        return _read_peft(folder, limits)
    except OSError as error:
        raise SourceNotFoundError(
            f"adapter folder {folder.name!r} cannot be read: {error.strerror}; check its permissions"
        ) from error


def _read_peft(folder: Path, limits: Limits) -> AdapterFiles:
    """Everything is read once, and the digest is of exactly those bytes."""
    config = read_file(folder, CONFIG_FILE, limits.config_bytes)
    if not (folder / WEIGHTS_FILE).exists():
        for name in PICKLES:
            if (folder / name).exists():
                raise UnsafeFormatError(
                    f"{name} is a pickle, which can run code when it is read; save the adapter with "
                    f"safe_serialization=True, which writes {WEIGHTS_FILE}"
                )
    weights = read_weights(folder, WEIGHTS_FILE, limits)
    gate = _read_gate(folder, limits)
    digest = hashlib.sha256()
    for part in (config, weights) if gate is None else (config, weights, gate):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return AdapterFiles(
        layout=Layout.PEFT,
        config=parse_object(CONFIG_FILE, config),
        tensors=parse_tensors(WEIGHTS_FILE, weights, limits),
        digest=Digest(digest.hexdigest()),
        gate_tensors={} if gate is None else parse_tensors(GATE_FILE, gate, limits),
    )


def _read_gate(folder: Path, limits: Limits) -> bytes | None:
    """The gate's file; a link that leads nowhere is an error, not an adapter without a gate."""
    path = folder / GATE_FILE
    return read_weights(folder, GATE_FILE, limits) if path.exists() or path.is_symlink() else None
