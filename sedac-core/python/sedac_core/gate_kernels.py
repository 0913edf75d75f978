"""A gate's decision on a GPU in a launch of its own: the level of every token, for the MLP kernels of more than a few tokens.

One small kernel decides, sorts the tokens by level and counts them; for few tokens the norm before the MLP decides
(norm_kernels.py). Nothing here reads a device value back, and each wrapper has its torch twin beside it.

Level `levels`, one past the narrowest, is that of rows that do not run: padding of a captured step.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .gate_parts import DeviceGate, at_least, decide, head_of, product
from .gates import GATE_RANK, LEAST_LOG_DAMAGE, MOST_LOG_DAMAGE, choose
from .step_counters import (
    BY_LEVEL,
    OFF,
    PATHS,
    TAKEN,
    chosen_rows,
    count,
    count_step,
    phase,
    real_rows,
    step_twin,
)

_RANK = tl.constexpr(GATE_RANK)
BLOCK_OF_LARGE = 64  # tokens that a program of a large step decides for


@triton.jit
def sort(
    level, rows, ends, counters, tokens, group, LEVELS: tl.constexpr, BLOCK_T: tl.constexpr, COUNTS: tl.constexpr
):  # fmt: skip
    """Write the tokens in the order of their levels and where each level ends; returns the tokens that run."""
    before, seen = 0, 0
    for j in tl.static_range(LEVELS + 1):
        start_of_level = before
        for start in range(0, tokens, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            mine = tl.load(level + t, mask=t < tokens, other=-1, cache_modifier=".cg") == j
            place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(rows + place, t.to(tl.int64), mask=mine)
            before += tl.sum(mine.to(tl.int32), 0)
        if j < LEVELS:
            tl.store(ends + j, before)
            seen = before
            if COUNTS:
                count(counters, 10 + j, ((before - start_of_level) * group).to(tl.int64))  # BY_LEVEL
    return seen


@triton.jit
def count_block(level, places, m, LEVELS: tl.constexpr):
    """How many tokens of block m have each level, into places `[blocks, LEVELS + 1]`; level -1 is none."""
    for j in tl.static_range(LEVELS + 1):
        tl.store(places + m * (LEVELS + 1) + j, tl.sum((level == j).to(tl.int32), 0))


@triton.jit
def add_up(places, ends, counters, blocks, group, LEVELS: tl.constexpr, BLOCKS: tl.constexpr, COUNTS: tl.constexpr):
    """Where each block's tokens of each level go, in place of how many they are, and where each level ends; returns the tokens that
    run. BLOCKS: at least as many."""
    m = tl.arange(0, BLOCKS)
    before, seen = 0, 0
    for j in tl.static_range(LEVELS + 1):
        at = places + m * (LEVELS + 1) + j
        own = tl.load(at, mask=m < blocks, other=0, cache_modifier=".cg")
        tl.store(at, before + tl.cumsum(own, 0) - own, mask=m < blocks)
        total = tl.sum(own, 0)
        before += total
        if j < LEVELS:
            tl.store(ends + j, before)
            seen = before
            if COUNTS:
                count(counters, 10 + j, (total * group).to(tl.int64))  # BY_LEVEL
    return seen


@triton.jit(do_not_specialize=["tokens", "group", "first", "outside"])
def _levels_kernel(
    x, proj, proj_bias, head, head_bias, gain, price, slots, chosen, least,
    partial, level, rows, ends, counters, arrived,
    tokens, hidden_size, group, first, outside,
    LEVELS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_CHOICES: tl.constexpr, LATCHED: tl.constexpr,
):  # fmt: skip
    """Programs share out tokens and depth; the last one of a block of tokens decides for it, the last of all sorts, or, where there
    are BLOCKS, adds up for `_order_kernel`, with places `[BLOCKS, LEVELS + 1]` for rows."""
    m, split = tl.program_id(0), tl.program_id(1)
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i < tokens
    r = tl.arange(0, _RANK)
    # These arrive while the product runs.
    own_price = tl.load(price + chosen_rows(chosen, i, tokens, BLOCK_M, HAS_CHOICES))
    rest = head_of(proj_bias, head, head_bias, gain, LEVELS)
    span = tl.cdiv(hidden_size // BLOCK_K, SPLITS) * BLOCK_K
    end = tl.minimum((split + 1) * span, hidden_size)
    z = product(x, proj, i, inside, split * span, end, hidden_size, BLOCK_M, BLOCK_K)
    at = partial + (m * SPLITS * _RANK + r[:, None]) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(at + split * _RANK * BLOCK_M, z)
    tl.debug_barrier()
    if tl.atomic_add(arrived + 1 + m, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        tl.atomic_xchg(arrived + 1 + m, 0, sem="relaxed")
        z = tl.zeros((_RANK, BLOCK_M), tl.float32)
        for s in tl.static_range(SPLITS):
            z += tl.load(at + s * _RANK * BLOCK_M, cache_modifier=".cg")
        own = at_least(decide(z, rest, own_price, LEVELS), least, i, tokens, LATCHED)
        own = tl.where(real_rows(slots, i, tokens, HAS_SLOTS), own, LEVELS)
        tl.store(level + i, own, mask=inside)
        if BLOCKS > 0:
            count_block(tl.where(inside, own, -1), rows, m, LEVELS)
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.debug_barrier()
            tl.atomic_xchg(arrived, 0, sem="relaxed")
            if BLOCKS > 0:
                seen = add_up(rows, ends, counters, tl.num_programs(0), group, LEVELS, BLOCKS, True)
            else:
                seen = sort(level, rows, ends, counters, tokens, group, LEVELS, BLOCK_T, True)
            if first != 0:
                off = 0
                for start in range(0, tokens, BLOCK_T):
                    t = start + tl.arange(0, BLOCK_T)
                    runs = tl.load(level + t, mask=t < tokens, other=LEVELS, cache_modifier=".cg") < LEVELS
                    off += tl.sum((runs & (chosen_rows(chosen, t, tokens, BLOCK_T, HAS_CHOICES) == 1)).to(tl.int32), 0)
                count_step(counters, seen > 0, seen, off, phase(price), 0)  # predicated
                count(counters, 10, (seen * outside).to(tl.int64))


@triton.jit(do_not_specialize=["tokens"])
def _sort_kernel(level, rows, ends, tokens, LEVELS: tl.constexpr, BLOCK_T: tl.constexpr):
    sort(level, rows, ends, rows, tokens, 0, LEVELS, BLOCK_T, False)


@triton.jit(do_not_specialize=["tokens"])
def _places_kernel(
    level, places, ends, arrived, tokens, LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr
):
    m = tl.program_id(0)
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    count_block(tl.load(level + i, mask=i < tokens, other=-1), places, m, LEVELS)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        tl.atomic_xchg(arrived, 0, sem="relaxed")
        add_up(places, ends, places, tl.num_programs(0), 0, LEVELS, BLOCKS, False)


@triton.jit(do_not_specialize=["tokens"])
def _order_kernel(level, places, rows, tokens, LEVELS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tokens of each block to their places."""
    m = tl.program_id(0)
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.load(level + i, mask=i < tokens, other=-1)
    for j in tl.static_range(LEVELS + 1):
        mine = own == j
        place = tl.load(places + m * (LEVELS + 1) + j) + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(rows + place, i.to(tl.int64), mask=mine)


@functools.cache
def _arrived(device: torch.device) -> Tensor:
    """How many programs have done their share, `[1 + blocks of tokens]`: zeros between launches, which must follow each
    other on one stream, as vLLM's do."""
    return torch.zeros(1 + 8192, dtype=torch.int32, device=device)


def levels_of(
    x: Tensor,
    gate: DeviceGate,
    price: Tensor,
    slots: Tensor | None,
    counters: Tensor,
    chosen: Tensor | None = None,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate decides for each token: level `[tokens]`, int32; rows `[tokens]`, int64, the tokens in the order of their
    levels; ends `[levels]`, int32, how many of `rows` have this level or one before it. One launch, for large steps two.

    x `[tokens, hidden]`, the MLP's input; price `[1 + choices]`, float32, log λ: what is in force, no price at all, and
    others; chosen `[at least tokens]`, int32, each token's entry of it (None: the first, which may then be the only one);
    slots `[tokens]`, int64, negative for padding (None: no padding), which has level `levels`, stands last and is counted
    nowhere; counters as `new_counters` makes them; least `[tokens]`, int32, the level below which none may go: an earlier
    gate's, under a latch.
    """
    tokens, hidden_size = x.shape
    assert x.is_contiguous() and x.dtype == gate.proj.dtype and gate.proj.shape == (GATE_RANK, hidden_size)
    check_choices(price, chosen, tokens, least)
    assert slots is None or slots.shape == (tokens,)
    assert len(counters) == BY_LEVEL + gate.levels
    block_m = 16 if tokens <= 512 else BLOCK_OF_LARGE
    blocks, steps, most = triton.cdiv(tokens, block_m), hidden_size // gate.block_k, _blocks(tokens)
    assert blocks <= 8192
    # Large steps are of any size: one kernel for all of them.
    splits = 1 if most else max(1, min(steps, 16, 128 // blocks))
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))
    device = x.device
    partial = torch.empty(blocks * splits * GATE_RANK * block_m, dtype=torch.float32, device=device)
    level = torch.empty(tokens, dtype=torch.int32, device=device)
    rows = torch.empty(tokens, dtype=torch.int64, device=device)
    ends = torch.empty(gate.levels, dtype=torch.int32, device=device)
    places = torch.empty(blocks, gate.levels + 1, dtype=torch.int32, device=device) if most else rows
    _levels_kernel[(blocks, splits)](
        x, gate.proj, gate.proj_bias, gate.head, gate.head_bias, gate.gain, price,
        level if slots is None else slots, level if chosen is None else chosen, level if least is None else least,
        partial, level, places, ends, counters, _arrived(device),
        tokens, hidden_size, gate.group, int(gate.first), gate.outside,
        gate.levels, splits, block_m, gate.block_k, _block(tokens), most, slots is not None, chosen is not None, least is not None,
    )  # fmt: skip
    if most:
        _order_kernel[(blocks,)](level, places, rows, tokens, gate.levels, block_m)
    return level, rows, ends


def sorted_by_level(level: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """rows `[tokens]` and ends `[levels]` of decided levels `[tokens]`, int32. One launch, for large steps two."""
    tokens, most = len(level), _blocks(len(level))
    rows = torch.empty(tokens, dtype=torch.int64, device=level.device)
    ends = torch.empty(levels, dtype=torch.int32, device=level.device)
    if most:
        blocks = triton.cdiv(tokens, BLOCK_OF_LARGE)
        places = torch.empty(blocks, levels + 1, dtype=torch.int32, device=level.device)
        arrived = _arrived(level.device)
        _places_kernel[(blocks,)](level, places, ends, arrived, tokens, levels, BLOCK_OF_LARGE, most)
        _order_kernel[(blocks,)](level, places, rows, tokens, levels, BLOCK_OF_LARGE)
    else:
        _sort_kernel[(1,)](level, rows, ends, tokens, levels, _block(tokens))
    return rows, ends


def _block(tokens: int) -> int:
    return min(2048, max(16, triton.next_power_of_2(tokens)))


def _blocks(tokens: int) -> int:
    """At least as many as a large step's blocks of tokens, which share out the sorting; 0 for steps that one program sorts."""
    return 0 if tokens <= 2048 else max(512, triton.next_power_of_2(triton.cdiv(tokens, BLOCK_OF_LARGE)))


def check_choices(price: Tensor, chosen: Tensor | None, tokens: int, least: Tensor | None = None) -> None:
    assert least is None or (least.shape == (tokens,) and least.dtype == torch.int32)
    assert price.dtype == torch.float32
    assert price.numel() == 1 if chosen is None else price.ndim == 1
    assert chosen is None or (chosen.dtype == torch.int32 and chosen.is_contiguous() and len(chosen) >= tokens)


def levels_twin(
    x: Tensor,
    gate: DeviceGate,
    price: Tensor,
    slots: Tensor | None,
    counters: Tensor | None,
    chosen: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """The level `[tokens]`, int64, of each token and the same counts, in torch."""
    inner = F.silu(F.linear(x.float(), gate.proj.float(), gate.proj_bias))
    log_damage = F.linear(inner, gate.head, gate.head_bias).clamp(LEAST_LOG_DAMAGE, MOST_LOG_DAMAGE)
    row = torch.zeros(len(x), dtype=torch.int32, device=x.device) if chosen is None else chosen[: len(x)]
    level = choose(log_damage, price.view(-1)[row], gate.gain)
    if least is not None:
        level = torch.maximum(level, least)
    if slots is not None:
        level = torch.where(slots >= 0, level, gate.levels)
    if counters is not None:
        counters[BY_LEVEL:] += gate.group * torch.bincount(level, minlength=gate.levels + 1)[: gate.levels]
        if gate.first:
            real = level < gate.levels
            now = OFF if price.view(-1)[0] == -torch.inf else TAKEN
            step_twin(counters, real.sum(), (real & (row == 1)).sum(), now, PATHS[0])
            counters[BY_LEVEL] += gate.outside * real.sum()
    return level


def sorted_twin(level: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """`sorted_by_level` in torch."""
    counts = torch.bincount(level.long(), minlength=levels + 1)[:levels]
    return torch.argsort(level, stable=True), counts.cumsum(0).int()


@triton.jit(do_not_specialize=["tokens", "layers"])
def _whole_kernel(
    slots, chosen, price, counters, tokens, layers, BLOCK: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_CHOICES: tl.constexpr
):  # fmt: skip
    seen, off = 0, 0
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        real = real_rows(slots, i, tokens, HAS_SLOTS)
        seen += tl.sum(real.to(tl.int32), 0)
        off += tl.sum((real & (chosen_rows(chosen, i, tokens, BLOCK, HAS_CHOICES) == 1)).to(tl.int32), 0)
    count_step(counters, seen > 0, seen, off, phase(price), 2)  # dense
    count(counters, 10, seen.to(tl.int64) * layers)  # BY_LEVEL


def count_whole(
    slots: Tensor | None, tokens: int, layers: int, counters: Tensor, price: Tensor, chosen: Tensor | None = None
) -> None:
    """Count a dense step, whose tokens run all MLPs whole; price and chosen as for `levels_of`. One launch."""
    check_choices(price, chosen, tokens)
    block = min(1024, max(16, triton.next_power_of_2(tokens)))
    _whole_kernel[(1,)](
        counters if slots is None else slots, counters if chosen is None else chosen, price, counters,
        tokens, layers, block, slots is not None, chosen is not None,
    )  # fmt: skip
