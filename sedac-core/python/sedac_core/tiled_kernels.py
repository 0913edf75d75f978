"""The Triton kernels that run an MLP at given levels, for more tokens: gather, two products in tiles, and, of splits, a sum.

kernels.py chooses between them and fused_kernel.py, and says what levels, rows and `ends` are. Weights are never read for rows that
do not need them; grids depend on shapes alone.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .mlp_weights import Weights

# Tiles of rows whose programs follow each other: all that such a group reads of its rows stays in the chip's cache while the columns'
# weights pass once. One group is all that steps of up to 1,024 tokens have.
GROUP = 16


@triton.jit(do_not_specialize=["tokens"])
def _gather_kernel(x, gathered, rows, running, hidden_size, BLOCK: tl.constexpr):
    """gathered[i] = x[rows[i]] for the running rows."""
    i = tl.program_id(0)
    if i >= tl.load(running):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + tl.load(rows + i) * hidden_size + column, mask=column < hidden_size)
    tl.store(gathered + i.to(tl.int64) * hidden_size + column, values, mask=column < hidden_size)


@triton.jit
def _tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of this program's tile."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    before = tl.program_id(0) // (GROUP * across) * GROUP
    place = tl.program_id(0) % (GROUP * across)
    own = tl.minimum(down - before, GROUP)
    return (before + place % own) * BLOCK_M, place // own * BLOCK_N


@triton.jit
def _rows_of(n, ends, neurons, LEVELS: tl.constexpr, WIDTHS: tl.constexpr, RANK: tl.constexpr):
    """The rows [first, last) that run neuron n."""
    first, last = 0, 0
    for j in tl.static_range(LEVELS):
        last = tl.where(n < WIDTHS[j], tl.load(ends + j), last)
    if RANK > 0:
        for j in tl.static_range(1, LEVELS):
            own = (n >= neurons + (j - 1) * RANK) & (n < neurons + j * RANK)
            first = tl.where(own, tl.load(ends + j - 1), first)
            last = tl.where(own, tl.load(ends + j), last)
    return first, last


@triton.jit(do_not_specialize=["tokens"])
def _gate_up_kernel(
    x, gate_up, act, ends, tokens, hidden_size, neurons, adapters,
    LEVELS: tl.constexpr, WIDTHS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) · up over tensor descriptors of the gathered rows; zeros where only other rows run these neurons."""
    m, n = _tile(tokens, neurons + adapters, BLOCK_M, BLOCK_N, GROUP)
    if m >= tl.load(ends + LEVELS - 1):
        return
    first, last = _rows_of(n, ends, neurons, LEVELS, WIDTHS, RANK)
    if first >= last:
        return
    gate_row, up_row = n, n + neurons
    if RANK > 0:
        gate_row = tl.where(n < neurons, n, n + neurons)
        up_row = gate_row + tl.where(n < neurons, neurons, adapters)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if (m < last) & (m + BLOCK_M > first):
        for k in range(0, hidden_size, BLOCK_K):
            a = x.load([m, k])
            g = gate_up.load([gate_row, k])
            u = gate_up.load([up_row, k])
            gate = tl.dot(a, tl.trans(g), gate, input_precision="ieee")
            up = tl.dot(a, tl.trans(u), up, input_precision="ieee")
    inner = gate / (1 + tl.exp(-gate)) * up
    i = m + tl.arange(0, BLOCK_M)
    act.store([m, n], tl.where(((i >= first) & (i < last))[:, None], inner, 0.0).to(act.dtype))


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(
    act, down, out, partial, bias, rows, ends, tokens, hidden_size, neurons,
    LEVELS: tl.constexpr, WIDTHS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partial[split] = one share of neurons' part of the output, `[splits, tokens, hidden]` in the order of the rows; where there
    is one split, out[rows[i]] = row i's output."""
    m, n = _tile(tokens, hidden_size, BLOCK_M, BLOCK_N, GROUP)
    split, running = tl.program_id(1), tl.load(ends + LEVELS - 1)
    if SPLITS > 1 and m >= running:
        return
    reach = 0  # neurons of the tile's first row, which has the lowest level of the tile
    for j in tl.static_range(LEVELS - 1, -1, -1):
        reach = tl.where(m < tl.load(ends + j), WIDTHS[j], reach)
    span = tl.cdiv(tl.cdiv(reach, SPLITS), BLOCK_K) * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(split * span, tl.minimum(split * span + span, reach), BLOCK_K):
        acc = tl.dot(act.load([m, k]), tl.trans(down.load([n, k])), acc, input_precision="ieee")
    if RANK > 0:
        for j in tl.static_range(1, LEVELS):
            first, last = tl.load(ends + j - 1), tl.load(ends + j)
            if (first < last) & (m < last) & (m + BLOCK_M > first) & (split == j % SPLITS):
                start = neurons + (j - 1) * RANK
                for k in range(start, start + RANK, BLOCK_K):
                    acc = tl.dot(act.load([m, k]), tl.trans(down.load([n, k])), acc, input_precision="ieee")
    i = m + tl.arange(0, BLOCK_M)
    column = n + tl.arange(0, BLOCK_N)
    inside = (i < tokens)[:, None] & (column < hidden_size)[None, :]
    if SPLITS > 1:
        at = (split * tokens + i.to(tl.int64))[:, None] * hidden_size + column[None, :]
        tl.store(partial + at, acc, mask=inside)
    else:
        if RANK > 0:
            level = _levels(i, ends, LEVELS)
            own = bias + (level - 1)[:, None] * hidden_size + column[None, :]
            acc += tl.load(own, mask=inside & ((level > 0) & (level < LEVELS))[:, None], other=0.0).to(tl.float32)
        acc = tl.where((i < running)[:, None], acc, 0.0)  # what others' activations hold is undefined
        at = tl.load(rows + i, mask=i < tokens, other=0)[:, None] * hidden_size + column[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _levels(i, ends, LEVELS: tl.constexpr):
    """The levels of sorted rows i."""
    level = i * 0
    for j in tl.static_range(LEVELS):
        level += (i >= tl.load(ends + j)).to(tl.int32)
    return level


@triton.jit(do_not_specialize=["tokens"])
def _reduce_kernel(
    partial, out, bias, rows, ends, tokens, hidden_size,
    LEVELS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[rows[i]] = the sum of row i's splits and its level's bias, zeros for what does not run."""
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden_size
    acc = tl.zeros((BLOCK,), tl.float32)
    if i < tl.load(ends + LEVELS - 1):
        for split in tl.static_range(SPLITS):
            at = (split * tokens + i).to(tl.int64) * hidden_size + column
            acc += tl.load(partial + at, mask=inside, other=0.0)
        if RANK > 0:
            level = _levels(i, ends, LEVELS)
            adapted = inside & (level > 0)
            acc += tl.load(bias + (level - 1) * hidden_size + column, mask=adapted, other=0.0).to(tl.float32)
    tl.store(out + tl.load(rows + i) * hidden_size + column, acc.to(out.dtype.element_ty), mask=inside)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """How the tiled kernels run: BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of each half, splits of the second."""

    gate_up: tuple[int, int, int, int, int] = (64, 64, 64, 4, 3)
    down: tuple[int, int, int, int, int] = (64, 64, 64, 4, 4)
    splits: int = 4


def tiled(x: Tensor, weights: Weights, s: Tiled, rows: Tensor, ends: Tensor) -> Tensor:
    tokens, hidden_size = x.shape
    gathered = torch.empty_like(x)
    running = ends[weights.levels - 1 :]
    _gather_kernel[(tokens, triton.cdiv(hidden_size, 1024))](x, gathered, rows, running, hidden_size, 1024)
    act = tiled_gate_up(gathered, weights, ends, s)
    return tiled_down(act, weights, rows, ends, s)


def tiled_gate_up(x: Tensor, weights: Weights, ends: Tensor, s: Tiled) -> Tensor:
    """silu(gate) · up, `[tokens, neurons + adapters]`, for gathered rows `[tokens, hidden]`; undefined for neurons that no
    row runs, and from the last running row on."""
    (tokens, hidden_size), across = x.shape, weights.down.shape[1]
    block_m, block_n, block_k, warps, stages = s.gate_up
    assert all(size % block_n == 0 for size in (*weights.widths, weights.rank))
    act = torch.empty(tokens, across, dtype=x.dtype, device=x.device)
    _gate_up_kernel[(triton.cdiv(tokens, block_m) * triton.cdiv(across, block_n),)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(weights.gate_up, [block_n, block_k]),
        TensorDescriptor.from_tensor(act, [block_m, block_n]),
        ends, tokens, hidden_size, weights.neurons, weights.adapters, weights.levels, weights.widths, weights.rank,
        block_m, block_n, block_k, GROUP, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return act


def tiled_down(act: Tensor, weights: Weights, rows: Tensor, ends: Tensor, s: Tiled) -> Tensor:
    """The output `[tokens, hidden]` of activations `[tokens, neurons + adapters]` that are in the order of `rows`."""
    tokens, hidden_size = len(act), len(weights.down)
    block_m, block_n, block_k, warps, stages = s.down
    assert all(size % block_k == 0 for size in (*weights.widths, weights.rank))
    splits = min(s.splits, triton.cdiv(weights.neurons, block_k))
    out = torch.empty(tokens, hidden_size, dtype=act.dtype, device=act.device)
    partial = act.new_empty(splits, tokens, hidden_size, dtype=torch.float32) if splits > 1 else out
    bias = out if weights.bias is None else weights.bias
    _down_kernel[(triton.cdiv(tokens, block_m) * triton.cdiv(hidden_size, block_n), splits)](
        TensorDescriptor.from_tensor(act, [block_m, block_k]),
        TensorDescriptor.from_tensor(weights.down, [block_n, block_k]),
        out, partial, bias, rows, ends, tokens, hidden_size, weights.neurons,
        weights.levels, weights.widths, weights.rank, splits, block_m, block_n, block_k, GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _reduce_kernel[(tokens, triton.cdiv(hidden_size, 1024))](
            partial, out, bias, rows, ends, tokens, hidden_size, weights.levels, weights.rank, splits, 1024,
        )  # fmt: skip
    return out
