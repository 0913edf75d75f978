"""A gate's decision on a GPU: the level of every token, for the MLP kernels.

For few tokens the gate is part of the MLP's own kernel (fused_kernel.py calls the functions at the top); for more, one small
kernel decides, sorts the tokens by level and counts them. Nothing here reads a device value back, and each wrapper has
its torch twin beside it.

Level `levels`, one past the narrowest, is that of rows that do not run: padding of a captured step.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .gates import GATE_RANK, LEAST_LOG_DAMAGE, MOST_LOG_DAMAGE, Gate, choose

_RANK = tl.constexpr(GATE_RANK)
_LEAST, _MOST = tl.constexpr(LEAST_LOG_DAMAGE), tl.constexpr(MOST_LOG_DAMAGE)

# What is counted on a device, int64, at the first gate or checkpoint of a forward step: steps, tokens, steps by path, and
# tokens that saved nothing by reason, each token under the first that holds for it. Then what each policy counts itself.
PATHS = ("predicated", "conditional", "dense", "gather")
FALLBACKS = ("observing", "switched off", "request", "dense")  # dense: as the step took this path
STEPS, TOKENS, BY_PATH, BY_REASON, OWN = 0, 1, 2, 2 + len(PATHS), 2 + len(PATHS) + len(FALLBACKS)
BY_LEVEL = OWN  # gates: MLP rows (token × layer) by level

BLOCK_OF_LARGE = 64  # tokens that a program of a large step decides for

# Whether decisions are taken: only watched, taken, or switched off.
OBSERVING, TAKEN, OFF = 0, 1, 2


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


def new_counters(levels: int, device: torch.device) -> Tensor:
    return torch.zeros(BY_LEVEL + levels, dtype=torch.int64, device=device)


# ---------------------------------------------------------------- parts of other kernels


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
def products_of_one(x, proj, hidden_size, BLOCK_K: tl.constexpr):
    """The product for the first token before its last sum, `[16, BLOCK_K]`: without a matrix unit, whose steps would have to
    follow each other."""
    r = tl.arange(0, _RANK)
    acc = tl.zeros((_RANK, BLOCK_K), tl.float32)
    for start in tl.range(0, hidden_size, BLOCK_K, num_stages=4):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(proj + r[:, None] * hidden_size + k[None, :])
        acc += w.to(tl.float32) * tl.load(x + k).to(tl.float32)[None, :]
    return acc


@triton.jit
def share_product(
    x, proj, token, inside, parts, arrived, program, programs, hidden_size,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A part of the product's depth in each of the first SPLITS programs, into parts `[SPLITS, 16, BLOCK_M]`. Who calls this sets
    `arrived` to zero again."""
    at = parts + tl.arange(0, _RANK)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    for s in range(program, SPLITS, programs):
        part = product(x, proj, token, inside, s * BLOCK_K, (s + 1) * BLOCK_K, hidden_size, BLOCK_M, BLOCK_K)
        tl.store(at + s * _RANK * BLOCK_M, part, mask=inside[None, :])
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def shared_product(parts, arrived, inside, programs, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """All of the product, once `arrived` says that all parts are there. Programs must all run at once."""
    if programs > 1:
        while watch(arrived) < SPLITS:
            pass
    tl.debug_barrier()
    at = parts + tl.arange(0, _RANK)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    z = tl.zeros((_RANK, BLOCK_M), tl.float32)
    for s in tl.static_range(SPLITS):
        z += tl.load(at + s * _RANK * BLOCK_M, mask=inside[None, :], other=0.0, cache_modifier=".cg")
    return z


@triton.jit
def share_product_of_one(x, proj, parts, program, programs, hidden_size, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """A part of the product's depth for the first token in each of the first SPLITS programs, into parts `[SPLITS, 16]`: the bits of
    floats, of which none is zero (zero itself is written as -0). Who calls this sets them to zero again."""
    r = tl.arange(0, _RANK)
    for s in range(program, SPLITS, programs):
        k = s * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(proj + r[:, None] * hidden_size + k[None, :]).to(tl.float32)
        part = tl.sum(w * tl.load(x + k).to(tl.float32)[None, :], 1).to(tl.int32, bitcast=True)
        tl.store(parts + s * _RANK + r, tl.where(part == 0, -2147483648, part))


@triton.jit
def shared_product_of_one(parts, programs, SPLITS: tl.constexpr):
    """All of the product `[16]`, as soon as no part of it is zero any more: what is waited for is what is wanted, so that a program
    needs no second look at memory after it. Programs must all run at once. Not for Triton's interpreter where they are several."""
    s = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None]
    at = parts + s * _RANK + tl.arange(0, _RANK)[None, :]
    there = (s < SPLITS) & (tl.arange(0, _RANK)[None, :] >= 0)
    if programs > 1:  # noqa: SIM108
        found = _wait_for(at, there)
    else:
        found = tl.load(at, mask=there, other=0)
    return tl.sum(found.to(tl.float32, bitcast=True), 0)


@triton.jit
def _wait_for(at, there):
    """What stands at these places, once it is not zero; zero where there is nothing to wait for."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred there, again;
        mov.b32 $0, 0;
        setp.ne.s32 there, $2, 0;
        more:
        @there ld.relaxed.gpu.global.b32 $0, [$1];
        setp.eq.and.s32 again, $0, 0, there;
        @again bra more;
        }""",
        "=&r,l,r", [at.to(tl.uint64, bitcast=True), there.to(tl.int32)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def watch(count):
    """What another program has written; what it wrote before is there as well then. Not for Triton's interpreter, in which no
    program waits for another."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [count.to(tl.uint64, bitcast=True)], tl.int32, False, 1
    )


@triton.jit
def arrive(arrived, program, programs):
    """Half of a barrier for all programs of a launch that run at once. Each adds one to the count, and the first one what is
    missing to 2³¹: when all have come, its sign has changed and the rest is zero, ready for the next barrier."""
    tl.debug_barrier()
    before = 0
    if programs > 1:
        before = tl.atomic_add(arrived, tl.where(program == 0, 2147483647 - (programs - 2), 1), sem="release")
    return before


@triton.jit
def wait_for_all(arrived, before, programs):
    """The other half: zero, once all have come. A load whose address this zero is part of cannot be moved before the barrier."""
    zero = 0
    if programs > 1:
        now = before
        while (now ^ before) >= 0:
            now = watch(arrived)
        zero = tl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [now], tl.int32, True, 1)
    tl.debug_barrier()
    return zero


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
def real_rows(slots, i, tokens, HAS_SLOTS: tl.constexpr):
    """Which of rows `i` are tokens of a request: padding has no slot in the KV cache."""
    real = i < tokens
    if HAS_SLOTS:
        real = real & (tl.load(slots + i, mask=real, other=-1) >= 0)
    return real


@triton.jit
def count(counters, at, number):
    tl.atomic_add(counters + at, number, sem="relaxed")  # nobody waits for it, unlike for a sum


@triton.jit
def chosen_rows(chosen, i, tokens, BLOCK: tl.constexpr, HAS_CHOICES: tl.constexpr):
    """Each token's row of the policy's table: 0 is what is in force, 1 is off."""
    row = tl.zeros((BLOCK,), tl.int32)
    if HAS_CHOICES:
        row = tl.load(chosen + i, mask=i < tokens, other=0)
    return row


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
        count_step(counters, seen, off, phase(price), 0)  # predicated
        count(counters, 10, (seen * outside).to(tl.int64))


@triton.jit
def phase(price):
    """Gates are switched off by a price that nothing is worth."""
    return tl.where(tl.load(price) == -float("inf"), 2, 1)  # OFF, TAKEN


@triton.jit
def count_step(counters, tokens, off, phase, path):
    """Count a step of so many tokens, of which `off` opted out, on this path."""
    some = tl.where(tokens > 0, 1, 0).to(tl.int64)
    taken = phase == 1  # TAKEN
    count(counters, 0, some)  # STEPS
    count(counters, 1, tokens.to(tl.int64))  # TOKENS
    count(counters, 2 + path, some)  # BY_PATH
    count(counters, 6, tl.where(phase == 0, tokens, 0).to(tl.int64))  # BY_REASON
    count(counters, 7, tl.where(phase == 2, tokens, 0).to(tl.int64))
    count(counters, 8, tl.where(taken, off, 0).to(tl.int64))
    count(counters, 9, tl.where(taken & (path == 2), tokens - off, 0).to(tl.int64))  # dense


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


# ---------------------------------------------------------------- launches of their own for more tokens


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
                count_step(counters, seen, off, phase(price), 0)  # predicated
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


def step_twin(counters: Tensor, tokens: Tensor, off: Tensor, phase: int, path: str) -> None:
    """Count a step as `count_step` does, in torch."""
    counters[STEPS] += tokens > 0
    counters[TOKENS] += tokens
    counters[BY_PATH + PATHS.index(path)] += tokens > 0
    if phase != TAKEN:
        counters[BY_REASON + (phase == OFF)] += tokens
        return
    counters[BY_REASON + 2] += off
    if path == "dense":
        counters[BY_REASON + 3] += tokens - off


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
    count_step(counters, seen, off, phase(price), 2)  # dense
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
