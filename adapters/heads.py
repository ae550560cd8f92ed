"""The file form of an output head that lies beside an adapter: what it says, checked, and its tensors.

Must not know: how a head answers, the base model, vbll. `uncertainty_head.json` declares what the tensors of
`uncertainty_head.safetensors` mean: `W_logdiag` has another meaning in each parameterization.

    softmax    weight [C, D], bias [C]
    diagonal   noise_mean, noise_logdiag [C], W_mean, W_logdiag [C, D]
    dense      the same and W_offdiag [C, D, D]
    lowrank    the same and W_offdiag [C, D, R], R < D
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from motet.adapters import calibration as calibrations
from motet.adapters.bounded import DEFAULT_LIMITS, Limits, parse_object, parse_tensors, read_file, read_weights
from motet.adapters.calibration import Calibration
from motet.adapters.errors import (
    AdapterExistsError,
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    SourceNotFoundError,
    UnmatchedTensorError,
    listed,
)
from motet.adapters.ranges import Range, require_numbers
from motet.adapters.version import Digest

HEAD_CONFIG = "uncertainty_head.json"
HEAD_WEIGHTS = "uncertainty_head.safetensors"
VERSION = 1
FEATURE = "final_norm_last_token"
"""The state of the prompt's last token after the final norm: what every head is applied to."""
MOST_LABELS = 1_000
LONGEST_LABEL = 256
LARGEST_LOG = 40.0
"""exp(2 · 40) is still a float32."""
LARGEST_NUMBER = 1e9
LARGEST_TEMPERATURE = 1e3


class Parameterization(enum.Enum):
    """What the tensors mean."""

    SOFTMAX = "softmax"
    DIAGONAL = "diagonal"
    DENSE = "dense"
    LOW_RANK = "lowrank"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class HeadFile:
    """The content of both files; compared by identity.

    Attributes:
        labels: what class c is called.
        label_token_ids: the token that says each label, where there is one.
        n_train, prior_scale, seed, wishart_scale, dof: of the training, where known; nothing is computed from them.
        temperature: the logits are to be divided by it.
        threshold: of 1 - max p, above which the head abstains; None where it never does.
        calibration: how good the answers with this temperature were found to be; None where nobody looked.
        tensors: float32 on the CPU.
    """

    parameterization: Parameterization
    labels: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    label_token_ids: tuple[int, ...] | None = None
    n_train: int | None = None
    prior_scale: float | None = None
    seed: int | None = None
    wishart_scale: float | None = None
    dof: float | None = None
    temperature: float = 1.0
    threshold: float | None = None
    calibration: Calibration | None = None

    @property
    def width(self) -> int:
        """D, which must be the hidden size of the base."""
        name = "weight" if self.parameterization is Parameterization.SOFTMAX else "W_mean"
        return self.tensors[name].shape[1]

    @property
    def bytes(self) -> int:
        """Of the tensors, in host memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def digest(self) -> Digest:
        """SHA-256 of what `dump` writes, whatever the spelling that was read."""
        digest = hashlib.sha256()
        for part in dump(self):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return Digest(digest.hexdigest())


def read(folder: Path, limits: Limits = DEFAULT_LIMITS) -> HeadFile | None:
    """The head of an adapter folder; None when it has none.

    Raises:
        SourceError: one of the two files is missing, leaves the folder, is too large or damaged.
        FormatError: they do not describe a head.
    """
    try:
        if not any(os.path.lexists(folder / name) for name in (HEAD_CONFIG, HEAD_WEIGHTS)):
            return None
        config = read_file(folder, HEAD_CONFIG, limits.config_bytes)
        return parse(config, read_weights(folder, HEAD_WEIGHTS, limits), limits)
    except OSError as error:
        raise SourceNotFoundError(f"the head cannot be read: {error.strerror}; check its permissions") from error


def parse(config: bytes, weights: bytes, limits: Limits = DEFAULT_LIMITS) -> HeadFile:
    """Check every value; see `read`."""
    values = parse_object(HEAD_CONFIG, config)
    tensors = parse_tensors(HEAD_WEIGHTS, weights, limits)
    if wrong := values.keys() ^ set(_KEYS):
        known = wrong & set(_KEYS)
        raise ConfigError(
            f"{HEAD_CONFIG} has {'no' if known else 'the unknown'} key {min(known or wrong)!r}; its keys are "
            f"{', '.join(_KEYS)}"
        )
    if values["version"] != VERSION or isinstance(values["version"], bool):
        raise ConfigError(f"{HEAD_CONFIG}: version {values['version']!r} is not {VERSION}, the only one that is read")
    kinds = [kind.value for kind in Parameterization]
    if values["parameterization"] not in kinds:
        raise ConfigError(
            f"{HEAD_CONFIG}: parameterization {values['parameterization']!r} is none of {', '.join(kinds)}"
        )
    if values["feature"] != FEATURE:
        raise ConfigError(
            f"{HEAD_CONFIG}: feature {values['feature']!r} is not {FEATURE!r}, the only one that is served"
        )
    labels = values["labels"]
    return checked(
        HeadFile(
            parameterization=Parameterization(values["parameterization"]),
            labels=tuple(labels) if isinstance(labels, list) else labels,
            tensors=tensors,
            label_token_ids=tuple(ids) if isinstance(ids := values["label_token_ids"], list) else ids,
            calibration=calibrations.parse(_CALIBRATION, values["calibration"]),
            **{name: values[name] for name in _NUMBERS},
        )
    )


def checked(head: HeadFile) -> HeadFile:
    """The head itself, once every value, name and shape is right.

    Raises:
        FormatError: one is not.
    """
    labels, ids = head.labels, head.label_token_ids
    if not isinstance(labels, tuple) or not 2 <= len(labels) <= MOST_LABELS:
        raise ConfigError(f"{HEAD_CONFIG}: labels is no list of 2 to {MOST_LABELS:,} names")
    if not all(isinstance(label, str) and 0 < len(label) <= LONGEST_LABEL for label in labels):
        raise ConfigError(f"{HEAD_CONFIG}: a label is no string of 1 to {LONGEST_LABEL} characters")
    _require_distinct("label", labels)
    if ids is not None:
        if not isinstance(ids, tuple) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
            raise ConfigError(f"{HEAD_CONFIG}: label_token_ids is neither null nor a list of token ids")
        if len(ids) != len(labels):
            raise ConfigError(
                f"{HEAD_CONFIG}: there are {len(ids)} label_token_ids and {len(labels)} labels; give as many"
            )
        _require_distinct("token id", ids)
    require_numbers(HEAD_CONFIG, head, _NUMBERS)
    if head.calibration is not None:
        calibrations.checked(_CALIBRATION, head.calibration)
        if head.calibration.miss_rate is not None and head.threshold is None:
            raise ConfigError(f"{_CALIBRATION}: miss_rate is that of a threshold, and threshold is null; give both")
    _check_tensors(head)
    return head


def dump(head: HeadFile) -> tuple[bytes, bytes]:
    """The bytes of HEAD_CONFIG and HEAD_WEIGHTS; the same for the same head."""
    values: dict[str, Any] = {
        "version": VERSION,
        "parameterization": head.parameterization.value,
        "labels": list(head.labels),
        "label_token_ids": None if head.label_token_ids is None else list(head.label_token_ids),
        "feature": FEATURE,
        **{name: getattr(head, name) for name in _NUMBERS},
        "calibration": calibrations.dumped(head.calibration),
    }
    weights = save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in head.tensors.items()})
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode(), weights


def write(head: HeadFile, folder: Path) -> None:
    """Put a head into an adapter's folder, which is made where it is not there.

    Raises:
        FormatError: the head would not be read again.
        AdapterExistsError: the folder has a head.
    """
    contents = dump(checked(head))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (HEAD_CONFIG, HEAD_WEIGHTS):
        if os.path.lexists(folder / name):
            raise AdapterExistsError(
                f"{name} is in folder {folder.name!r} already; remove the old head or name another"
            )
    for name, content in zip((HEAD_CONFIG, HEAD_WEIGHTS), contents, strict=True):
        (folder / name).write_bytes(content)


def expected_names(parameterization: Parameterization) -> tuple[str, ...]:
    """The tensors that a parameterization has."""
    if parameterization is Parameterization.SOFTMAX:
        return ("weight", "bias")
    names = ("noise_mean", "noise_logdiag", "W_mean", "W_logdiag")
    return names if parameterization is Parameterization.DIAGONAL else (*names, "W_offdiag")


def _check_tensors(head: HeadFile) -> None:
    kind, names, tensors = head.parameterization, expected_names(head.parameterization), head.tensors
    if missing := [name for name in names if name not in tensors]:
        raise MissingTensorError(f"{HEAD_WEIGHTS} has no {missing[0]!r}, which a {kind.value} head needs")
    if extra := tensors.keys() - set(names):
        raise UnmatchedTensorError(f"{HEAD_WEIGHTS} has {listed(extra)}, which a {kind.value} head does not use")
    classes, main_name = len(head.labels), "weight" if kind is Parameterization.SOFTMAX else "W_mean"
    main = tensors[main_name]
    width = main.shape[1] if main.dim() == 2 and main.numel() else 0
    for name in sorted(names, key=lambda name: name != main_name):  # first the one that tells the width
        tensor = tensors[name]
        if tensor.dtype != torch.float32:
            raise ConfigError(f"tensor {name!r} of {HEAD_WEIGHTS} is {tensor.dtype}; a head is kept in torch.float32")
        shape = (classes,) if name in ("bias", "noise_mean", "noise_logdiag") else (classes, width)
        if name == "W_offdiag":
            _check_offdiag(tensor, kind, shape)
        elif not width or tuple(tensor.shape) != shape:
            raise ShapeError(
                f"tensor {name!r} of {HEAD_WEIGHTS} has shape {list(tensor.shape)}; with {classes} labels and features "
                f"of width {width or 'D'} it must be {[classes, width or 'D'][: len(shape)]}"
            )
        if not tensor.isfinite().all():
            raise NonFiniteError(f"tensor {name!r} of {HEAD_WEIGHTS} holds NaN or infinity; train the head again")
        if name.endswith("logdiag") and tensor.abs().max() > LARGEST_LOG:
            raise NonFiniteError(
                f"tensor {name!r} of {HEAD_WEIGHTS} holds {float(tensor.abs().max()):.3g}, a logarithm beyond "
                f"{LARGEST_LOG:g}: as a variance it is no float32; train the head again"
            )


def _check_offdiag(tensor: torch.Tensor, kind: Parameterization, shape: tuple[int, ...]) -> None:
    dense = kind is Parameterization.DENSE
    fits = tensor.dim() == 3 and tensor.shape[:2] == shape and (tensor.shape[2] == shape[1]) == dense
    if not fits or not 0 < tensor.shape[2] <= shape[1]:
        last = str(shape[1]) if dense else f"a rank from 1 to {shape[1] - 1}"
        raise ShapeError(
            f"tensor 'W_offdiag' of {HEAD_WEIGHTS} has shape {list(tensor.shape)}; a {kind.value} head has "
            f"[{shape[0]}, {shape[1]}, {last}]: check the parameterization"
        )


def _require_distinct(what: str, values: tuple[Any, ...]) -> None:
    if len(set(values)) != len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ConfigError(f"{HEAD_CONFIG}: {what} {twice!r} stands twice; each class needs its own")


_NUMBERS: Mapping[str, Range] = {
    "n_train": Range(int, 1, LARGEST_NUMBER, optional=True),
    "prior_scale": Range(object, 1e-9, LARGEST_NUMBER, optional=True),
    "seed": Range(int, 0, 2**63 - 1, optional=True),
    "wishart_scale": Range(object, 0, LARGEST_NUMBER, optional=True),
    "dof": Range(object, 0, LARGEST_NUMBER, optional=True),
    "temperature": Range(object, 1 / LARGEST_TEMPERATURE, LARGEST_TEMPERATURE),
    "threshold": Range(object, 0, 1, optional=True),
}
_CALIBRATION = f"calibration of {HEAD_CONFIG}"
_KEYS = ("version", "parameterization", "labels", "label_token_ids", "feature", *_NUMBERS, "calibration")
