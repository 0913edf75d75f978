"""A checkpoint's decision on a GPU: risk, margin, exit and compaction of all tokens in two launches, of some sizes in three, and in
large steps that need no compaction in one.

Nothing here reads a device value back, and each wrapper has its torch twin beside it (see kernels.py).
"""

import functools
import operator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cascade import critical_threshold, margin_step
from .checkpoint_parts import (
    BY_CHECKPOINT,
    HISTOGRAM_BINS,
    PER_CHECKPOINT,
    ROWS_SAVED,
    DeviceProbe,
    Rule,
    histogram_bins,
)
from .metrics import RISK_BUCKETS
from .probe import LREProbe
from .step_counters import OBSERVING, PATHS, chosen_rows, count, count_step, real_rows, step_twin

# Up to so many tokens one program decides, places and counts; of more, programs of BLOCK_OF_SOME or BLOCK_OF_MANY each do.
ALONE = 256
# Up to so many tokens the probe's first layer is a launch of its own: programs of PROJECTED tokens and a share of the hidden size, about
# PROJECTING in all. Of more, those that decide, with BLOCK_OF_MANY each, run it as well.
SHARED_OUT = 512
BLOCK_OF_SOME, BLOCK_OF_MANY = 64, 16
PROJECTED, PROJECTING = 16, 64
SPAN = 64  # of the hidden size, at once
DENSE = PATHS.index("dense")
ALIGNED = 16  # bytes; Triton compiles a kernel for tensors that are so another way


@triton.jit
def _projected(
    hidden, residual, weight, token, tokens, first, span,
    hidden_size: tl.constexpr, rank: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """(hidden + residual) · weightᵀ over a span of the hidden size, `[BLOCK_M, RANK]`."""
    r = tl.arange(0, RANK)
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, span, SPAN):
        k = first + start + tl.arange(0, SPAN)
        inside = (token < tokens)[:, None] & (k < hidden_size)[None, :]
        at = token.to(tl.int64)[:, None] * hidden_size + k[None, :]
        h = tl.load(hidden + at, mask=inside, other=0.0)
        stream = h.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        stream = stream.to(h.dtype).to(tl.float32)  # the residual stream has the model's dtype
        known = (r < rank)[:, None] & (k < hidden_size)[None, :]
        w = tl.load(weight + r[:, None] * hidden_size + k[None, :], mask=known, other=0.0)
        acc = tl.dot(stream, tl.trans(w), acc, input_precision="tf32x3")  # as exact as float32's, by the matrix units
    return acc


@triton.jit(do_not_specialize=["tokens", "span"])
def _project_kernel(
    hidden, residual, weight, partial,
    tokens, span, hidden_size: tl.constexpr, rank: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """partial[split] = (hidden + residual) · weightᵀ over one span of the hidden size, `[splits, tokens, RANK]`."""
    split = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = _projected(
        hidden, residual, weight, token, tokens, split * span, span, hidden_size, rank, RANK, BLOCK_M, SPAN
    )
    at = (split * tokens + token.to(tl.int64))[:, None] * RANK + tl.arange(0, RANK)[None, :]
    tl.store(partial + at, acc, mask=(token < tokens)[:, None])


@triton.jit
def field(flag, at: tl.constexpr):
    """1 or 0 in one of six fields of ten bits, so that one sum over a block counts several flags: each sum has warps wait."""
    tl.static_assert(flag.shape[0] < 1024)
    return flag.to(tl.int64) << (10 * at)


@triton.jit
def field_of(counts, at: tl.constexpr):
    return ((counts >> (10 * at)) & 1023).to(tl.int32)


@triton.jit
def _summed(partial, token, tokens, SPLITS: tl.constexpr, RANK: tl.constexpr):
    """What `_project_kernel` left of each token, over all spans."""
    z = tl.zeros((token.shape[0], RANK), tl.float32)
    for split in tl.static_range(SPLITS):  # so that no load waits for the one before
        at = (split * tokens + token.to(tl.int64))[:, None] * RANK + tl.arange(0, RANK)[None, :]
        z += tl.load(partial + at, mask=(token < tokens)[:, None], other=0.0)
    return z


@triton.jit
def _risk(z, small, eps: tl.constexpr, rank: tl.constexpr, RANK: tl.constexpr):
    """The probe's risk of each token, from its first layer's product `z` on; `small` as `DeviceProbe` has it."""
    r = tl.arange(0, RANK)
    known = r < rank
    z += tl.load(small + r, mask=known, other=0.0)[None, :]
    centred = tl.where(known[None, :], z - (tl.sum(z, 1) / rank)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / rank + eps)
    norm_weight = tl.load(small + rank + r, mask=known, other=0.0)
    norm_bias = tl.load(small + 2 * rank + r, mask=known, other=0.0)
    head = tl.load(small + 3 * rank + r, mask=known, other=0.0)
    normed = centred * scale[:, None] * norm_weight[None, :] + norm_bias[None, :]
    y = tl.sum(normed * head[None, :], 1) + tl.load(small + 4 * rank)
    e = tl.exp(y)
    series = e * (1 - e * (0.5 - e * (0.33333334 - 0.25 * e)))  # log(1 + e), where that would round e away
    return tl.where(y > 20, y, tl.where(e < 0.01, series, tl.log(1 + e)))


@triton.jit
def _compact(rows, runs, token, tokens, running_before):
    """Tokens that run, of a block before which so many do, to their places in `rows`; the others from its end on."""
    so_far = running_before + tl.cumsum(runs.to(tl.int32), 0)
    place = tl.where(runs, so_far - 1, tokens - 1 - (token - so_far))
    tl.store(rows + place, token.to(tl.int64), mask=token < tokens)


@triton.jit
def _count_tokens(
    counters, steps, running, seen, exited, odd, off, taken, layers_ahead, path, FIRST: tl.constexpr, OWN_COUNTS: tl.constexpr
):  # fmt: skip
    """Count what became of a step's tokens, or of a block of them: `seen`, of which so many run."""
    if FIRST:
        count_step(counters, steps, seen, off, taken, path)
    count(counters, 10, (seen - running).to(tl.int64) * layers_ahead)  # ROWS_SAVED
    if taken != 0:  # OBSERVING
        count(counters + OWN_COUNTS, 0, exited.to(tl.int64))
    count(counters + OWN_COUNTS, 1, odd.to(tl.int64))


@triton.jit(do_not_specialize=["tokens", "layers_ahead", "path"])
def _decide_kernel(
    hidden, residual, margin_before, slots, chosen, margin, rows, n_running, running, partial, by_block,
    tokens, layers_ahead, path,
    proj, small, table, rule, weight, taken, counters, risk_sums, histogram, checkpoints,
    index: tl.constexpr, hidden_size: tl.constexpr, eps: tl.constexpr, rank: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, SPAN: tl.constexpr, SPLITS: tl.constexpr, ALONE: tl.constexpr, COMPACTED: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_CHOICES: tl.constexpr, ADAPTIVE: tl.constexpr,
    BINS: tl.constexpr, BOUNDS: tl.constexpr, BUCKETS: tl.constexpr, OWN_COUNTS: tl.constexpr,
):  # fmt: skip
    """Risk, margin and exit of a block of tokens, whose probe's first layer another launch left in SPLITS shares (0: none did). If there
    is one block, compaction as well; blocks that are COMPACTED by `_compact_kernel` leave what it needs to know of each in `by_block`: five
    counts in fields."""
    gamma, level = tl.load(rule), tl.load(rule + 1)
    w, now = tl.load(weight + index), tl.load(taken)
    mine = counters + OWN_COUNTS
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < tokens
    choice = chosen_rows(chosen, token, tokens, BLOCK_M, HAS_CHOICES)
    t = tl.load(table + choice * checkpoints + index, mask=inside, other=0.0)
    real = real_rows(slots, token, tokens, HAS_SLOTS)
    before = tl.zeros((BLOCK_M,), tl.float32)
    if index > 0:
        before = tl.load(margin_before + token, mask=inside, other=0.0)
    if SPLITS > 0:
        z = _summed(partial, token, tokens, SPLITS, RANK)
    else:
        z = tl.zeros((BLOCK_M, RANK), tl.float32)
        if tl.min(before, 0) < float("inf"):  # else nobody looks at its risk
            z = _projected(
                hidden, residual, proj, token, tokens, 0, hidden_size, hidden_size, rank, RANK, BLOCK_M, SPAN
            )
    risk = _risk(z, small, eps, rank, RANK)

    reached = real & (before < float("inf"))
    q = tl.div_rn(risk, t)
    usable = (risk >= 0) & (q < float("inf"))
    gain = tl.where(usable, tl.div_rn((1 - level) - level * q, 1 + q), -level)
    after = gamma * before + w * gain
    stays = reached & ~(after > 0)
    tl.store(margin + token, tl.where(stays, after, float("inf")), mask=inside)

    runs = stays | (real & (now == 0))  # OBSERVING
    tl.store(running + token, runs, mask=inside)
    finite = reached & (tl.abs(risk) < float("inf"))
    total = tl.sum(tl.where(finite, risk, 0.0), 0)
    tl.atomic_add(risk_sums + index, total.to(tl.float64), sem="relaxed")  # nobody waits for it, unlike for a sum
    counts = field(runs, 0) | field(real, 1) | field(reached & ~stays, 2) | field(reached & ~finite, 3)
    if index == 0:
        counts |= field(real & (choice == 1), 4)
    counts = tl.sum(counts, 0)
    if COMPACTED:
        tl.store(by_block + tl.program_id(0), counts)
    else:
        if ALONE:
            _compact(rows, runs, token, tokens, 0)
            tl.store(n_running, field_of(counts, 0))
        seen = field_of(counts, 1)
        steps = (tl.program_id(0) == 0) & (seen > 0)  # padding comes last
        _count_tokens(
            counters, steps, field_of(counts, 0), seen, field_of(counts, 2), field_of(counts, 3), field_of(counts, 4),
            now, layers_ahead, path, index == 0, OWN_COUNTS,
        )  # fmt: skip
    bucket = tl.zeros((BLOCK_M,), tl.int32)
    for bound in tl.static_range(BOUNDS):
        bucket += (risk > BUCKETS[bound]).to(tl.int32)
    tl.atomic_add(mine + 2 + bucket, tl.full((BLOCK_M,), 1, tl.int64), mask=finite, sem="relaxed")
    if ADAPTIVE:
        behind = -gamma * before / w
        room = 1 - level - behind
        critical = tl.where(room > 0, risk * (level + behind) / room, float("inf"))
        critical = tl.where((risk >= 0) & (critical >= 0), critical, float("inf"))
        bits = critical.to(tl.int32, bitcast=True) >> 16
        column = tl.minimum(tl.maximum(bits - 13184, 0), 6143)  # _BIN_SHIFT, _BIN_FIRST, bins - 2
        column = tl.where(critical < float("inf"), column, 6144)
        counted = reached & (choice == 0)  # rates are for those who did not choose
        tl.atomic_add(histogram + index * BINS + column, 1, mask=counted)


@triton.jit(do_not_specialize=["tokens", "layers_ahead", "path", "blocks"])
def _compact_kernel(
    running, taken, by_block, rows, n_running, counters, tokens, layers_ahead, path, blocks,
    FIRST: tl.constexpr, BLOCK_M: tl.constexpr, OWN_COUNTS: tl.constexpr,
):  # fmt: skip
    """The compaction of a block of tokens among many; the first program counts them all."""
    m = tl.program_id(0)
    now = tl.load(taken)
    token = m * BLOCK_M + tl.arange(0, BLOCK_M)
    runs = tl.load(running + token, mask=token < tokens, other=False)
    b = tl.arange(0, 128)
    running_before = 0
    for first in range(0, m, 128):
        counts = tl.load(by_block + first + b, mask=first + b < m, other=0)
        running_before += tl.sum(field_of(counts, 0), 0)
    _compact(rows, runs, token, tokens, running_before)
    if m == 0:
        run, seen, exited, odd, off = 0, 0, 0, 0, 0
        for first in range(0, blocks, 128):
            counts = tl.load(by_block + first + b, mask=first + b < blocks, other=0)
            run += tl.sum(field_of(counts, 0), 0)
            seen += tl.sum(field_of(counts, 1), 0)
            exited += tl.sum(field_of(counts, 2), 0)
            odd += tl.sum(field_of(counts, 3), 0)
            off += tl.sum(field_of(counts, 4), 0)
        tl.store(n_running, run)
        _count_tokens(counters, seen > 0, run, seen, exited, odd, off, now, layers_ahead, path, FIRST, OWN_COUNTS)


def checkpoint(
    probe: DeviceProbe,
    hidden: Tensor,
    residual: Tensor,
    margin: Tensor | None,
    slots: Tensor | None,
    rule: Rule,
    index: int,
    layers_ahead: int,
    chosen: Tensor | None = None,
    path: str = PATHS[0],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checkpoint `index` decides for each token; returns margin `[tokens]`, rows `[tokens]`, n_running `[1]` and running `[tokens]`,
    as `policy.Exits` has them.

    hidden, residual `[tokens, hidden]` in the model's dtype, their sum being the residual stream; margin `[tokens]`,
    float32, as the checkpoint before left it (None at the first); slots `[tokens]`, int64, negative for padding (None:
    no padding). An exit here saves `layers_ahead` MLP rows until the next checkpoint, for the counters, as is the step's
    path. chosen `[at least tokens]`, int32, is each token's row of the rule's table (None: the first). Of up to `SHARED_OUT` tokens one launch
    projects; one decides; of more than `ALONE` one places.
    """
    _check(probe, hidden, residual, margin, slots, rule, index, chosen)
    (tokens, hidden_size), (rank, _), device = hidden.shape, probe.proj.shape, hidden.device
    shared_out, alone = tokens <= SHARED_OUT, tokens <= ALONE
    block = max(16, triton.next_power_of_2(tokens)) if alone else BLOCK_OF_SOME if shared_out else BLOCK_OF_MANY
    blocks = triton.cdiv(tokens, block)
    after, rows, n_running, running = _decided(tokens, device)
    by_block = rows if alone else torch.empty(blocks, dtype=torch.int64, device=device)
    partial, splits = after, 0
    if shared_out:
        most = (block if alone else SHARED_OUT) // PROJECTED  # groups of tokens, of all sizes that share a kernel
        splits = max(1, min(hidden_size // 128, PROJECTING // most))
        span = triton.cdiv(triton.cdiv(hidden_size, splits), SPAN) * SPAN
        splits, padded = triton.cdiv(hidden_size, span), _padded(rank)
        partial = torch.empty(splits, tokens, padded, dtype=torch.float32, device=device)
        _project_kernel[(triton.cdiv(tokens, PROJECTED), splits)](
            hidden, residual, probe.proj, partial, tokens, span, hidden_size, rank, padded, PROJECTED, SPAN, num_warps=4
        )  # fmt: skip
    _decide_kernel[(blocks,)](
        hidden, residual, after if margin is None else margin, after if slots is None else slots, rows if chosen is None else chosen,
        after, rows, n_running, running, partial, by_block, tokens, layers_ahead, PATHS.index(path),
        *_kept(probe, rule),
        *_constants(probe, rule, index, block, splits, alone, not alone, slots is not None, chosen is not None),
        num_warps=8 if block > 64 else 4,
    )  # fmt: skip
    if not alone:
        _compact_kernel[(blocks,)](
            running, rule.taken, by_block, rows, n_running, rule.counters, tokens, layers_ahead, PATHS.index(path), blocks,
            index == 0, block, BY_CHECKPOINT + PER_CHECKPOINT * index, num_warps=2,
        )  # fmt: skip
    return after, rows, n_running, running


class LargeCheckpoint:
    """`checkpoint` for steps of many tokens whose MLPs run whole, so that rows and n_running, which nobody needs, are whatever the memory
    held. One launch, and as little of the host's time as can be: such a step may take the host longer than the GPU.

    Triton looks at each argument before each launch to find which of its compiled kernels they want. What it found at first is launched by
    itself from then on, and told where tensors are, as long as all of them are aligned.
    """

    def __init__(self, probe: DeviceProbe, rule: Rule, index: int):
        """Arguments of `checkpoint`."""
        self.probe, self.rule, self.index = probe, rule, index
        self.kept = _kept(probe, rule)
        self.constants = _constants(probe, rule, index, BLOCK_OF_MANY, 0, False, False, True, True)
        self.addresses = [one.data_ptr() if isinstance(one, Tensor) else one for one in self.kept]
        self.compiled: Any = None  # stays so in Triton's interpreter

    def __call__(
        self, hidden: Tensor, residual: Tensor, margin: Tensor | None, slots: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments and results are `checkpoint`'s."""
        tokens = len(hidden)
        after, rows, n_running, running = _decided(tokens, hidden.device)
        moving = (
            hidden, residual, after if margin is None else margin, slots, chosen, after, rows, n_running, running, after, after,
        )  # fmt: skip
        step, grid = (tokens, 0, DENSE), (triton.cdiv(tokens, BLOCK_OF_MANY), 1, 1)
        addresses = [tensor.data_ptr() for tensor in moving]
        if self.compiled is None or functools.reduce(operator.or_, addresses) % ALIGNED:
            _check(self.probe, hidden, residual, margin, slots, self.rule, self.index, chosen)
            found = _decide_kernel[grid](*moving, *step, *self.kept, *self.constants, num_warps=4)
            self.compiled = self.compiled or found
        else:  # of the arguments, which come from a graph, only the number of tokens may be another than at first
            assert len(residual) == len(slots) == tokens <= len(chosen)
            self.compiled[grid](*addresses, *step, *self.addresses, *self.constants)
        return after, rows, n_running, running


def _check(probe, hidden, residual, margin, slots, rule, index, chosen) -> None:
    tokens = len(hidden)
    assert residual.shape == hidden.shape and hidden.is_contiguous() and residual.is_contiguous()
    assert hidden.dtype == residual.dtype and probe.proj.shape[1] == hidden.shape[1]
    assert (margin is None) == (index == 0) and (slots is None or slots.shape == (tokens,))
    assert chosen is None or (chosen.dtype == torch.int32 and chosen.is_contiguous() and len(chosen) >= tokens)
    assert rule.table.dtype == torch.float32 and rule.table.is_contiguous()


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _decided(tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for margin, rows, n_running and running."""
    return (
        torch.empty(tokens, dtype=torch.float32, device=device),
        torch.empty(tokens, dtype=torch.int64, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty(tokens, dtype=torch.bool, device=device),
    )


def _kept(probe: DeviceProbe, rule: Rule) -> tuple[Tensor | int, ...]:
    """The arguments of `_decide_kernel` that are the same in each step."""
    histogram = rule.risk_sums if rule.histogram is None else rule.histogram
    return (
        probe.proj, probe.small, rule.table, rule.gamma_level, rule.weights, rule.taken, rule.counters, rule.risk_sums, histogram,
        rule.table.shape[1],
    )  # fmt: skip


def _constants(
    probe: DeviceProbe, rule: Rule, index: int, block: int, splits: int, alone: bool, compacted: bool, slots: bool, chosen: bool
) -> tuple:  # fmt: skip
    """Those that are compiled into `_decide_kernel`."""
    rank, hidden_size = probe.proj.shape
    return (
        index, hidden_size, probe.eps, rank, _padded(rank), block, SPAN, splits, alone, compacted, slots, chosen,
        rule.histogram is not None, HISTOGRAM_BINS, len(RISK_BUCKETS), RISK_BUCKETS, BY_CHECKPOINT + PER_CHECKPOINT * index,
    )  # fmt: skip


def checkpoint_twin(
    probe: LREProbe,
    hidden: Tensor,
    residual: Tensor,
    margin: Tensor | None,
    slots: Tensor | None,
    rule: Rule,
    index: int,
    layers_ahead: int,
    chosen: Tensor | None = None,
    path: str = PATHS[0],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`checkpoint` in torch; the tokens that do not run may stand in another order."""
    risk = probe(hidden + residual)
    gamma, level = rule.gamma_level
    row = torch.zeros(len(risk), dtype=torch.int32, device=risk.device) if chosen is None else chosen[: len(risk)]
    threshold, weight = rule.table[row, index], rule.weights[index]
    real = torch.ones_like(risk, dtype=torch.bool) if slots is None else slots >= 0
    before = torch.zeros_like(risk) if margin is None else margin
    reached = real & (before < float("inf"))
    after = margin_step(risk, threshold, before, gamma, weight, level)
    stays = reached & ~(after > 0)
    runs = stays | (real & (rule.taken == OBSERVING))
    counters, mine = rule.counters, rule.counters[BY_CHECKPOINT + PER_CHECKPOINT * index :]
    if index == 0:
        step_twin(counters, real.sum(), (real & (row == 1)).sum(), int(rule.taken), path)
    counters[ROWS_SAVED] += (real.sum() - runs.sum()) * layers_ahead
    finite = risk[reached & risk.isfinite()]
    mine[0] += (reached & ~stays).sum() * (rule.taken[0] != OBSERVING)
    mine[1] += reached.sum() - len(finite)
    buckets = torch.bucketize(finite, torch.tensor(RISK_BUCKETS, device=finite.device))
    mine[2:PER_CHECKPOINT] += torch.bincount(buckets, minlength=len(RISK_BUCKETS) + 1)
    rule.risk_sums[index] += finite.sum()
    if rule.histogram is not None:
        critical = critical_threshold(risk, before, gamma, weight, level)[reached & (row == 0)]
        rule.histogram[index] += torch.bincount(histogram_bins(critical), minlength=HISTOGRAM_BINS).int()
    rows = torch.argsort(runs, descending=True, stable=True)
    return torch.where(stays, after, float("inf")), rows, runs.sum(dtype=torch.int32).view(1), runs
