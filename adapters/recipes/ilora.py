"""iLoRA: one LoRA pair per linear, of which a router weighs the K parts of the rank by the history of the row's user.

    y = W x + s B (g ⊙ A x),   s = alpha / (r / K),   g = ω repeated over each part,   ω = router(SASRec(history))

SASRec is frozen. The router starts at random and learns at 0.3 of the rate, as its authors have it; b is zero, so the
start is the base. Items stand in the question beside their names, by a projector that learns too. With K = 1, ω is 1:
LLaRA, LoRA beside the same projector, in the same folder.

Must not know: the other starts, data, loops. Source: https://arxiv.org/abs/2408.10135, https://arxiv.org/abs/2312.02445.

Shapes: I/O in and out width of a linear, R rank, K experts, N rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn.functional import linear

from motet.adapters.gates.router import is_statistic
from motet.adapters.gates.sasrec import Sasrec
from motet.adapters.methods.tensors import PREFIX
from motet.adapters.recipes.errors import TargetError
from motet.adapters.recipes.folder import write
from motet.adapters.recipes.items import ItemEmbedding
from motet.adapters.recipes.readers import MARKERS, User
from motet.adapters.recipes.router_network import RouterNetwork
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.source import GATE_FILE

EXPERTS = 4
ROUTER_RATE = 0.3
"""The authors' K, and the router's share of the learning rate."""


class UserGate(nn.Module):
    """The gate of the rows at hand; all linears read it."""

    def __init__(self, sasrec: Sasrec, experts: int, share: int) -> None:
        """The router draws its start.

        Args:
            share: r / K, each expert's part of the rank.
        """
        super().__init__()
        self.router = RouterNetwork(experts)
        self._sasrec, self._share = sasrec, share
        self.factors_NK: torch.Tensor | None = None

    def see(self, users: Sequence[User]) -> None:
        """Set the users of the rows that follow, in their order; gradients reach the router."""
        with torch.no_grad():
            state_ND = self._sasrec.states([user.history for user in users])
        self.factors_NK = self.router(state_ND)

    def rows(self) -> torch.Tensor:
        """The factors of every part of the rank: g [N, 1, R]."""
        assert self.factors_NK is not None, "a forward without users"
        return self.factors_NK.repeat_interleave(self._share, dim=1)[:, None]


class GatedLinear(nn.Module):
    """A frozen linear layer with a gated pair beside it."""

    def __init__(self, base: nn.Linear, gate: UserGate, rank: int, scale: float) -> None:
        """The change is zero."""
        super().__init__()
        self.base_layer, self._gate, self._scale = base, (gate,), scale  # in a tuple: no layer owns it
        self.a_RI = nn.Parameter(torch.empty(rank, base.in_features))
        self.b_OR = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a_RI, a=math.sqrt(5))  # as LoRA starts

    def forward(self, x_NTI: torch.Tensor) -> torch.Tensor:
        """W x + c + s B (g ⊙ A x), each row by its own user's g."""
        y_NTO: torch.Tensor = self.base_layer(x_NTI)
        inner_NTR = linear(x_NTI, self.a_RI) * (self._scale * self._gate[0].rows())
        return y_NTO + linear(inner_NTR, self.b_OR)


def start(setup: Setup, experts: int = EXPERTS) -> Trainee:
    """Put a gated pair beside every target, and a projector beside the embedding.

    Raises:
        TargetError: the experts do not divide the rank.
        DataError: the task has no histories.
        FormatError: what reads histories is no SASRec.
    """
    if setup.rank % experts:
        raise TargetError(
            f"--rank {setup.rank} does not split into {experts} experts of one size; choose a multiple of {experts}"
        )
    sasrec = setup.encoder()
    items, length = (len(sasrec[f"{name}_embeddings.weight"]) for name in ("item", "positional"))
    setup.model.requires_grad_(False)
    frozen = Sasrec(sasrec, items - 1, length)
    gate = UserGate(frozen, experts, setup.rank // experts)
    embedding = ItemEmbedding(setup.model.get_input_embeddings(), frozen, items - 1, setup.markers())
    setup.model.set_input_embeddings(embedding)
    scale = setup.alpha * experts / setup.rank
    trainable: dict[str, nn.Parameter] = {}
    for path, module in list(setup.model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, nn.Linear) and leaf in setup.targets:
            pair = GatedLinear(module, gate, setup.rank, scale)
            setattr(setup.model.get_submodule(parent), leaf, pair)
            trainable[f"{PREFIX}{path}.lora_A.weight"] = pair.a_RI
            trainable[f"{PREFIX}{path}.lora_B.weight"] = pair.b_OR
    setup.model.add_module("user_gate", gate)  # so that batch norm is told when the model trains
    routing = {f"router.{name}": parameter for name, parameter in gate.router.named_parameters()}
    projection = {f"projector.mlp_proj.{name}": parameter for name, parameter in embedding.mlp_proj.named_parameters()}
    statistics = {f"router.{name}": buffer for name, buffer in gate.router.named_buffers() if is_statistic(name)}

    def save_folder(folder: Path) -> None:
        dtype = getattr(torch, setup.recipe.saved_dtype)
        networks = {f"sasrec.{name}": tensor for name, tensor in sasrec.items()} | statistics
        networks |= {name: parameter.to(dtype) for name, parameter in {**routing, **projection}.items()}
        owned = {name: tensor.detach().clone().contiguous() for name, tensor in networks.items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GATE_FILE).write_bytes(save(owned))
        config = {
            "peft_type": "ILORA",
            "base_model_name_or_path": setup.base_name,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": setup.rank,
            "lora_alpha": setup.alpha,
            "num_moe": experts,
            "history_length": length,
            "items": items - 1,
            "placeholders": MARKERS,
        }
        write(folder, trainable, config, dtype)

    def see(users: Sequence[User]) -> None:
        gate.see(users)
        embedding.see(users)

    return Trainee(
        setup.model,
        {**trainable, **routing, **projection},
        save_folder,
        kept=statistics,
        rates=dict.fromkeys(routing, ROUTER_RATE),
        for_users=see,
    )
