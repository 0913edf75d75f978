"""A control for the report: MLPs by weights of four bits, for random tokens or for all, with no training at all.

Each row of a weight is cut into groups, and each group rounded to nearest between its least and its greatest value, which are kept
in 16 bits each.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .collection import decoder, replaced_mlps
from .quality import Judged, Text, judge

BITS, GROUP = 4, 64


def rounded(weight: Tensor) -> Tensor:
    """A weight `[out, in]` with its values rounded, in its own type; the last group of a row may be shorter."""
    least, groups = torch.empty_like(weight, dtype=torch.float32), weight.float().split(GROUP, 1)
    step = torch.empty_like(least)
    for group, low, width in zip(groups, least.split(GROUP, 1), step.split(GROUP, 1), strict=True):
        lowest, highest = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        low.copy_(lowest.bfloat16())
        width.copy_(((highest - lowest) / (2**BITS - 1)).bfloat16())
    level = ((weight.float() - least) / step.clamp_min(1e-30)).round().clamp(0, 2**BITS - 1)
    return (least + level * step).to(weight.dtype)


def most_saved(model: nn.Module) -> float:
    """The share of MLP bytes that rounding all of them saves."""
    weight = decoder(model).layers[0].mlp.down_proj.weight
    return 1 - (BITS + 32 / GROUP) / (8 * weight.element_size())


class RoundedMLP(nn.Module):
    """Stands in for one MLP; a share of the tokens, by chance, runs its rounded weights, and `takes` `[batch, seq]` says which."""

    def __init__(self, layer: int, mlp: nn.Module):
        super().__init__()
        self.mlp, self.layer, self.share, self.takes = mlp, layer, 0.0, torch.empty(0)
        self.weights = [rounded(part.weight) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]

    def forward(self, x: Tensor) -> Tensor:  # [batch, seq, hidden]
        draw = torch.Generator(x.device).manual_seed(self.layer)
        self.takes = torch.rand(x.shape[:2], generator=draw, device=x.device) < self.share
        gate, up, down = self.weights
        rows = x.to(down.dtype)
        few = F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
        return torch.where(self.takes[..., None], few, self.mlp(rows)).to(x.dtype)


@torch.no_grad()
def evaluate_rounded(model: nn.Module, text: Text, shares: Iterable[float]) -> list[Judged]:
    """The text at each of these shares of tokens whose MLPs run by rounded weights, drawn anew in every layer."""
    stand_ins = [RoundedMLP(layer, block.mlp) for layer, block in enumerate(decoder(model).layers)]
    most, found = most_saved(model), []

    def ran() -> tuple[Tensor, Tensor]:
        takes = torch.stack([mlp.takes for mlp in stand_ins]).long()  # [layers, batch, seq]
        return F.one_hot(takes, 2), most * takes.float().mean(0)

    with replaced_mlps(model, lambda layer, mlp: stand_ins[layer]):
        for share in shares:
            for mlp in stand_ins:
                mlp.share = share
            found.append(judge(model, text, ran))
    return found
