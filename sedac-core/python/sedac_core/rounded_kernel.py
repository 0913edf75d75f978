"""The parts of the one-launch kernel (fused_kernel.py) that read an MLP's planes (precision.py) in place of its own weights.

The planes hold the neurons by importance: the first `fine` of them are read by both planes, the others by the high one. No weight
is ever made: a group's step and least value come in once for all of its products with whole numbers, the steps. For few tokens the
matrix unit multiplies them: put into the low bits of 128 in bfloat16, a step is as much more than that. For one token, for which
that unit is too wide, they are masked out of a word of eight: a float32 whose highest bits are zero is the integer that its other
bits spell, times 2⁻¹⁴⁹, and the token's values are scaled up to meet it.
"""

import triton
import triton.language as tl

from .precision import GROUP
from .shares import dealt, tiles_of

_GROUP = tl.constexpr(GROUP)
_ROWS = tl.constexpr(16)  # of an instruction of the matrix unit for one warp
_WORDS = tl.constexpr(GROUP // 8)  # of a group in a plane
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
def _ask(at, here):
    """Ask for the lines of 128 bytes at these places to be brought near; nobody waits for them."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [at.to(tl.uint64, bitcast=True), here.to(tl.int32)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def _four(x, at, inside):
    """The four values of a token from each place `4 · at` on: of two bytes each, in one piece."""
    if x.dtype.element_ty.primitive_bitwidth == 16:
        four = tl.load(x.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0)
        a = four.to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32)
        b = (four >> 16).to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32)
        c = (four >> 32).to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32)
        d = (four >> 48).to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32)
        return a, b, c, d
    a, b = tl.load(x + at * 4, mask=inside, other=0.0), tl.load(x + at * 4 + 1, mask=inside, other=0.0)
    c, d = tl.load(x + at * 4 + 2, mask=inside, other=0.0), tl.load(x + at * 4 + 3, mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def _chunks(CHUNKS: tl.constexpr):
    """The chunks of a row, `[runs, across]`: a warp reads 32 of them at a time, and the other run of a row after it, so that no sum of
    a row takes more than one warp; two warps where a row has more than 64, whose values would take too many registers."""
    ACROSS: tl.constexpr = min(CHUNKS, 32) if CHUNKS <= 64 else CHUNKS // 2
    return tl.arange(0, CHUNKS // ACROSS)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]


@triton.jit
def _place(c, span, FINE: tl.constexpr):
    """Where chunks c of a span stand, which is `(first, fine, then, all)`: so many from `first` on whose low plane is read (if FINE;
    else there are none), and the others from `then` on, so many in all."""
    first, fine, then, _all = span
    if FINE:
        return tl.where(c < fine, c + first, c + (then - fine))
    return c + then


@triton.jit
def _values_of_one(x, span, CHUNKS: tl.constexpr):
    """The values of a token that meet a span as `_sums` wants them, scaled up: `[runs, across, 4]` for the low halves of a word's
    bytes and for the high ones where these are shifted down, and their sum by chunk."""
    c = _chunks(CHUNKS)[:, :, None]
    word = tl.arange(0, 4)[None, None, :]
    inside = c < span[3]
    place = _place(c, span, True)
    at = place // 2 * (_GROUP // 4) + place % 2 * 4 + word
    a0, a1, a2, a3 = _four(x, at, inside)
    b0, b1, b2, b3 = _four(x, at + _HALF // 4, inside)
    total = tl.sum((a0 + b0) + (a1 + b1) + (a2 + b2) + (a3 + b3), 2)
    one, two, three = _UP, _UP / 256, _UP / 65536  # as far as bytes lie from a word's end; the last is shifted
    return (a0 * one, a1 * two, a2 * three, a3 * three), (b0 * one, b1 * two, b2 * three, b3 * three), total


@triton.jit
def _unshifted(values):
    """The same where high halves are not shifted down."""
    a, b, total = values
    return a, (b[0] / 16, b[1] / 16, b[2] / 16, b[3] / 16), total


@triton.jit
def rounded_values(x, hidden_size, CHUNKS: tl.constexpr):
    """What the first half needs of a token's values, at whatever level."""
    return _values_of_one(x, (0, 0, 0, hidden_size // _HALF), CHUNKS)


@triton.jit
def _products(acc, words, a, BITS: tl.constexpr):
    """acc plus what these bits of each byte of the words say, times the values that they meet."""
    acc += _float(words & BITS) * a[0][:, None]
    acc += _float(words & (BITS << 8)) * a[1][:, None]
    acc += _float(words & (BITS << 16)) * a[2][:, None]
    acc += _float((words >> 8) & (BITS << 16)) * a[3][:, None]
    return acc


@triton.jit
def _sums(planes, row, there, finer, span, depth, values, FINE: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows `[rows]` of a weight of this depth times a token's values of a span, whose low plane is read for rows that are `finer`."""
    high, low, scale = planes
    _first, fine, _then, chunks = span
    a, b, total = values
    c = _chunks(CHUNKS)
    shape: tl.constexpr = (c.shape[0], row.shape[0], c.shape[1], 4)
    w = tl.arange(0, c.shape[1] * 4)[None, :]  # in one dimension with the chunks, for the sake of shared memory's banks
    of_word = tl.arange(0, c.shape[0])[:, None] * c.shape[1] + w // 4
    at = row[None, :, None] * (depth // _GROUP * 8) + (_place(of_word, span, FINE) * 4 + w % 4)[:, None, :]
    here = there[None, :, None] & (of_word < chunks)[:, None, :]
    words = tl.reshape(tl.load(high + at, mask=here, other=0, eviction_policy="evict_first"), shape)
    acc = tl.zeros(shape, tl.float32)
    if FINE:  # 16 parts of a step a step, and 8 to take away; none where the low plane is not read
        here = (there & finer)[None, :, None] & (of_word < fine)[:, None, :]
        parts = tl.reshape(tl.load(low + at, mask=here, other=0, eviction_policy="evict_first"), shape)
        acc = _products(acc, ((words << 4) & ~0x0F0F0F0F) | (parts & 0x0F0F0F0F), a, 0xFF)
        acc = _products(acc, (words & ~0x0F0F0F0F) | ((parts >> 4) & 0x0F0F0F0F), b, 0xFF)
    else:
        acc = _products(acc, words, a, 0x0F)
        acc = _products(acc, words, b, 0xF0)
    inside = there[None, :, None] & (c < chunks)[:, None, :]
    at = row[None, :, None] * (depth // _GROUP) + (_place(c, span, FINE) // 2)[:, None, :]
    step, least = _scales(scale + at, inside)
    if FINE:
        least -= tl.where(finer[None, :, None] & (c < fine)[:, None, :], step / 2, 0.0)
        step /= 16
    sums = tl.sum(acc, 3) * (step * _DOWN) + least * total[:, None, :]
    return tl.sum(tl.sum(sums, 0), 1)


@triton.jit
def _activate_alone(
    values, gate_up, act, program, programs, fine, needed, hidden_size, neurons,
    FINE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunks = hidden_size // _HALF
    span = (0, chunks, 0, chunks)
    tiles, size = tiles_of(program, programs, needed, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, 2 * BLOCK_N)  # all gate rows, then all up rows: a warp has both of a neuron
    for tile in tl.range(0, tiles, num_stages=STAGES):
        v = dealt(tile * size + r % BLOCK_N, program, programs)
        there = (r % BLOCK_N < size) & (v < needed)
        sums = _sums(gate_up, v + r // BLOCK_N * neurons, there, v < fine, span, hidden_size, values, FINE, CHUNKS)
        gate, up = tl.split(tl.trans(tl.reshape(sums, (2, BLOCK_N)), 1, 0))
        v = dealt(tile * size + n, program, programs)
        inner = (gate / (1 + tl.exp(-gate)) * up).to(act.dtype.element_ty)
        tl.store(act + v, inner, mask=(n < size) & (v < needed))


@triton.jit
def rounded_activate_alone(
    values, gate_up, act, program, programs, fine, needed, hidden_size, neurons,
    CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) · up of this program's share of all neurons for one token, given its `rounded_values`. CHUNKS: at least the
    hidden size's."""
    if fine > 0:
        _activate_alone(
            values, gate_up, act, program, programs, fine, needed, hidden_size, neurons, True, CHUNKS, BLOCK_N, STAGES
        )  # fmt: skip
    else:
        _activate_alone(
            _unshifted(values), gate_up, act, program, programs, fine, needed, hidden_size, neurons,
            False, CHUNKS, BLOCK_N, STAGES,
        )  # fmt: skip


@triton.jit
def _down_alone(
    sums_at, values, down, span, column, end, neurons,
    FINE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for start in tl.range(column, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        sums = _sums(down, n, n < end, n < end, span, neurons, values, FINE, CHUNKS)
        tl.store(sums_at + n, sums, mask=n < end)


@triton.jit
def _columns(hidden_size, programs, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of a unit of the second half."""
    return tl.cdiv(tl.cdiv(hidden_size * PARTS, programs), BLOCK_N) * BLOCK_N


@triton.jit
def _span(part, parts, fine, needed):
    """The chunks of one part of the neurons."""
    first, last = _part(0, fine, part, parts)
    then, until = _part(fine, needed, part, parts)
    finer = (last - first) // _HALF
    return first // _GROUP * 2, finer, then // _GROUP * 2, finer + (until - then) // _HALF


@triton.jit
def rounded_ask_for_down(
    down, program, programs, fine, needed, hidden_size, neurons,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Ask for the first TILES tiles that this program reads in the second half. Not for Triton's interpreter."""
    high, low, _scale = down
    columns = _columns(hidden_size, programs, PARTS, BLOCK_N)
    i = tl.arange(0, TILES * BLOCK_N)[:, None]
    n = program // PARTS * columns + i
    there = (i < columns) & (n < hidden_size)
    first, finer, then, chunks = _span(program % PARTS, PARTS, fine, needed)
    row = n * (neurons // _GROUP * 8)
    line = tl.arange(0, max(1, CHUNKS // 8))[None, :]  # a line has eight chunks
    _ask(high + row + then * 4 + line * 32, there & (line * 8 < chunks - finer))
    if fine > 0:
        here = there & (line * 8 < finer)
        _ask(high + row + first * 4 + line * 32, here)
        _ask(low + row + first * 4 + line * 32, here)


@triton.jit
def rounded_down_alone(
    act, down, partial, out, arrived, program, programs, fine, needed, hidden_size, neurons,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The output `[hidden]` for one token: programs share out the columns of PARTS parts of the neurons, of at most CHUNKS chunks,
    and the last one to bring its part of some columns adds them up, in order. `arrived` counts them, zeros between launches."""
    columns = _columns(hidden_size, programs, PARTS, BLOCK_N)
    i = tl.arange(0, BLOCK_N)
    for unit in range(program, tl.cdiv(hidden_size, columns) * PARTS, programs):
        tile, part = unit // PARTS, unit % PARTS
        column = tile * columns
        end = tl.minimum(column + columns, hidden_size)
        sums_at = partial + part * hidden_size
        span = _span(part, PARTS, fine, needed)
        values = _values_of_one(act, span, CHUNKS)
        if fine > 0:
            _down_alone(sums_at, values, down, span, column, end, neurons, True, CHUNKS, BLOCK_N, STAGES)
        else:
            _down_alone(sums_at, _unshifted(values), down, span, column, end, neurons, False, CHUNKS, BLOCK_N, STAGES)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1:
            tl.debug_barrier()
            tl.atomic_xchg(arrived + tile, 0, sem="relaxed")
            for start in range(column, end, BLOCK_N):
                acc = tl.zeros((BLOCK_N,), tl.float32)
                for s in tl.static_range(PARTS):
                    at = partial + s * hidden_size + start + i
                    acc += tl.load(at, mask=start + i < end, other=0.0, cache_modifier=".cg")
                tl.store(out + start + i, acc.to(out.dtype.element_ty), mask=start + i < end)


@triton.jit
def _part(first, last, part, parts):
    """A part of the neurons first to last, in whole groups: every part has as many at either precision."""
    span = tl.cdiv(tl.cdiv(last - first, parts), _GROUP) * _GROUP
    start = tl.minimum(first + part * span, last)
    return start, tl.minimum(start + span, last)


# ---------------------------------------------------------------- few tokens


@triton.jit
def _numbers(words, kind: tl.constexpr):
    """The low halves of the bytes of a group's words `[rows, words]` as numbers `[rows, 32]` in the order of `_values`, and `_over`
    more each: four bits at the low end of 128 in bfloat16, or of 1024 in float16, are as much more than that number."""
    number: tl.constexpr = 0x64006400 if kind == tl.float16 else 0x43004300
    even, odd = (words & 0x000F000F) | number, ((words >> 8) & 0x000F000F) | number  # two bytes each
    even = tl.join(even.to(tl.int16), (even >> 16).to(tl.int16))
    odd = tl.join(odd.to(tl.int16), (odd >> 16).to(tl.int16))
    steps = tl.reshape(tl.permute(tl.join(even, odd), (0, 3, 1, 2)), (words.shape[0], _HALF))
    if kind == tl.float32:  # none of the matrix unit's, for the tests
        return steps.to(tl.bfloat16, bitcast=True).to(kind) - 128
    return steps.to(kind, bitcast=True)


@triton.jit
def _over(kind: tl.constexpr):
    return 1024.0 if kind == tl.float16 else 128.0 if kind == tl.bfloat16 else 0.0


@triton.jit
def _values(x_at, there):
    """Half of a group's values `[32, tokens]`, those of even bytes first."""
    x = tl.load(x_at, mask=there, other=0.0)
    return tl.reshape(tl.permute(tl.reshape(x, (_HALF // 2, 2, x.shape[1])), (1, 0, 2)), x.shape)


@triton.jit
def _product(w, x, acc):
    """acc `[rows / 16, 16, tokens]` plus rows `[rows, 32]` times values `[32, tokens]`: in three dimensions, so that Triton takes a
    warp's own instruction, with rows and values in registers, and not that of four warps, which wait for each product."""
    w = tl.reshape(w, (w.shape[0] // _ROWS, _ROWS, _HALF))
    return tl.dot(w, tl.broadcast_to(x[None, :, :], (w.shape[0], x.shape[0], x.shape[1])), acc, input_precision="ieee")


@triton.jit
def _steps(plane, at, inside, one, two):
    """Rows of one plane, each step as a number and `_over`, times half a group's values each."""
    words = tl.load(plane + at, mask=inside, other=0, eviction_policy="evict_first")
    acc = tl.zeros((at.shape[0] // _ROWS, _ROWS, one.shape[1]), tl.float32)
    acc = _product(_numbers(words, one.dtype), one, acc)
    return tl.reshape(_product(_numbers(words >> 4, one.dtype), two, acc), (at.shape[0], one.shape[1]))


@triton.jit
def _sum(rows: tl.constexpr, one, two):
    """The sum of a group's values by token, once for each row: by the matrix unit too."""
    ones = tl.full((rows, _HALF // 2), 1.0, one.dtype)
    ones = tl.reshape(tl.join(ones, ones), (rows, _HALF))
    acc = tl.zeros((rows // _ROWS, _ROWS, one.shape[1]), tl.float32)
    return tl.reshape(_product(ones, two, _product(ones, one, acc)), (rows, one.shape[1]))


@triton.jit
def _group(acc, planes, row, there, group, depth, x_at, running, FINE: tl.constexpr):
    """acc `[rows, tokens]` plus a group of rows `[rows]` of a weight of this depth, times its values at x_at `[32, tokens]` and the 32
    after. The matrix unit multiplies steps, as whole numbers; what a step is and the least value come in once for a group."""
    high, low, scale = planes
    one, two = _values(x_at, running), _values(x_at + _HALF, running)
    at = row[:, None] * (depth // _GROUP * _WORDS) + group * _WORDS + tl.arange(0, _WORDS)[None, :]
    inside = tl.broadcast_to(there[:, None], at.shape)
    both = tl.load(scale + row * (depth // _GROUP) + group, mask=there, other=0)
    step, least = _float(both << 16), _float(both & -65536)
    steps, over = _steps(high, at, inside, one, two), _over(one.dtype)
    if FINE:  # 16 parts of a step a step, and 8 to take away
        steps += _steps(low, at, inside, one, two) / 16
        over += (over + 8) / 16
    return acc + step[:, None] * steps + (least - step * over)[:, None] * _sum(row.shape[0], one, two)


@triton.jit
def _activate(
    x, gate_up, act, row, inside, runs, program, programs, first, last, hidden_size, neurons,
    FINE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, 2 * BLOCK_N)  # a gate and an up row for each neuron
    n = tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_M)
    x_at = x + row[None, :] * hidden_size + tl.arange(0, _HALF)[:, None]
    tiles, size = tiles_of(program, programs, last - first, BLOCK_N)
    for tile in range(0, tiles):
        v = first + dealt(tile * size + r // 2, program, programs)
        there = (r // 2 < size) & (v < last)
        acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
        for group in tl.range(0, hidden_size // _GROUP, num_stages=STAGES):
            at = x_at + group * _GROUP
            acc = _group(acc, gate_up, v + r % 2 * neurons, there, group, hidden_size, at, inside[None, :], FINE)
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_M)), (0, 2, 1)))
        v = first + dealt(tile * size + n, program, programs)
        mine = (n < size) & (v < last)
        inner = tl.where(runs[None, :], gate / (1 + tl.exp(-gate)) * up, 0.0).to(act.dtype.element_ty)
        tl.store(act + i[None, :] * neurons + v[:, None], inner, mask=mine[:, None] & inside[None, :])


@triton.jit
def rounded_activate(
    x, gate_up, act, row, inside, runs, program, programs, fine, needed, hidden_size, neurons,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) · up of this program's share of all neurons, zero for rows that do not run."""
    _activate(
        x, gate_up, act, row, inside, runs, program, programs, 0, fine, hidden_size, neurons, True, BLOCK_M, BLOCK_N, STAGES
    )  # fmt: skip
    _activate(
        x, gate_up, act, row, inside, runs, program, programs, fine, needed, hidden_size, neurons,
        False, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip


@triton.jit
def _down(acc, act, down, column, inside, first, last, neurons, FINE: tl.constexpr, STAGES: tl.constexpr):
    i = tl.arange(0, acc.shape[1])
    act_at = act + i[None, :] * neurons + tl.arange(0, _HALF)[:, None]
    every = tl.full(column.shape, True, tl.int1)
    for group in tl.range(first // _GROUP, last // _GROUP, num_stages=STAGES):
        acc = _group(acc, down, column, every, group, neurons, act_at + group * _GROUP, inside[None, :], FINE)
    return acc


@triton.jit
def rounded_down(acc, act, down, column, inside, part, parts, fine, needed, neurons, STAGES: tl.constexpr):
    """acc `[columns, rows]` and one part's share of these columns of the output."""
    first, last = _part(0, fine, part, parts)
    acc = _down(acc, act, down, column, inside, first, last, neurons, True, STAGES)
    first, last = _part(fine, needed, part, parts)
    return _down(acc, act, down, column, inside, first, last, neurons, False, STAGES)
