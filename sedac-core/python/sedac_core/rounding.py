"""A control for the report: MLPs by weights of four bits, for random tokens or for all, with no training at all.

Each row of a weight is cut into groups, and each group rounded to nearest between its least and its greatest value, which are kept
in 16 bits each.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .collection import decoder, replaced_mlps
from .quality import Decide, Judged, Text, judge, random_levels

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
    """Stands in for one MLP: its own weights for tokens of level 0, rounded ones for those of level 1; `level` `[batch, seq]` is
    what `decide(layer, x)` said last."""

    def __init__(self, layer: int, mlp: nn.Module, decide: Decide):
        super().__init__()
        self.layer, self.mlp, self.coarse, self.decide = layer, mlp, copy.deepcopy(mlp), decide
        self.level = torch.empty(0)
        for weight in self.coarse.parameters():
            weight.data = rounded(weight.data)

    def forward(self, x: Tensor) -> Tensor:  # [batch, seq, hidden]
        self.level = self.decide(self.layer, x)
        rows = x.to(self.mlp.down_proj.weight.dtype)
        return torch.where(self.level[..., None] > 0, self.coarse(rows), self.mlp(rows)).to(x.dtype)


@torch.no_grad()
def evaluate_rounded(model: nn.Module, text: Text, shares: Iterable[float]) -> list[Judged]:
    """The text at each of these shares of tokens whose MLPs run by rounded weights, drawn anew in every layer."""

    def decide(layer: int, x: Tensor) -> Tensor:
        return drawn(layer, x)

    stand_ins = [RoundedMLP(layer, block.mlp, decide) for layer, block in enumerate(decoder(model).layers)]
    most, found = most_saved(model), []

    def ran() -> tuple[Tensor, Tensor]:
        level = torch.stack([mlp.level for mlp in stand_ins])  # [layers, batch, seq]
        return F.one_hot(level, 2), most * level.float().mean(0)

    with replaced_mlps(model, lambda layer, mlp: stand_ins[layer]):
        for share in shares:
            drawn = random_levels(torch.tensor([[1 - share, share]]).expand(len(stand_ins), 2), model.device)
            found.append(judge(model, text, ran))
    return found
