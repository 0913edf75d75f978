"""The Triton kernel that runs an MLP at given levels in one launch, for few tokens.

kernels.py chooses between it and tiled_kernels.py, and says what levels, rows and `ends` are. Weights are never read for rows that
do not need them; the grid depends on shapes alone.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate_parts import DeviceGate, count_levels, levels_present
from .mlp_weights import Weights
from .precision import GROUP, MOST_ROUNDED, Planes
from .rounded_kernel import (
    rounded_activate,
    rounded_activate_alone,
    rounded_ask_for_down,
    rounded_down,
    rounded_down_alone,
    rounded_values,
)
from .shares import arrive, dealt, tiles_of, wait_for_all
from .step_counters import chosen_rows

MOST_TILES = 1024  # of columns of the output
AHEAD = tl.constexpr(4)  # tiles of planes that a program asks for before the barrier
FEW_STAGES = 5  # of groups of planes, for few tokens
UNDER_WAY = 4  # loads of planes of 16 bytes that a thread has under way for one token; half as many beside more than eight warps


@triton.jit
def _neuron(v, reach, present, neurons, LEVELS: tl.constexpr, RANK: tl.constexpr):
    """Neuron and level of the adapter (0: the MLP's own) at place v of those that run: the MLP's first `reach` ones, then
    those of each adapter whose bit is set in `present`."""
    at, own = v, v * 0
    if RANK > 0:
        start = reach
        for j in tl.static_range(1, LEVELS):
            bit = (present >> j) & 1
            here = (bit != 0) & (v >= start)
            at = tl.where(here, v - start + neurons + (j - 1) * RANK, at)
            own = tl.where(here, j, own)
            start += bit * RANK
    return at, own


@triton.jit
def _weights_at(
    gate_up, v, k, reach, present, hidden_size, neurons, adapters, LEVELS: tl.constexpr, RANK: tl.constexpr
):
    """Where gate and up weights `[neurons, depth]` of the neurons at places v begin, and the levels that `_neuron` names."""
    at, own = _neuron(v, reach, present, neurons, LEVELS, RANK)
    gate_row = tl.where(own == 0, at, at + neurons)
    up_row = gate_row + tl.where(own == 0, neurons, adapters)
    gate_at = gate_up + gate_row.to(tl.int64)[:, None] * hidden_size + k[None, :]
    return gate_at, gate_up + up_row.to(tl.int64)[:, None] * hidden_size + k[None, :], own


@triton.jit
def _activate(
    x, gate_up, act, row, inside, level, width, program, programs, needed, reach, present, hidden_size, neurons, adapters,
    LEVELS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) · up of this program's share of the neurons that run, zero for rows that do not run them."""
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    tiles, size = tiles_of(program, programs, needed, BLOCK_N)
    for tile in range(0, tiles):
        v = dealt(tile * size + n, program, programs)
        mine = (n < size) & (v < needed)
        gate_at, up_at, own = _weights_at(gate_up, v, k, reach, present, hidden_size, neurons, adapters, LEVELS, RANK)
        runs = width[None, :] > v[:, None]
        if RANK > 0:
            runs = tl.where(own[:, None] == 0, runs, level[None, :] == own[:, None])
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        x_at = x + row[None, :] * hidden_size + k[:, None]
        for _ in range(0, hidden_size, BLOCK_K):
            a = tl.load(x_at, mask=inside[None, :], other=0.0)
            g = tl.load(gate_at, mask=mine[:, None], other=0.0, eviction_policy="evict_first")
            u = tl.load(up_at, mask=mine[:, None], other=0.0, eviction_policy="evict_first")
            gate = tl.dot(g, a, gate, input_precision="ieee")
            up = tl.dot(u, a, up, input_precision="ieee")
            x_at += BLOCK_K
            gate_at += BLOCK_K
            up_at += BLOCK_K
        inner = tl.where(runs, gate / (1 + tl.exp(-gate)) * up, 0.0).to(act.dtype.element_ty)
        act_at = act + i[None, :] * (neurons + adapters) + v[:, None]
        tl.store(act_at, inner, mask=mine[:, None] & inside[None, :])


@triton.jit
def _activate_alone(
    x, gate_up, act, program, programs, needed, reach, present, hidden_size, neurons, adapters,
    LEVELS: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for one token, which runs all neurons that are needed: without a matrix unit, for which one token is too narrow."""
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    tiles, size = tiles_of(program, programs, needed, BLOCK_N)
    for tile in range(0, tiles):
        v = dealt(tile * size + n, program, programs)
        mine = (n < size) & (v < needed)
        gate_at, up_at, _own = _weights_at(gate_up, v, k, reach, present, hidden_size, neurons, adapters, LEVELS, RANK)
        gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.range(0, hidden_size, BLOCK_K, num_stages=STAGES):
            a = tl.load(x + start + k).to(tl.float32)[None, :]
            g = tl.load(gate_at + start, mask=mine[:, None], other=0.0, eviction_policy="evict_first")
            u = tl.load(up_at + start, mask=mine[:, None], other=0.0, eviction_policy="evict_first")
            gate += g.to(tl.float32) * a
            up += u.to(tl.float32) * a
        z, y = tl.sum(gate, 1), tl.sum(up, 1)
        tl.store(act + v, (z / (1 + tl.exp(-z)) * y).to(act.dtype.element_ty), mask=mine)


@triton.jit
def _activate_pairs(
    x, gate_up, act, program, programs, needed, reach, present, hidden_size, neurons, adapters,
    LEVELS: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The same for one token, which runs all neurons that are needed, a pair at a time: where a program has only one, all of
    its weights are under way at once, without a matrix unit, whose steps would have to follow each other."""
    k = tl.arange(0, DEPTH)
    inside = k < hidden_size
    a = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    for first in range(program * 2, needed, programs * 2):
        v = first + tl.arange(0, 2)
        there = (v < needed)[:, None] & inside[None, :]
        gate_at, up_at, _own = _weights_at(gate_up, v, k, reach, present, hidden_size, neurons, adapters, LEVELS, RANK)
        g = tl.load(gate_at, mask=there, other=0.0, eviction_policy="evict_first")
        u = tl.load(up_at, mask=there, other=0.0, eviction_policy="evict_first")
        gate = tl.sum(g.to(tl.float32) * a[None, :], 1)
        up = tl.sum(u.to(tl.float32) * a[None, :], 1)
        tl.store(act + v, (gate / (1 + tl.exp(-gate)) * up).to(act.dtype.element_ty), mask=v < needed)


@triton.jit
def _add_up(
    acc, shift, partial, out, arrived, row, inside, column, share, shares, hidden_size,
    BLOCK_M: tl.constexpr, DOWN_N: tl.constexpr,
):  # fmt: skip
    """Bring one share of some columns of the output; the last program to do so adds them up, in order."""
    out_at = out + row[None, :] * hidden_size + column[:, None]
    last = shares == 1
    if shares > 1:
        part_at = partial + tl.arange(0, BLOCK_M)[None, :] * hidden_size + column[:, None]
        tl.store(part_at + share * BLOCK_M * hidden_size, acc, mask=inside[None, :])
        tl.debug_barrier()
        last = tl.atomic_add(arrived, 1, sem="acq_rel") == shares - 1
        if last:
            tl.debug_barrier()
            acc = tl.zeros((DOWN_N, BLOCK_M), tl.float32)
            for first_of in range(0, shares, 8):
                for s in tl.static_range(8):  # which are under way together
                    share_at = part_at + (first_of + s) * BLOCK_M * hidden_size
                    there = inside[None, :] & (first_of + s < shares)
                    acc += tl.load(share_at, mask=there, other=0.0, cache_modifier=".cg")
            tl.atomic_xchg(arrived, 0, sem="relaxed")
    if last:
        acc += shift
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["tokens", "programs", "splits", "group", "first", "outside"])
def _fused_kernel(
    x, gate_up, down, bias, gate_up_planes, down_planes, act, partial, out, rows, ends, level_of, sync,
    price, chosen, counters,
    tokens, hidden_size, neurons, adapters, programs, splits, group, first, outside,
    MODE: tl.constexpr, LEVELS: tl.constexpr, WIDTHS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NARROW_K: tl.constexpr,
    DOWN_N: tl.constexpr, DOWN_K: tl.constexpr,
    COUNTS: tl.constexpr, HAS_CHOICES: tl.constexpr,
    ALONE: tl.constexpr, PAIRS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    ROUNDED: tl.constexpr, ROUNDED_TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All of an MLP for up to BLOCK_M tokens: programs that all run at once share out the neurons, wait for each other,
    and share out the outputs. Weights are the left operand, so that few tokens make a narrow right one.

    MODE says where levels come from: "sorted" rows and their ends, or "given" by token, and counted where this COUNTS. ALONE: there is
    one token, whose neurons run without a matrix unit where it has few: all of their weights at once where it has PAIRS pairs at most.

    ROUNDED: all rows run at the least level of them, above 0 on planes, of which so many neurons (WIDTHS) at eight bits. For one token
    level 0 then runs in the one way that WHOLE names: between other kernels a launch pays for each instruction that it has not run
    lately.
    """
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK_M)
    inside = i < tokens
    across = neurons + adapters
    level = tl.zeros((BLOCK_M,), tl.int32)
    if MODE == "sorted":
        row = tl.load(rows + i, mask=inside, other=0)
        for j in tl.static_range(LEVELS):
            level += (i >= tl.load(ends + j)).to(tl.int32)
        level = tl.where(inside, level, LEVELS)
    else:
        row = i.to(tl.int64)
        level = tl.load(level_of + i, mask=inside, other=LEVELS)

    if ROUNDED:
        lead = tl.min(level, 0)
        level = tl.where(level < LEVELS, lead, LEVELS)
    width = tl.zeros((BLOCK_M,), tl.int32)
    for j in tl.static_range(LEVELS):
        width = tl.where(level == j, WIDTHS[j], width)
    present = levels_present(level, LEVELS)
    reach = 0
    for j in tl.static_range(LEVELS - 1, -1, -1):
        reach = tl.where((present >> j) & 1 != 0, WIDTHS[j], reach)
    needed = reach
    if RANK > 0:
        for j in tl.static_range(1, LEVELS):
            needed += ((present >> j) & 1) * RANK
    if ROUNDED:
        needed = tl.where(present != 0, neurons, 0)
    tiles = tl.cdiv(hidden_size, DOWN_N)
    if not COUNTS:  # noqa: SIM102, this one is decided when the kernel is compiled
        if needed == 0:
            for tile in range(program, tiles, programs):
                column = tile * DOWN_N + tl.arange(0, DOWN_N)
                zeros = tl.zeros((DOWN_N, BLOCK_M), out.dtype.element_ty)
                tl.store(out + row[None, :] * hidden_size + column[:, None], zeros, mask=inside[None, :])
            return

    few = False
    alone = False
    if ALONE:
        few = needed <= programs * 2 * PAIRS
        alone = needed <= programs * 16
    wide, middle = needed > programs * 32, needed > programs * 16
    if WHOLE is not None:
        few, alone, wide, middle = WHOLE == "few", WHOLE == "alone", WHOLE == "wide", WHOLE == "middle"
    if ROUNDED and lead > 0:
        if ALONE:
            rounded_activate_alone(
                rounded_values(x, hidden_size, ROUNDED_TILE[0]), gate_up_planes, act, program, programs, reach, needed,
                hidden_size, neurons, ROUNDED_TILE[0], ROUNDED_TILE[1], STAGES,
            )  # fmt: skip
        else:
            rounded_activate(
                x, gate_up_planes, act, row, inside, level < LEVELS, program, programs, reach, needed, hidden_size, neurons,
                BLOCK_M, ROUNDED_TILE[0], ROUNDED_TILE[1],
            )  # fmt: skip
    elif few:
        _activate_pairs(
            x, gate_up, act, program, programs, needed, reach, present, hidden_size, neurons, adapters, LEVELS, RANK, DEPTH,
        )  # fmt: skip
    elif alone:
        _activate_alone(
            x, gate_up, act, program, programs, needed, reach, present, hidden_size, neurons, adapters,
            LEVELS, RANK, 16, NARROW_K, STAGES,
        )  # fmt: skip
    elif wide:
        _activate(
            x, gate_up, act, row, inside, level, width, program, programs, needed, reach, present,
            hidden_size, neurons, adapters, LEVELS, RANK, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif middle:  # the fewer neurons a program has, the more of their depth has to be under way
        _activate(
            x, gate_up, act, row, inside, level, width, program, programs, needed, reach, present,
            hidden_size, neurons, adapters, LEVELS, RANK, BLOCK_M, 32, NARROW_K,
        )  # fmt: skip
    else:
        _activate(
            x, gate_up, act, row, inside, level, width, program, programs, needed, reach, present,
            hidden_size, neurons, adapters, LEVELS, RANK, BLOCK_M, 16, NARROW_K,
        )  # fmt: skip

    if ROUNDED and ALONE:  # noqa: SIM102
        if programs > 1 and lead > 0:  # memory would be idle at the barrier, too
            rounded_ask_for_down(
                down_planes, program, programs, reach, needed, hidden_size, neurons,
                ROUNDED_TILE[2], ROUNDED_TILE[3], ROUNDED_TILE[4], AHEAD,
            )  # fmt: skip
    k = tl.arange(0, DOWN_K)
    span = tl.maximum(tl.cdiv(tl.cdiv(needed, splits), DOWN_K), 1) * DOWN_K
    shares = tl.maximum(tl.cdiv(needed, span), 1)
    before = arrive(sync, program, programs)
    if COUNTS:  # noqa: SIM102
        if program == programs - 1:  # no other has less to do behind the barrier
            if ROUNDED:
                tl.store(
                    level_of + i, level, mask=inside
                )  # a program that reads them only now finds the same least one
            if ALONE:
                lone = tl.arange(0, 1)
                own, choice = lone + tl.min(level, 0), chosen_rows(chosen, lone, tokens, 1, HAS_CHOICES)
                count_levels(counters, own, choice, price, group, first, outside, LEVELS)
            else:
                choice = chosen_rows(chosen, i, tokens, BLOCK_M, HAS_CHOICES)
                count_levels(counters, level, choice, price, group, first, outside, LEVELS)
    wait_for_all(sync, before, programs)

    units = tiles * shares
    if ROUNDED and lead > 0:
        if ALONE:
            rounded_down_alone(
                act, down_planes, partial, out, sync + 64, program, programs, reach, needed, hidden_size, neurons,
                ROUNDED_TILE[2], ROUNDED_TILE[3], ROUNDED_TILE[4], STAGES,
            )  # fmt: skip
        else:
            for unit in range(program, units, programs):
                tile, share = unit // shares, unit % shares
                column = tile * DOWN_N + tl.arange(0, DOWN_N)
                acc = tl.zeros((DOWN_N, BLOCK_M), tl.float32)
                acc = rounded_down(
                    acc, act, down_planes, column, inside, share, shares, reach, needed, neurons, ROUNDED_TILE[1]
                )
                _add_up(
                    acc, 0.0, partial, out, sync + 64 + tile, row, inside, column, share, shares, hidden_size, BLOCK_M, DOWN_N
                )  # fmt: skip
        units = 0
    for unit in range(program, units, programs):
        tile, share = unit // shares, unit % shares
        column = tile * DOWN_N + tl.arange(0, DOWN_N)
        act_at = act + i[None, :] * across + k[:, None]
        down_at = down + column.to(tl.int64)[:, None] * across + k[None, :]
        acc = tl.zeros((DOWN_N, BLOCK_M), tl.float32)
        shift = acc
        if RANK > 0:
            adapted = (level > 0) & (level < LEVELS)
            shift_at = bias + (level - 1)[None, :] * hidden_size + column[:, None]
            shift = tl.load(shift_at, mask=adapted[None, :], other=0.0).to(tl.float32)
        for v in range(share * span, tl.minimum(share * span + span, needed), DOWN_K):
            at, _own = _neuron(v, reach, present, neurons, LEVELS, RANK)
            a = tl.load(act_at + v, mask=inside[None, :], other=0.0)
            aligned = (
                at // DOWN_K * DOWN_K
            )  # is at itself, and lets the compiler know, which copies 16 bytes at once then
            w = tl.load(down_at + aligned, eviction_policy="evict_first")
            acc = tl.dot(w, a, acc, input_precision="ieee")
        _add_up(
            acc, shift, partial, out, sync + 64 + tile, row, inside, column, share, shares, hidden_size, BLOCK_M, DOWN_N
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fused:
    """How the one-launch kernel runs: neurons and depth of a tile in the first half, columns and depth in the second."""

    block_n: int = 64
    block_k: int = 64
    down_n: int = 64
    down_k: int = 64
    splits: int = 8  # of a column's neurons
    programs_per_sm: int = 2
    warps: int = 4
    stages: int = 4


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _sync(device: torch.device) -> Tensor:
    """What the fused kernel's programs share: counts of arrivals at the barrier and, from 64 on, of those with parts of a tile. Zeros
    between launches but for the first's sign, which each barrier flips. Launches on one device must follow each other on one stream,
    as vLLM's do."""
    return torch.zeros(64 + MOST_TILES, dtype=torch.int32, device=device)


def _depth(hidden_size: int, most: int) -> int:
    """The largest power of two up to `most` that divides the hidden size."""
    return min(most, hidden_size & -hidden_size)


def columns(tokens: int, rounded: bool) -> int:
    """Columns of a step's tokens in the matrix unit's products: eight at least on planes, else 16. One token, which does without that
    unit on planes, takes 16 where it runs whole."""
    return max(8 if rounded and tokens > 1 else 16, triton.next_power_of_2(tokens))


def _planes(own: Planes) -> tuple[Tensor, Tensor, Tensor]:
    """Planes as the kernel reads them, in words: a step and a least value share one."""
    return own.high.view(torch.int32), own.low.view(torch.int32), own.scale.view(torch.int32)


def _whole_path(neurons: int, programs: int, pairs: int) -> str:
    """How the kernel of one token runs that many neurons."""
    if neurons <= programs * 2 * pairs:
        return "few"
    return "alone" if neurons <= programs * 16 else "wide" if neurons > programs * 32 else "middle"


@functools.cache
def _rounded_tile(tokens: int, hidden_size: int, neurons: int, programs: int, s: Fused) -> tuple[int, ...]:
    """What is read of planes at once. For few tokens: neurons, as many as fill a program's tiles best, and stages, of a group each. For
    one: chunks (half groups) of a neuron, neurons, parts of a column, chunks of a part, columns; a thread has UNDER_WAY loads under
    way, and the parts are those that keep most threads busy."""
    if tokens > 1:
        own = triton.cdiv(neurons, programs)
        return min(32, 64, key=lambda most: triton.cdiv(own, most) * most), FEW_STAGES
    under_way = UNDER_WAY if s.programs_per_sm * s.warps <= 8 else UNDER_WAY // 2
    loads, chunks = under_way * 32 * s.warps, triton.next_power_of_2(hidden_size * 2 // GROUP)

    def chunks_of(parts: int) -> tuple[int, int]:
        """Those of a part, and as many as are read: one group more where a level has neurons of both kinds."""
        used = triton.cdiv(neurons, parts * GROUP) * 2
        return used, triton.next_power_of_2(used + 2)

    def busy(parts: int) -> float:  # but those whose values would take too many registers
        used, across = chunks_of(parts)
        if across > 64 and parts < 32:
            return 0
        columns = triton.cdiv(triton.cdiv(hidden_size * parts, programs), rows := max(1, loads // across)) * rows
        units = triton.cdiv(hidden_size, columns) * parts
        return hidden_size * parts / (columns * triton.cdiv(units, programs) * programs) * used / across

    parts = max(range(1, 33), key=busy)
    _, across = chunks_of(parts)
    return chunks, max(2, loads // (2 * chunks)), parts, across, max(1, loads // across)


def fused(
    x: Tensor,
    weights: Weights,
    s: Fused,
    mode: str,
    rows: Tensor | None = None,
    ends: Tensor | None = None,
    level: Tensor | None = None,
    gate: DeviceGate | None = None,
    price: Tensor | None = None,
    counters: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """`kernels.mlp`, mode "sorted", or `kernels.narrowed_mlp`, "given"; with the gate that decided the levels, these are counted."""
    (tokens, hidden_size), neurons, device = x.shape, weights.neurons, x.device
    across = weights.down.shape[1]
    rounded = weights.planes is not None
    block_m = columns(tokens, rounded)
    assert hidden_size % s.block_k == 0 == hidden_size % s.down_n and hidden_size // s.down_n <= MOST_TILES
    for size in (*weights.widths, weights.rank):
        assert size % s.down_k == 0, (weights.widths, weights.rank, s)
    if rounded:
        assert mode != "sorted" and tokens <= MOST_ROUNDED and s.down_k % GROUP == 0, (mode, tokens, s)
    act = torch.empty(block_m, across, dtype=x.dtype, device=device)
    splits = min(s.splits, triton.cdiv(across, s.down_k))
    partial = torch.empty(max(splits, 2), block_m, hidden_size, dtype=torch.float32, device=device)
    out = torch.empty_like(x)
    cuda = device.type == "cuda"
    registers = 65536 // (32 * s.warps * s.programs_per_sm) // 8 * 8  # of a thread, for all programs to run at once
    none = out  # a pointer where the kernel reads none
    # The interpreter runs one program after the other: none could wait for another.
    programs = s.programs_per_sm * _processors(device) if cuda else 1
    pairs = 1 if cuda else across
    planes, tile = ((none,) * 3,) * 2, ()
    if rounded:
        planes = [_planes(own) for own in weights.planes]
        tile = _rounded_tile(tokens, hidden_size, neurons, programs, s)
    _fused_kernel[(programs,)](
        x, weights.gate_up, weights.down, none if weights.bias is None else weights.bias, *planes, act, partial, out,
        none if rows is None else rows, none if ends is None else ends, none if level is None else level, _sync(device),
        none if price is None else price, none if chosen is None else chosen, none if counters is None else counters,
        tokens, hidden_size, neurons, weights.adapters, programs, splits,
        0 if gate is None else gate.group, 0 if gate is None else int(gate.first),
        0 if gate is None else gate.outside,
        mode, weights.levels, weights.widths, weights.rank,
        block_m, s.block_n, s.block_k, _depth(hidden_size, 128), s.down_n, s.down_k,
        gate is not None, chosen is not None,
        tokens == 1, pairs, triton.next_power_of_2(hidden_size), s.stages, rounded, tile,
        _whole_path(neurons, programs, pairs) if rounded and tokens == 1 else None,
        num_warps=s.warps, num_stages=s.stages, launch_cooperative_grid=True,
        maxnreg=registers if registers < 255 else None,
    )  # fmt: skip
    return out
