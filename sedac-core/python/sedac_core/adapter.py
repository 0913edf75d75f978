"""The adapters of one layer: small GLUs that stand in for the neurons that a narrowed MLP leaves out."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AdapterBank(nn.Module):
    """One adapter for each level below the whole MLP, side by side, so that one matrix product runs all of them.

    Level 0 is the whole MLP and has none; level j uses columns (j - 1) * rank to j * rank of the bank.
    """

    def __init__(self, hidden_size: int, rank: int, count: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(2 * count * rank, hidden_size))  # all gate rows, then all up rows
        self.down = nn.Parameter(torch.zeros(hidden_size, count * rank))
        self.bias = nn.Parameter(torch.zeros(count, hidden_size))

    @property
    def count(self) -> int:
        return self.bias.shape[0]

    @property
    def rank(self) -> int:
        return self.down.shape[1] // self.count

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """The adapter of each token's own level, `[tokens, hidden]`, zero at level 0.

        x `[tokens, hidden]` is the MLP's input, level `[tokens]` runs from 0 to `count`.
        """
        gate, up = F.linear(x, self.gate_up.to(x.dtype)).chunk(2, -1)  # [tokens, count * rank] each
        inner = own_columns(F.silu(gate) * up, level, self.rank)
        return F.linear(inner, self.down.to(x.dtype)) + self.bias_of(level).to(x.dtype)

    def bias_of(self, level: Tensor) -> Tensor:
        return F.pad(self.bias, (0, 0, 1, 0))[level]  # [tokens, hidden]

    def alone(self, x: Tensor, level: int) -> Tensor:
        """The same for tokens that all have this level, from its own weights only: what a kernel reads."""
        if level == 0:
            return torch.zeros_like(x)
        gate, up, down, bias = (weight.to(x.dtype) for weight in self.own(level))
        inner = F.silu(F.linear(x, gate)) * F.linear(x, up)  # [tokens, rank]
        return F.linear(inner, down) + bias

    def own(self, level: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The adapter of one level above 0: gate and up `[rank, hidden]`, down `[hidden, rank]`, bias `[hidden]`."""
        own = slice((level - 1) * self.rank, level * self.rank)
        gate, up = self.gate_up.chunk(2)
        return gate[own], up[own], self.down[:, own], self.bias[level - 1]


def own_columns(inner: Tensor, level: Tensor, rank: int) -> Tensor:
    """`[tokens, count * rank]` with the columns of all levels but the token's own, `[tokens]`, set to zero."""
    column = torch.arange(inner.shape[-1], device=inner.device) // rank  # [count * rank]
    return inner * (column == level[..., None] - 1)
