"""What adapters do to the input embedding: some rows of a step are looked up with another one's change.

Must not know: methods, text, which adapter a row has; that is decided outside, per step. The embedding is the linear
W^T over one-hot rows, so a product with A is a column of A, and a changed column is a changed token:

    y = (1 + d) ⊙ (W^T[:, t] + B A[:, t] + V[:, place of t])

The module's own scale, where it has one (Gemma 3), multiplies the change as it multiplies the weight.

Shapes: T rows, V vocabulary, D width, R rank, S changed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedRun:
    """Rows start to stop of a step and what their adapter does; None where it does not. Views of the arena.

    Attributes:
        weight_VD: replaces the base's.
        low_rank: A [R, V] and B^T [R, D].
        gate_R: float32, the factor of each rank row.
        tokens: changed tokens [S] int32, ascending, and V^T [S, D].
        scale_D: d.
        adds_tokens: whether ids beyond the base's vocabulary may stand there; the base has zeros for them.
    """

    start: int
    stop: int
    weight_VD: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    gate_R: torch.Tensor | None = None
    tokens: tuple[torch.Tensor, torch.Tensor] | None = None
    scale_D: torch.Tensor | None = None
    adds_tokens: bool = False


def is_served(module: nn.Module) -> bool:
    """Whether the formula above is what the module computes: a lookup, at most multiplied by one number."""
    plain = type(module) is nn.Embedding
    return isinstance(module, nn.Embedding) and module.max_norm is None and (plain or hasattr(module, "embed_scale"))


class AdaptedEmbedding:
    """Changes what an embedding found, row by row.

    Note: the hooks are put in when the first such adapter is served, by the thread that runs the steps, so that a
    server without one pays nothing.
    """

    def __init__(self, module: nn.Module, vocabulary: int) -> None:
        self._module, self._vocabulary = module, vocabulary
        self._tokens: torch.Tensor | None = None
        self._own_scale = torch.as_tensor(getattr(module, "embed_scale", 1)).to(next(module.parameters()))
        self._installed = self._inside = False
        self.runs: Sequence[EmbeddedRun] = ()
        """What the step that runs does."""
        self.given: Sequence[tuple[int, torch.Tensor]] = ()
        """Rows of the step that runs with the vector [D] that stands in the place of their token's, as it is."""

    def install(self) -> None:
        """Put the hook in, once."""
        if not self._installed:
            self._module.register_forward_pre_hook(self._keep)
            self._module.register_forward_hook(self._hook)
            self._installed = True

    def _keep(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Remember the tokens; those that the base has not are looked up as another and replaced afterwards."""
        if self._inside or not any(run.adds_tokens for run in self.runs):
            return None
        self._tokens = inputs[0]
        return (inputs[0].clamp(max=self._vocabulary - 1), *inputs[1:])

    def _hook(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._inside:
            return
        tokens = inputs[0] if self._tokens is None else self._tokens
        self._tokens = None
        tokens_T, found_TD = tokens.reshape(-1), output.view(-1, output.shape[-1])
        for run in self.runs:
            self._change_(module, run, tokens_T[run.start : run.stop], found_TD[run.start : run.stop])
        for row, values_D in self.given:
            found_TD[row].copy_(values_D)

    def _change_(self, module: nn.Module, run: EmbeddedRun, tokens_T: torch.Tensor, found_TD: torch.Tensor) -> None:
        is_added_T1 = (tokens_T >= self._vocabulary)[:, None] if run.adds_tokens else None
        if is_added_T1 is not None:
            found_TD.masked_fill_(is_added_T1, 0)
        if run.weight_VD is not None:
            found_TD.copy_(self._look_up(module, run.weight_VD, tokens_T))
        if run.low_rank is not None:
            a_RV, b_RD = run.low_rank
            looked_up_TR = a_RV.index_select(1, tokens_T.clamp(max=self._vocabulary - 1)).T
            if run.gate_R is not None:
                looked_up_TR = (looked_up_TR * run.gate_R).to(b_RD.dtype)
            change_TD = looked_up_TR @ b_RD * self._own_scale
            found_TD += change_TD if is_added_T1 is None else change_TD.masked_fill_(is_added_T1, 0)
        if run.tokens is not None:
            changed_S, v_SD = run.tokens
            place_T = torch.searchsorted(changed_S, tokens_T.to(torch.int32)).clamp_(max=len(changed_S) - 1)
            is_changed_T = changed_S.index_select(0, place_T) == tokens_T
            found_TD += (v_SD.index_select(0, place_T) * self._own_scale).masked_fill_(~is_changed_T[:, None], 0)
        if run.scale_D is not None:
            found_TD.addcmul_(found_TD, run.scale_D)

    def _look_up(self, module: nn.Module, weight_VD: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        self._inside = True
        try:
            found_TD: torch.Tensor = functional_call(module, {"weight": weight_VD}, (tokens_T,))
            return found_TD
        finally:
            self._inside = False
