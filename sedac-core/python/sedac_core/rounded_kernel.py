"""The parts of the one-launch kernel (fused_kernel.py) that read an MLP's planes (precision.py) in place of its own weights.

The planes hold the neurons by importance: the first `fine` of them are read by both planes, the others by the high one. For few
tokens weights are made in registers and multiplied by the matrix unit. For one token, for which that unit is too wide, no weight
is ever made: a float32 whose highest bits are zero is the integer that its other bits spell, times 2⁻¹⁴⁹, so to mask steps out of
a word of eight makes numbers that a token's values, scaled up, are multiplied by. A group's step and least value come in once for
the 32 products of a thread.
"""

import triton
import triton.language as tl

from .precision import GROUP
from .shares import dealt, tiles_of

_GROUP = tl.constexpr(GROUP)
_HALF = tl.constexpr(GROUP // 2)  # values of a chunk: 16 bytes of a plane, of which a group has two
_UP = tl.constexpr(2.0**100)  # what a token's values are scaled by
_DOWN = tl.constexpr(2.0**49)  # 2¹⁴⁹ over that


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scales(at, there):
    """The step and the least value of groups, which share a word."""
    both = tl.load(tl.reshape(at, (at.numel,)), mask=tl.reshape(there, (at.numel,)), other=0)
    both = tl.reshape(both, at.shape)
    return _float(both << 16), _float(both & -65536)


# ---------------------------------------------------------------- one token


@triton.jit
def _value(x, at, inside, ORDERED: tl.constexpr, BYTE: tl.constexpr, HALF: tl.constexpr):
    """The values `[chunks, 4]` of a token that meet one half of byte BYTE of each word."""
    place = (HALF * 4 + BYTE) * 4 if ORDERED else HALF * _HALF + BYTE
    return tl.load(x + at + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def ordered(v):
    """Where value v of a token stands for `_values_of_one` to read it in one piece: by chunk, then half, byte and word."""
    in_half = v % _HALF
    place = (v % _GROUP // _HALF * 4 + in_half % 4) * 4 + in_half % 16 // 4
    return v // _GROUP * _GROUP + in_half // 16 * _HALF + place


@triton.jit
def _values_of_one(x, first, end, ORDERED: tl.constexpr, CHUNKS: tl.constexpr):
    """The values first to end of a token as `_sums` wants them for both planes, scaled up: `[chunks, 4]` for the low halves of a
    word's bytes and for the high ones, and their sum by chunk."""
    c = tl.arange(0, CHUNKS)
    word = tl.arange(0, 4)[None, :]
    inside = (first + c * _HALF < end)[:, None]
    if ORDERED:
        at = first + c[:, None] * _HALF + word
    else:
        at = first + c[:, None] // 2 * _GROUP + c[:, None] % 2 * 16 + word * 4
    a0, b0 = _value(x, at, inside, ORDERED, 0, 0), _value(x, at, inside, ORDERED, 0, 1)
    a1, b1 = _value(x, at, inside, ORDERED, 1, 0), _value(x, at, inside, ORDERED, 1, 1)
    a2, b2 = _value(x, at, inside, ORDERED, 2, 0), _value(x, at, inside, ORDERED, 2, 1)
    a3, b3 = _value(x, at, inside, ORDERED, 3, 0), _value(x, at, inside, ORDERED, 3, 1)
    total = tl.sum((a0 + b0) + (a1 + b1) + (a2 + b2) + (a3 + b3), 1)
    one, two, three = _UP, _UP / 256, _UP / 65536  # as far as bytes lie from a word's end; the last is shifted
    return (a0 * one, a1 * two, a2 * three, a3 * three), (b0 * one, b1 * two, b2 * three, b3 * three), total


@triton.jit
def _coarser(values):
    """The values for the high plane alone, whose high halves are not shifted down."""
    a, b, total = values
    return a, (b[0] / 16, b[1] / 16, b[2] / 16, b[3] / 16), total


@triton.jit
def _products(acc, words, a, BITS: tl.constexpr):
    """acc plus what these bits of each byte of the words say, times the values that they meet."""
    acc += _float(words & BITS) * a[0][None, :, :]
    acc += _float(words & (BITS << 8)) * a[1][None, :, :]
    acc += _float(words & (BITS << 16)) * a[2][None, :, :]
    acc += _float((words >> 8) & (BITS << 16)) * a[3][None, :, :]
    return acc


@triton.jit
def _flat(row, there, first, end, depth, CHUNKS: tl.constexpr):
    """Where the words of chunks stand, `[rows, words]`: with chunks and words in two dimensions, Triton's shared memory would
    hold the rows of a chunk side by side, and all lanes of a warp would meet in the same banks."""
    w = tl.arange(0, CHUNKS * 4)[None, :]
    here = there[:, None] & (first + w // 4 * _HALF < end)
    return row[:, None] * (depth // _GROUP * 8) + first // _HALF * 4 + w, here


@triton.jit
def _sums(planes, row, there, first, end, depth, values, FINE: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows `[rows]` of a weight of this depth, from first to end, times a token, still to be summed over `[rows, chunks]`."""
    high, low, scale = planes
    a, b, total = values
    c = tl.arange(0, CHUNKS)[None, :]
    inside = there[:, None] & (first + c * _HALF < end)
    place = first // _HALF + c
    at, here = _flat(row, there, first, end, depth, CHUNKS)
    shape: tl.constexpr = (row.shape[0], CHUNKS, 4)
    words = tl.reshape(tl.load(high + at, mask=here, other=0, eviction_policy="evict_first"), shape)
    acc = tl.zeros((row.shape[0], CHUNKS, 4), tl.float32)
    if FINE:  # 16 parts of a step a step, and 8 to take away
        parts = tl.reshape(tl.load(low + at, mask=here, other=0, eviction_policy="evict_first"), shape)
        acc = _products(acc, ((words << 4) & ~0x0F0F0F0F) | (parts & 0x0F0F0F0F), a, 0xFF)
        acc = _products(acc, (words & ~0x0F0F0F0F) | ((parts >> 4) & 0x0F0F0F0F), b, 0xFF)
    else:
        acc = _products(acc, words, a, 0x0F)
        acc = _products(acc, words, b, 0xF0)
    step, least = _scales(scale + row[:, None] * (depth // _GROUP) + place // 2, inside)
    if FINE:
        return tl.sum(acc, 2) * (step * (_DOWN / 16)) + (least - step / 2) * total[None, :]
    return tl.sum(acc, 2) * (step * _DOWN) + least * total[None, :]


@triton.jit
def _activate_alone(
    gate_up, act, program, programs, first, last, hidden_size, neurons, values,
    FINE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles, size = tiles_of(program, programs, last - first, BLOCK_N)
    r = tl.arange(0, 2 * BLOCK_N)  # a gate and an up row for each neuron
    n = tl.arange(0, BLOCK_N)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        v = first + dealt(tile * size + r // 2, program, programs)
        there = (r // 2 < size) & (v < last)
        sums = _sums(gate_up, v + r % 2 * neurons, there, 0, hidden_size, hidden_size, values, FINE, CHUNKS)
        gate, up = tl.split(tl.reshape(tl.sum(sums, 1), (BLOCK_N, 2)))
        v = first + dealt(tile * size + n, program, programs)
        inner = (gate / (1 + tl.exp(-gate)) * up).to(act.dtype.element_ty)
        tl.store(act + ordered(v), inner, mask=(n < size) & (v < last))


@triton.jit
def rounded_activate_alone(
    x, gate_up, act, program, programs, fine, needed, hidden_size, neurons,
    CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) · up of this program's share of all neurons for one token, in the order of `ordered`. CHUNKS: at least the
    hidden size's."""
    values = _values_of_one(x, 0, hidden_size, False, CHUNKS)
    _activate_alone(
        gate_up, act, program, programs, 0, fine, hidden_size, neurons, values, True, CHUNKS, BLOCK_N, STAGES
    )
    _activate_alone(
        gate_up, act, program, programs, fine, needed, hidden_size, neurons, _coarser(values), False, CHUNKS, BLOCK_N, STAGES
    )  # fmt: skip


@triton.jit
def _down_alone(
    sums_at, act, down, first, last, column, end, neurons,
    FINE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if first < last:
        first = first // _GROUP * _GROUP  # is itself, and lets the compiler know, which copies 16 bytes at once then
        values = _values_of_one(act, first, last, True, CHUNKS)
        if not FINE:
            values = _coarser(values)
        for start in tl.range(column, end, BLOCK_N, num_stages=STAGES):
            n = start + tl.arange(0, BLOCK_N)
            sums = _sums(down, n, n < end, first, last, neurons, values, FINE, CHUNKS)
            tl.store(sums_at + n, tl.sum(sums, 1), mask=n < end)


@triton.jit
def rounded_down_alone(
    act, down, partial, out, arrived, program, programs, fine, needed, hidden_size, neurons,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The output `[hidden]` for one token: programs share out the columns of PARTS parts of the neurons, of at most CHUNKS chunks,
    and the last one to bring its part of some columns adds them up, in order. `arrived` counts them, zeros between launches."""
    columns = tl.cdiv(tl.cdiv(hidden_size * PARTS, programs), BLOCK_N) * BLOCK_N  # of a unit
    i = tl.arange(0, BLOCK_N)
    for unit in range(program, tl.cdiv(hidden_size, columns) * PARTS, programs):
        tile, part = unit // PARTS, unit % PARTS
        column = tile * columns
        end = tl.minimum(column + columns, hidden_size)
        sums_at = partial + part * 2 * hidden_size
        first, last = _part(0, fine, part, PARTS)
        _down_alone(sums_at, act, down, first, last, column, end, neurons, True, CHUNKS, BLOCK_N, STAGES)
        first, last = _part(fine, needed, part, PARTS)
        _down_alone(sums_at + hidden_size, act, down, first, last, column, end, neurons, False, CHUNKS, BLOCK_N, STAGES)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1:
            tl.debug_barrier()
            tl.atomic_xchg(arrived + tile, 0, sem="relaxed")
            for start in range(column, end, BLOCK_N):
                acc = tl.zeros((BLOCK_N,), tl.float32)
                for s in tl.static_range(PARTS):
                    for fewer in tl.static_range(2):  # bits
                        first, last = _part(fewer * fine, fewer * (needed - fine) + fine, s, PARTS)
                        there = (start + i < end) & (first < last)
                        at = partial + (s * 2 + fewer) * hidden_size + start + i
                        acc += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
                tl.store(out + start + i, acc.to(out.dtype.element_ty), mask=start + i < end)


@triton.jit
def _part(first, last, part, parts):
    """A part of the neurons first to last, in whole groups: every part has as many at either precision."""
    span = tl.cdiv(tl.cdiv(last - first, parts), _GROUP) * _GROUP
    start = tl.minimum(first + part * span, last)
    return start, tl.minimum(start + span, last)


# ---------------------------------------------------------------- few tokens


@triton.jit
def _halves(planes, row, there, first, end, depth, TYPE: tl.constexpr, FINE: tl.constexpr, GROUPS: tl.constexpr):
    """GROUPS groups of rows `[rows]` of a weight of this depth, from first to end at most: the first 32 values of all groups and
    the last ones, `[rows, GROUPS · 32]` each."""
    high, low, scale = planes
    g = first // _GROUP + tl.arange(0, GROUPS)[None, :]
    at = row.to(tl.int64)[:, None, None] * (depth // _GROUP * _HALF) + g[:, :, None] * _HALF
    at += tl.arange(0, _HALF)[None, None, :]
    inside = there[:, None] & (g * _GROUP < end)
    both = tl.load(high + at, mask=inside[:, :, None], other=0, eviction_policy="evict_first")
    one, two = (both & 15).to(tl.float32), (both >> 4).to(tl.float32)
    if FINE:
        parts = tl.load(low + at, mask=inside[:, :, None], other=0, eviction_policy="evict_first")
        one += ((parts & 15).to(tl.float32) - 8) * 0.0625
        two += ((parts >> 4).to(tl.float32) - 8) * 0.0625
    step, least = _scales(scale + row[:, None] * (depth // _GROUP) + g, inside)
    one = one * step[:, :, None] + least[:, :, None]
    two = two * step[:, :, None] + least[:, :, None]
    shape: tl.constexpr = (row.shape[0], GROUPS * _HALF)
    return tl.reshape(one.to(TYPE), shape), tl.reshape(two.to(TYPE), shape)


@triton.jit
def _activate(
    x, gate_up, act, row, inside, runs, program, programs, first, last, hidden_size, neurons,
    FINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    k = tl.arange(0, GROUPS * _HALF)
    x_at = x + row[None, :] * hidden_size + (k // _HALF * _GROUP + k % _HALF)[:, None]
    tiles, size = tiles_of(program, programs, last - first, BLOCK_N)
    for tile in range(0, tiles):
        v = first + dealt(tile * size + n, program, programs)
        mine = (n < size) & (v < last)
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, hidden_size, GROUPS * _GROUP):
            there = inside[None, :] & (start + k // _HALF * _GROUP < hidden_size)[:, None]
            a = tl.load(x_at + start, mask=there, other=0.0)
            b = tl.load(x_at + start + _HALF, mask=there, other=0.0)
            one, two = _halves(gate_up, v, mine, start, hidden_size, hidden_size, x.dtype.element_ty, FINE, GROUPS)
            gate = tl.dot(two, b, tl.dot(one, a, gate, input_precision="ieee"), input_precision="ieee")
            one, two = _halves(
                gate_up, v + neurons, mine, start, hidden_size, hidden_size, x.dtype.element_ty, FINE, GROUPS
            )
            up = tl.dot(two, b, tl.dot(one, a, up, input_precision="ieee"), input_precision="ieee")
        inner = tl.where(runs[None, :], gate / (1 + tl.exp(-gate)) * up, 0.0).to(act.dtype.element_ty)
        tl.store(act + i[None, :] * neurons + v[:, None], inner, mask=mine[:, None] & inside[None, :])


@triton.jit
def rounded_activate(
    x, gate_up, act, row, inside, runs, program, programs, fine, needed, hidden_size, neurons,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) · up of this program's share of all neurons, zero for rows that do not run."""
    _activate(
        x, gate_up, act, row, inside, runs, program, programs, 0, fine, hidden_size, neurons, True, BLOCK_M, BLOCK_N, GROUPS
    )  # fmt: skip
    _activate(
        x, gate_up, act, row, inside, runs, program, programs, fine, needed, hidden_size, neurons,
        False, BLOCK_M, BLOCK_N, GROUPS,
    )  # fmt: skip


@triton.jit
def _down(acc, act, down, column, inside, first, last, neurons, FINE: tl.constexpr, GROUPS: tl.constexpr):
    i = tl.arange(0, acc.shape[1])
    k = tl.arange(0, GROUPS * _HALF)
    act_at = act + i[None, :] * neurons + (k // _HALF * _GROUP + k % _HALF)[:, None]
    for start in range(first, last, GROUPS * _GROUP):
        v = start // _GROUP * _GROUP  # as for one token
        there = inside[None, :] & (v + k // _HALF * _GROUP < last)[:, None]
        a = tl.load(act_at + v, mask=there, other=0.0)
        b = tl.load(act_at + v + _HALF, mask=there, other=0.0)
        one, two = _halves(
            down, column, tl.full(column.shape, True, tl.int1), v, last, neurons, act.dtype.element_ty, FINE, GROUPS
        )
        acc = tl.dot(two, b, tl.dot(one, a, acc, input_precision="ieee"), input_precision="ieee")
    return acc


@triton.jit
def rounded_down(acc, act, down, column, inside, part, parts, fine, needed, neurons, GROUPS: tl.constexpr):
    """acc `[columns, rows]` and one part's share of these columns of the output."""
    first, last = _part(0, fine, part, parts)
    acc = _down(acc, act, down, column, inside, first, last, neurons, True, GROUPS)
    first, last = _part(fine, needed, part, parts)
    return _down(acc, act, down, column, inside, first, last, neurons, False, GROUPS)
