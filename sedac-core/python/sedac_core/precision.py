"""An MLP's weights at fewer bits, for levels such as 16,8,6,5,4 bits a weight.

Each group of 64 values of a row is rounded to the nearest of 16 steps between its least and its greatest value: the high plane,
four bits a weight. What that leaves is rounded to the nearest of 16 parts of a step: the low plane. The high plane alone makes four
bits a weight, both make eight. Neither text nor training goes into them. A level between four and eight reads both planes of so
many of an MLP's most important neurons, and the high plane alone of the others.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 64  # values of a row that share a step and a least value
SCALE_BITS = 32 / GROUP  # of a weight: a group's step and least value, in bfloat16
WHOLE, FINE, COARSE = 16, 8, 4  # bits: an MLP's own weights, both planes, the high plane
# Tokens of the largest step that reads planes. On CPUs torch's product of four-bit weights takes twice as long at 64 as its product of
# whole ones (docs/LOG.md).
MOST_ROUNDED = 16


@dataclasses.dataclass(frozen=True)
class Planes:
    """A weight `[out, in]` in two planes of four bits. Byte j of a group's 32 holds its value j in the low half and j + 32 in the
    high half."""

    high: Tensor  # [out, in / 2], uint8
    low: Tensor  # [out, in / 2], uint8: a sixteenth of a step each, less 8
    scale: Tensor  # [out, in / GROUP, 2], bfloat16: the step and the least value of each group

    @classmethod
    def of(cls, weight: Tensor) -> "Planes":
        """The planes of a weight `[out, in]` whose rows are whole groups."""
        groups = weight.float().unflatten(1, (-1, GROUP))  # [out, groups, 64]
        least = groups.amin(-1, keepdim=True).bfloat16().float()
        step = ((groups.amax(-1, keepdim=True) - least) / 15).bfloat16().float()
        steps = (groups - least) / step.clamp_min(1e-30)
        high = steps.round().clamp(0, 15)
        low = ((steps - high) * 16).round().clamp(-8, 7) + 8
        scale = torch.cat([step, least], -1).bfloat16()
        return cls(*(_packed(plane) for plane in (high, low)), scale.contiguous())

    def values(self, bits: int) -> Tensor:
        """The weight `[out, in]`, float32, by both planes (8 bits) or the high one (4)."""
        step, least = self.scale.float()[..., None, :].unbind(-1)  # [out, groups, 1]
        steps = self.high_values().float()
        if bits == FINE:
            steps = steps + (self.low_values().float() - 8) / 16
        return (steps.unflatten(1, (-1, GROUP)) * step + least).flatten(1)

    def high_values(self) -> Tensor:
        """What the high plane holds, `[out, in]`, uint8, 0 to 15."""
        return _unpacked(self.high)

    def low_values(self) -> Tensor:
        """What the low plane holds, `[out, in]`, uint8, 0 to 15: a sixteenth of a step each, 8 being none."""
        return _unpacked(self.low)


def planes_of(gate_up: Tensor, down: Tensor, order: Tensor) -> tuple[Planes, Planes]:
    """The planes of an MLP's gate_up `[2 · neurons, hidden]` and down `[hidden, neurons]`, its neurons in this order, `[neurons]`."""
    return Planes.of(gate_up[torch.cat([order, order + len(order)])]), Planes.of(down[:, order])


def _packed(values: Tensor) -> Tensor:
    first, second = values.to(torch.uint8).chunk(2, -1)
    return (first | second << 4).flatten(1).contiguous()


def _unpacked(plane: Tensor) -> Tensor:
    groups = plane.unflatten(1, (-1, GROUP // 2))
    return torch.cat([groups & 15, groups >> 4], -1).flatten(1)


class RoundedMLP(nn.Module):
    """The MLP of a transformers model by its planes, in the model's type: the twin of what is served.

    order `[intermediate]`: its neurons, the most important first, which is how they stand here.
    """

    def __init__(self, mlp: nn.Module, order: Tensor):
        super().__init__()
        own = (mlp.gate_proj.weight[order], mlp.up_proj.weight[order], mlp.down_proj.weight[:, order])
        planes = [Planes.of(weight) for weight in own]
        self.fine, self.coarse = (
            [plane.values(bits).to(own[0].dtype) for plane in planes] for bits in (FINE, COARSE)
        )  # gate and up [intermediate, hidden], down [hidden, intermediate]
        self.register_buffer("place", torch.arange(len(order), device=order.device), persistent=False)

    def forward(self, x: Tensor, width: int) -> Tensor:
        """Tokens `[tokens, hidden]` that all read this many neurons in eight bits, the others in four."""
        out = 0
        for weights, own in ((self.fine, slice(0, width)), (self.coarse, slice(width, len(self.place)))):
            gate, up, down = weights
            if own.stop > own.start:
                inner = F.silu(F.linear(x, gate[own])) * F.linear(x, up[own])
                out = out + F.linear(inner, down[:, own])
        return out

    def masked(self, x: Tensor, width: Tensor) -> Tensor:
        """The same with a width `[tokens]` for each token, the obvious way: all neurons at both precisions."""
        fine = self.place < width[:, None]  # [tokens, intermediate]
        out = 0
        for (gate, up, down), kept in ((self.fine, fine), (self.coarse, ~fine)):
            inner = F.silu(F.linear(x, gate)) * F.linear(x, up) * kept
            out = out + F.linear(inner, down)
        return out
