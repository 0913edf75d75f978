"""A gate as GPU kernels read it, and the parts of its decision: functions of norm_kernels.py, gate_kernels.py and fused_kernel.py.

Level `levels`, one past the narrowest, is that of rows that do not run: padding of a captured step.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gates import GATE_RANK, LEAST_LOG_DAMAGE, MOST_LOG_DAMAGE, Gate
from .step_counters import count, count_step, phase

_RANK = tl.constexpr(GATE_RANK)
_LEAST, _MOST = tl.constexpr(LEAST_LOG_DAMAGE), tl.constexpr(MOST_LOG_DAMAGE)


@dataclasses.dataclass(frozen=True)
class DeviceGate:
    """One gate as a kernel reads it. It decides in float32 from weights and inputs in the model's type."""

    proj: Tensor  # [16, hidden], the model's type
    proj_bias: Tensor  # [16], float32
    head: Tensor  # [levels - 1, 16], float32
    head_bias: Tensor  # [levels - 1], float32
    gain: Tensor  # [levels - 1], float32: what each level saves in this gate's group, in MLPs' bytes
    group: int  # layers it decides for
    first: bool  # of the model: it counts steps and tokens
    outside: int = 0  # layers that no gate decides for, whose MLPs the first one counts as well

    @classmethod
    def make(cls, gate: Gate, gain: Tensor, group: int, first: bool, like: Tensor, outside: int = 0) -> "DeviceGate":
        """A trained gate on the device and in the type of `like`."""
        proj = (gate.proj.weight / gate.scale).to(like)
        small = (gate.proj.bias, gate.head.weight, gate.head.bias, gain)
        return cls(
            proj,
            *(t.detach().to(like.device, torch.float32).contiguous() for t in small),
            group,
            first,
            outside if first else 0,
        )

    @property
    def levels(self) -> int:
        return len(self.gain) + 1

    @property
    def block_k(self) -> int:
        """Depth of one step of its product: a power of two of at most 128 that divides the hidden size."""
        hidden_size = self.proj.shape[1]
        assert hidden_size % 16 == 0, hidden_size
        return min(128, hidden_size & -hidden_size)


@triton.jit
def product(x, proj, token, inside, first, end, hidden_size, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Some depth of the product with the gate's first layer, `[16, BLOCK_M]`, float32."""
    r = tl.arange(0, _RANK)
    acc = tl.zeros((_RANK, BLOCK_M), tl.float32)
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(proj + r[:, None] * hidden_size + k[None, :])
        a = tl.load(x + token.to(tl.int64)[None, :] * hidden_size + k[:, None], mask=inside[None, :], other=0.0)
        acc = tl.dot(w, a, acc, input_precision="ieee")
    return acc


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def levels_present(level, LEVELS: tl.constexpr):
    """A bit for each level that some row has."""
    return tl.reduce(tl.where(level < LEVELS, 1 << level, 0), 0, _or)


@triton.jit
def head_of(proj_bias, head, head_bias, gain, LEVELS: tl.constexpr):
    """What `decide` needs of a gate beside its product: `[16]`, and by level, a power of two of them, zeros for the first."""
    r = tl.arange(0, _RANK)
    j = tl.arange(0, triton.next_power_of_2(LEVELS))
    narrows = (j > 0) & (j < LEVELS)
    w = tl.load(head + (j - 1)[:, None] * _RANK + r[None, :], mask=narrows[:, None], other=0.0)
    w_bias = tl.load(head_bias + j - 1, mask=narrows, other=0.0)
    return tl.load(proj_bias + r), w, w_bias, tl.load(gain + j - 1, mask=narrows, other=0.0)


@triton.jit
def decide(z, rest, price, LEVELS: tl.constexpr):
    """`gates.choose` of the product z `[16, BLOCK_M]`: each token's level at its price `[BLOCK_M]`; NaN keeps the whole MLP.
    `rest` is what `head_of` loaded."""
    z_bias, w, w_bias, gain = rest
    j = tl.arange(0, triton.next_power_of_2(LEVELS))[:, None]
    z += z_bias[:, None]
    inner = z / (1 + tl.exp(-z))
    log_damage = tl.sum(inner[None, :, :] * w[:, :, None], 1) + w_bias[:, None]  # [levels, BLOCK_M]
    log_damage = tl.where(log_damage < _LEAST, _LEAST, log_damage)  # as clamp does: NaN stays
    log_damage = tl.where(log_damage > _MOST, _MOST, log_damage)
    cost = tl.exp(log_damage) - tl.exp(price)[None, :] * gain[:, None]
    cost = tl.where(j == 0, 0.0, tl.where(j < LEVELS, cost, float("inf")))
    odd = tl.max((cost != cost).to(tl.int32), 0)
    return tl.where(odd != 0, 0, tl.argmin(cost, 0))


@triton.jit
def at_least(level, least, i, tokens, LATCHED: tl.constexpr):
    """Levels of rows `i`, none below the level in `least` that an earlier gate bound its token to."""
    if LATCHED:
        level = tl.maximum(level, tl.load(least + i, mask=i < tokens, other=0))
    return level


@triton.jit
def count_levels(counters, level, row, price, group, first, outside, LEVELS: tl.constexpr):
    """Count a step's levels `[BLOCK_M]` for all layers of a group; `first` is 1 at the model's first, which counts the step and the
    layers `outside` of all groups, too."""
    tl.static_assert(LEVELS <= 8 and level.shape[0] < 256)  # so that one sum counts all levels, in a byte each
    one = tl.full(level.shape, 1, tl.int64)
    counts = tl.sum(tl.where(level < LEVELS, one << (8 * level).to(tl.int64), 0), 0)
    seen = 0
    for j in tl.static_range(LEVELS):
        found = ((counts >> (8 * j)) & 255).to(tl.int32)
        count(counters, 10 + j, (found * group).to(tl.int64))  # BY_LEVEL
        seen += found
    if first != 0:
        off = tl.sum(((level < LEVELS) & (row == 1)).to(tl.int32), 0)
        count_step(counters, seen > 0, seen, off, phase(price), 0)  # predicated
        count(counters, 10, (seen * outside).to(tl.int64))
