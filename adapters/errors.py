"""The error tree of motet.adapters.

    AdapterError
    ├── SourceError              the files cannot be read safely
    │   ├── SourceNotFoundError
    │   ├── UnsafePathError
    │   ├── UnsafeFormatError
    │   ├── CorruptSourceError
    │   ├── InvalidSourceError
    │   ├── ForbiddenSourceError
    │   ├── SourceUnavailableError
    │   └── StoreFullError
    ├── FormatError              the files do not describe an adapter of this base exactly
    │   ├── ConfigError
    │   ├── UnsupportedError     known, but not served (yet): never applied in part
    │   ├── UnmatchedTensorError
    │   ├── MissingTensorError
    │   ├── ShapeError
    │   ├── NonFiniteError
    │   └── GoldenError
    ├── RegistryError
    │   ├── AdapterNotFoundError
    │   │   └── VersionNotServedError
    │   ├── AdapterExistsError
    │   ├── InvalidNameError
    │   ├── SourceChangedError
    │   ├── VersionConflictError
    │   ├── NameBusyError
    │   ├── PublishesFullError
    │   ├── AdapterFailedError
    │   ├── CatalogueError
    │   ├── ArenaFullError
    │   ├── HostFullError
    │   └── UnmeasuredError
    ├── ExportError              the folder to write cannot be written
    ├── GateError                what a request gives for its gate cannot be used
    └── RecipeError              see recipes/errors.py

Every message names the thing, the value, the limit and the remedy. No message carries a path of the server.
"""

from __future__ import annotations

from collections.abc import Iterable


class AdapterError(Exception):
    """Base of every error raised by motet.adapters."""


class SourceError(AdapterError):
    """The adapter's files cannot be read safely."""


class SourceNotFoundError(SourceError):
    """There is no adapter at the given place."""


class UnsafePathError(SourceError):
    """The path leaves the roots that loading is confined to."""


class UnsafeFormatError(SourceError):
    """The weights are in a format that can run code when read."""


class CorruptSourceError(SourceError):
    """A file is truncated, contradicts its own header, or exceeds a limit."""


class InvalidSourceError(SourceError):
    """The source is written in a way that cannot be followed, or needs what is not installed."""


class ForbiddenSourceError(SourceError):
    """The source, or a place it sends to, is not on the list of allowed sources."""


class SourceUnavailableError(SourceError):
    """The source does not answer, not in time or not to the end; asking again may help."""


class StoreFullError(SourceError):
    """What is downloaded does not fit beside what is in use."""


class FormatError(AdapterError):
    """The files are readable but do not describe an adapter of the resident base exactly."""


class ConfigError(FormatError):
    """adapter_config.json has an unknown key or an impossible value."""


class UnsupportedError(FormatError):
    """The adapter uses a feature that cannot be served exactly."""


class UnmatchedTensorError(FormatError):
    """Tensors remain that no rule of the method consumes."""


class MissingTensorError(FormatError):
    """A tensor that the configuration promises is absent."""


class ShapeError(FormatError):
    """A tensor's shape contradicts the base model or the resolved rank."""


class NonFiniteError(FormatError):
    """A tensor holds NaN or infinity."""


class GoldenError(FormatError):
    """The adapter does not compute what its golden.json says, or golden.json cannot be checked."""


class RegistryError(AdapterError):
    """The registry cannot do what was asked."""


class AdapterNotFoundError(RegistryError):
    """No adapter is published under the name."""


class VersionNotServedError(AdapterNotFoundError):
    """The name means another version than the one that was asked for."""


class AdapterExistsError(RegistryError):
    """The name is taken and replacement was not asked for."""


class InvalidNameError(RegistryError):
    """The name cannot be given to an adapter."""


class SourceChangedError(RegistryError):
    """The source holds something else than it should."""


class VersionConflictError(RegistryError):
    """The name means another version than whoever changes it thinks."""


class NameBusyError(RegistryError):
    """Somebody else changes the same name."""


class PublishesFullError(RegistryError):
    """As many adapters are being published as may be at once."""


class AdapterFailedError(RegistryError):
    """The name's version could not be restored."""


class CatalogueError(RegistryError):
    """The catalogue cannot be opened, read or written."""


class ArenaFullError(RegistryError):
    """The adapter does not fit into the adapter memory that is left."""


class HostFullError(RegistryError):
    """What must stay of the adapter does not fit into the host memory that is left."""


class UnmeasuredError(RegistryError):
    """What a lossy form misses cannot be measured, so it is not served."""


class ExportError(AdapterError):
    """An adapter cannot be written where it was asked for."""


class GateError(AdapterError):
    """What a request gives for the adapter's gate cannot be used.

    Attributes:
        field: the field of the request that is wrong.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def listed(names: Iterable[str], most: int = 4) -> str:
    """At most `most` names joined by commas, and how many were left out."""
    every = sorted(names)
    head = ", ".join(repr(name) for name in every[:most])
    return head if len(every) <= most else f"{head} and {len(every) - most} more"
