"""Whole parameters replaced for the rows of one adapter: what is left of a step when nothing cheaper says it.

Must not know: methods, where replacements come from. A module computes its output for all rows with the base's
parameters; the rows of an adapter that replaces some of them are computed again with the replacements, in one call per
adapter.

Shapes: T rows, I/O a target's in/out widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

Replacements = Mapping[str, torch.Tensor]
"""Path of a parameter in the model → its values for one adapter."""


@dataclass(frozen=True, slots=True, eq=False)
class OverlaidRun:
    """Rows start to stop of a step, with what replaces the parameters of a module, by their names in it."""

    start: int
    stop: int
    parameters: Replacements


class OverlayPlan:
    """The replacements of one step, by module."""

    def __init__(self, runs: Sequence[tuple[int, int, Replacements]]) -> None:
        """Sort them.

        Args:
            runs: (first row, one past the last row, replacements); rows do not overlap.
        """
        self._modules: dict[str, list[OverlaidRun]] = {}
        for start, stop, replacements in runs:
            by_module: dict[str, dict[str, torch.Tensor]] = {}
            for path, values in replacements.items():
                module, _, name = path.rpartition(".")
                by_module.setdefault(module, {})[name] = values
            for module, parameters in by_module.items():
                self._modules.setdefault(module, []).append(OverlaidRun(start, stop, parameters))

    def of(self, module: str) -> Sequence[OverlaidRun]:
        """The runs that replace parameters of the module at this path."""
        return self._modules.get(module, ())

    def linear_(self, module: str, y_TO: torch.Tensor, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """Compute the rows of a target again, in place; only its weight can be replaced.

        Rows of the weight beyond the target's outputs are those of added tokens, which are computed elsewhere.

        Args:
            bias_O: the base's, where the product contains it.
        """
        for run in self.of(module):
            weight_OI = run.parameters["weight"][: y_TO.shape[1]]
            y_TO[run.start : run.stop] = F.linear(x_TI[run.start : run.stop], weight_OI, bias_O)


class Step(Protocol):
    """What runs now."""

    @property
    def overlays(self) -> OverlayPlan | None:
        """The step's replacements."""


class OverlaidModules:
    """Makes the modules that are no targets compute some rows again: the norms.

    Note: hooks are put in when the first replacement is served, by the thread that runs the steps, so that a server
    without such adapters pays nothing.
    """

    def __init__(self, modules: Mapping[str, nn.Module], step: Step, row_dims: Mapping[str, int]) -> None:
        """Nothing is changed yet.

        Args:
            modules: path → module with parameters of its own, targets left out.
            row_dims: path → which dimension of the module's input are the step's rows.
        """
        self._modules, self._step, self._row_dims = modules, step, row_dims
        self._installed = self._inside = False

    def install(self) -> None:
        """Put the hooks in, once."""
        if not self._installed:
            for path, module in self._modules.items():
                module.register_forward_hook(self._hook(path))
            self._installed = True

    def _hook(self, path: str) -> Any:
        def again(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            plan = self._step.overlays
            if plan is None or self._inside or not (runs := plan.of(path)):
                return None
            dim = self._row_dims[path]
            for run in runs:
                first, rows = run.start, run.stop - run.start
                self._inside = True
                try:
                    part = functional_call(module, dict(run.parameters), (inputs[0].narrow(dim, first, rows),))
                finally:
                    self._inside = False
                output.narrow(dim, first, rows).copy_(part)
            return output

        return again


class RowDims:
    """Learns which dimension of each module's input are the rows of a step, while the model is checked.

    Most take [1, T, …]; norms of single heads may take [1, heads, T, width].
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._possible: dict[str, set[int]] = {}
        self._rows: int | None = None
        self._handles = [module.register_forward_pre_hook(self._look(path)) for path, module in modules.items()]

    def expect(self, rows: int) -> None:
        """The next forward has this many rows."""
        self._rows = rows

    def _look(self, path: str) -> Any:
        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            shape = inputs[0].shape if inputs and isinstance(inputs[0], torch.Tensor) else ()
            fitting = {dim for dim, size in enumerate(shape) if size == self._rows}
            self._possible[path] = self._possible.get(path, fitting) & fitting

        return look

    def finish(self) -> dict[str, int]:
        """Take the hooks out again.

        Returns:
            path → dimension, for the modules whose rows can be told; parameters of others cannot be replaced.
        """
        for handle in self._handles:
            handle.remove()
        return {path: min(dims) for path, dims in self._possible.items() if len(dims) == 1}
