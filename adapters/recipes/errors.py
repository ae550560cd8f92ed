"""What can go wrong in training an adapter, as a branch of motet.adapters' error tree.

    AdapterError
    └── RecipeError
        ├── DataError          the training data is absent or too small
        ├── TargetError        a layer to adapt does not exist, or is too narrow for the rank
        ├── OutputError        the output folder is not what the run needs
        └── CheckpointError    an unfinished run cannot be continued

Must not know: torch, PEFT.
"""

from __future__ import annotations

from motet.adapters.errors import AdapterError


class RecipeError(AdapterError):
    """The training cannot be done as asked."""


class DataError(RecipeError):
    """The data of a task is absent, or has too few rows."""


class TargetError(RecipeError):
    """A layer to adapt does not exist in the base, or is too narrow for the rank."""


class OutputError(RecipeError):
    """The output folder holds something already, or lacks what is to be continued."""


class CheckpointError(RecipeError):
    """A checkpoint is damaged or belongs to a run with other settings."""
