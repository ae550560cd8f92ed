"""iLoRA's networks as modules of torch, written from the paper's formulas: oracles of the gate. Knows nothing of Motet.

Padded on the right like the training data, with explicit masks; batch norm is a layer of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH = 64


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_1 = nn.Conv1d(WIDTH, WIDTH, 1)
        self.w_2 = nn.Conv1d(WIDTH, WIDTH, 1)
        self.layer_norm = nn.LayerNorm(WIDTH)

    def forward(self, x_NTD: torch.Tensor) -> Any:
        inner = self.w_2(torch.relu(self.w_1(x_NTD.transpose(1, 2))))
        return self.layer_norm(inner.transpose(1, 2) + x_NTD)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 1
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, normed_NTD: torch.Tensor, seen_NTD: torch.Tensor, real_NT: torch.Tensor) -> torch.Tensor:
        query, key, value = self.linear_q(normed_NTD), self.linear_k(seen_NTD), self.linear_v(seen_NTD)
        score_NTT = query @ key.transpose(1, 2) / 8
        causal_TT = torch.ones(score_NTT.shape[1:], dtype=torch.bool).tril()
        share_NTT = score_NTT.masked_fill(~(causal_TT & real_NT[:, None, :]), -1e9).softmax(-1)
        return share_NTT @ value + normed_NTD


class SasrecModule(nn.Module):
    """One block, one head; `s_fc` ranks all items and is no part of the gate."""

    def __init__(self, items: int, history_length: int) -> None:
        super().__init__()
        self.item_num = items
        self.item_embeddings = nn.Embedding(items + 1, WIDTH)
        self.positional_embeddings = nn.Embedding(history_length, WIDTH)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.mh_attn = Attention()
        self.feed_forward = FeedForward()
        self.s_fc = nn.Linear(WIDTH, items)

    def forward(self, id_NT: torch.Tensor, length_N: torch.Tensor) -> Any:
        real_NT = id_NT != self.item_num
        mask = real_NT[..., None].float()
        seen_NTD = (self.item_embeddings(id_NT) + self.positional_embeddings.weight) * mask
        hidden_NTD = self.mh_attn(self.ln_1(seen_NTD), seen_NTD, real_NT)
        out_NTD = self.ln_3(self.feed_forward(self.ln_2(hidden_NTD)) * mask)
        return out_NTD[torch.arange(len(id_NT)), length_N - 1]


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.added = (1, 0) if before == after else (2, after - before)
        self.conv1 = nn.Conv1d(before, after, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(after)
        self.conv2 = nn.Conv1d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(after)

    def forward(self, x_NCL: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x_NCL)))))
        kept = x_NCL[:, :, :: self.stride]
        zeros = kept.new_zeros(len(kept), self.added // 2, kept.shape[2])
        return torch.relu(inner + torch.cat([zeros, kept, zeros], 1))


class Gate(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, experts)


class RouterModule(nn.Module):
    """The residual network over a state; it must be in evaluation."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.gate = Gate(experts)

    def pooled(self, state_ND: torch.Tensor) -> torch.Tensor:
        """What the last linear reads, [N, 64]."""
        assert not self.training
        signal = torch.relu(self.bn1(self.conv1(state_ND.unsqueeze(1))))
        return nn.functional.adaptive_avg_pool1d(self.layer3(self.layer2(self.layer1(signal))), 1).squeeze(-1)

    def forward(self, state_ND: torch.Tensor) -> Any:
        return torch.softmax(self.gate.fc(self.pooled(state_ND)), -1)

    @torch.no_grad()
    def tell_apart(self, state_ND: torch.Tensor) -> RouterModule:
        """Set the last linear so that these users' logits have mean 0 and standard deviation 1 at each expert."""
        pooled_ND = self.pooled(state_ND)
        self.gate.fc.weight.div_((pooled_ND @ self.gate.fc.weight.T).std(0)[:, None])
        self.gate.fc.bias.copy_(-self.gate.fc.weight @ pooled_ND.mean(0))
        return self


class ProjectorModule(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp_proj = nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, item_ND: torch.Tensor) -> Any:
        return self.mlp_proj(item_ND)


@torch.no_grad()
def look_trained(module: nn.Module, seed: int) -> nn.Module:
    """Move every weight and statistic from where it starts, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.dim() > 1:
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(tensor.mean() + 0.2 * noise)
    return module.eval()
