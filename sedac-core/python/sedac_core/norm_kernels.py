"""The norm before an MLP with a gate, on a GPU, and for few tokens the gate with it: a gate costs no launch of its own.

A program adds, norms and decides for one token. It asks for the gate's weights before what the norm waits for, so that they are there
when the norm is. The wrappers have their torch twins beside them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate_kernels import check_choices, levels_twin
from .gate_parts import DeviceGate, at_least, decide, head_of
from .gates import GATE_RANK
from .step_counters import chosen_rows, real_rows

_RANK = tl.constexpr(GATE_RANK)


class Norm(NamedTuple):
    """A root-mean-square norm with a weight `[hidden]`."""

    weight: Tensor
    epsilon: float


@triton.jit(do_not_specialize=["tokens"])
def _norm_kernel(
    hidden, residual, weight, x, summed,
    proj, proj_bias, head, head_bias, gain, price, slots, chosen, least, level,
    epsilon, tokens, hidden_size, GATED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_CHOICES: tl.constexpr, LATCHED: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK)
    inside = k < hidden_size
    at = tl.program_id(0).to(tl.int64) * hidden_size + k
    if GATED:  # all of this arrives while the norm is made
        token = tl.program_id(0) + tl.arange(0, 1)
        r = tl.arange(0, _RANK)
        w = tl.load(proj + r[:, None] * hidden_size + k[None, :], mask=inside[None, :], other=0.0)
        own_price = tl.load(price + chosen_rows(chosen, token, tokens, 1, HAS_CHOICES))
        real, rest = real_rows(slots, token, tokens, HAS_SLOTS), head_of(proj_bias, head, head_bias, gain, LEVELS)
    scale = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    both = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    both += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(summed + at, both.to(summed.dtype.element_ty), mask=inside)
    normed = (both * tl.rsqrt(tl.sum(both * both, 0) / hidden_size + epsilon)).to(x.dtype.element_ty)
    normed = (normed.to(tl.float32) * scale).to(x.dtype.element_ty)
    tl.store(x + at, normed, mask=inside)
    if GATED:
        z = tl.sum(w.to(tl.float32) * normed.to(tl.float32)[None, :], 1)
        own = at_least(decide(z[:, None], rest, own_price, LEVELS), least, token, tokens, LATCHED)
        tl.store(level + token, tl.where(real, own, LEVELS))


def normed(hidden: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The norm of hidden plus residual, both `[tokens, hidden]`, and that sum. One launch."""
    x, summed, block = *_room(hidden, residual, norm), triton.next_power_of_2(hidden.shape[1])
    _norm_kernel[(len(x),)](
        hidden, residual, norm.weight, x, summed, *(x,) * 10, norm.epsilon, *x.shape, False, 1, block, False, False, False, num_warps=8,
    )  # fmt: skip
    return x, summed


def gated_norm(
    hidden: Tensor,
    residual: Tensor,
    norm: Norm,
    gate: DeviceGate,
    price: Tensor,
    slots: Tensor | None,
    chosen: Tensor | None = None,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same and each token's level `[tokens]`, int32, as `gate_kernels.levels_of` decides it, whose arguments these are. One launch,
    which counts nothing. For few tokens: each has the gate's weights read anew."""
    x, summed = _room(hidden, residual, norm)
    tokens, hidden_size = x.shape
    assert x.dtype == gate.proj.dtype and gate.proj.shape[1] == hidden_size
    check_choices(price, chosen, tokens, least)
    level = torch.empty(tokens, dtype=torch.int32, device=x.device)
    _norm_kernel[(tokens,)](
        hidden, residual, norm.weight, x, summed, gate.proj, gate.proj_bias, gate.head, gate.head_bias, gate.gain, price,
        level if slots is None else slots, level if chosen is None else chosen, level if least is None else least, level,
        norm.epsilon, tokens, hidden_size, True, gate.levels, triton.next_power_of_2(hidden_size),
        slots is not None, chosen is not None, least is not None, num_warps=8,
    )  # fmt: skip
    return x, summed, level


def _room(hidden: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    assert hidden.shape == residual.shape and hidden.is_contiguous() and residual.is_contiguous()
    assert norm.weight.shape == hidden.shape[1:]
    return torch.empty_like(hidden), torch.empty_like(residual)


def normed_twin(hidden: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`normed` in torch."""
    both = hidden.float() + residual.float()
    x = (both * torch.rsqrt(both.pow(2).mean(1, keepdim=True) + norm.epsilon)).to(hidden.dtype)
    return (x.float() * norm.weight.float()).to(hidden.dtype), both.to(residual.dtype)


def gated_norm_twin(
    hidden: Tensor,
    residual: Tensor,
    norm: Norm,
    gate: DeviceGate,
    price: Tensor,
    slots: Tensor | None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_norm` in torch."""
    x, summed = normed_twin(hidden, residual, norm)
    return x, summed, levels_twin(x, gate, price, slots, None, *rest).int()
