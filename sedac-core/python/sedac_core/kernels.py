"""Triton kernels for a GPU: a checkpoint's decision, and an MLP that reads only the weights its running rows need.

The only module that imports triton. Grids depend on shapes alone and a program with nothing to do returns at once, so
a captured CUDA graph skips without a branch on the host: nothing here reads a device value back. Each wrapper has its
torch twin beside it, and tests hold the two together, in Triton's interpreter (TRITON_INTERPRET=1) and on a GPU.

Rows and widths: `rows [tokens]` lists the tokens, running ones first; `n_running [blocks]` says how many of them run
each block of an MLP's neurons, never rising from one block to the next. A hard exit has one block, the whole MLP.
"""

import dataclasses
import functools
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .cascade import critical_threshold, margin_step
from .probe import LREProbe

SETTINGS_FILE = Path(__file__).with_name("kernel_settings.json")

# The bins of src/histogram.rs: the upper bits of a float32, from 2^-24 on, 128 an octave; infinity has the last one.
HISTOGRAM_BINS = 48 * 128 + 1
_BIN_SHIFT, _BIN_FIRST = 16, (127 - 24) << 7

# Where a checkpoint's kernel counts, int64: forward steps, tokens, MLP rows saved, then two for each checkpoint.
STEPS, TOKENS, ROWS_SAVED, BY_CHECKPOINT = 0, 1, 2, 3


# ---------------------------------------------------------------- a checkpoint


@triton.jit(do_not_specialize=["tokens", "span"])
def _project_kernel(
    hidden, residual, weight, partial,
    tokens, span, hidden_size: tl.constexpr, rank: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split] = (hidden + residual) · weightᵀ over one span of the hidden size, `[splits, tokens, RANK]`."""
    split = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANK)
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, span, BLOCK_K):
        k = split * span + start + tl.arange(0, BLOCK_K)
        inside = (token < tokens)[:, None] & (k < hidden_size)[None, :]
        at = token.to(tl.int64)[:, None] * hidden_size + k[None, :]
        h = tl.load(hidden + at, mask=inside, other=0.0)
        stream = h.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        stream = stream.to(h.dtype).to(tl.float32)  # the residual stream has the model's dtype
        known = (r < rank)[:, None] & (k < hidden_size)[None, :]
        w = tl.load(weight + r[:, None] * hidden_size + k[None, :], mask=known, other=0.0)
        acc += tl.dot(stream, tl.trans(w), input_precision="ieee")
    at = (split * tokens + token.to(tl.int64))[:, None] * RANK + r[None, :]
    tl.store(partial + at, acc, mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens", "layers_ahead", "splits"])
def _decide_kernel(
    partial, bias, norm_weight, norm_bias, head_weight, head_bias,
    threshold, rule, weight, taken, margin_before, slots,
    margin, rows, n_running, counters, histogram,
    tokens, layers_ahead, splits, index: tl.constexpr, eps: tl.constexpr, rank: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_SLOTS: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """One program: risk, margin, exit and compaction of all tokens, a block of them at a time."""
    gamma, level = tl.load(rule), tl.load(rule + 1)
    t, w, watching = tl.load(threshold), tl.load(weight), tl.load(taken) == 0
    r = tl.arange(0, RANK)
    known = r < rank
    b = tl.load(bias + r, mask=known, other=0.0)
    nw = tl.load(norm_weight + r, mask=known, other=0.0)
    nb = tl.load(norm_bias + r, mask=known, other=0.0)
    hw = tl.load(head_weight + r, mask=known, other=0.0)
    hb = tl.load(head_bias)
    running_before, others_before = 0, 0
    seen, exited, odd, left = 0, 0, 0, 0
    for start in range(0, tokens, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        inside = token < tokens
        z = tl.zeros((BLOCK_M, RANK), tl.float32) + b[None, :]
        for split in range(splits):
            at = (split * tokens + token.to(tl.int64))[:, None] * RANK + r[None, :]
            z += tl.load(partial + at, mask=inside[:, None], other=0.0)
        centred = tl.where(known[None, :], z - (tl.sum(z, 1) / rank)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / rank + eps)
        normed = centred * scale[:, None] * nw[None, :] + nb[None, :]
        y = tl.sum(normed * hw[None, :], 1) + hb
        e = tl.exp(y)
        small = e * (1 - e * (0.5 - e * (0.33333334 - 0.25 * e)))  # log(1 + e), where that would round e away
        risk = tl.where(y > 20, y, tl.where(e < 0.01, small, tl.log(1 + e)))

        real = inside
        if HAS_SLOTS:  # padding has no slot in the KV cache
            real = inside & (tl.load(slots + token, mask=inside, other=-1) >= 0)
        before = tl.zeros((BLOCK_M,), tl.float32)
        if index > 0:
            before = tl.load(margin_before + token, mask=inside, other=0.0)
        reached = real & (before < float("inf"))
        q = tl.div_rn(risk, t + tl.zeros_like(risk))
        usable = (risk >= 0) & (q < float("inf"))
        gain = tl.where(usable, tl.div_rn((1 - level) - level * q, 1 + q), -level)
        after = gamma * before + w * gain
        stays = reached & ~(after > 0)
        tl.store(margin + token, tl.where(stays, after, float("inf")), mask=inside)

        runs = stays | (real & watching)
        place = running_before + tl.cumsum(runs.to(tl.int32), 0) - 1
        other = inside & ~runs
        back = tokens - 1 - (others_before + tl.cumsum(other.to(tl.int32), 0) - 1)
        tl.store(rows + tl.where(runs, place, back), token.to(tl.int64), mask=inside)
        running_before += tl.sum(runs.to(tl.int32), 0)
        others_before += tl.sum(other.to(tl.int32), 0)
        seen += tl.sum(real.to(tl.int32), 0)
        left += tl.sum(stays.to(tl.int32), 0)
        exited += tl.sum((reached & ~stays).to(tl.int32), 0)
        odd += tl.sum((real & ~(tl.abs(risk) < float("inf"))).to(tl.int32), 0)
        if ADAPTIVE:
            behind = -gamma * before / w
            room = 1 - level - behind
            critical = tl.where(room > 0, risk * (level + behind) / room, float("inf"))
            critical = tl.where((risk >= 0) & (critical >= 0), critical, float("inf"))
            bits = critical.to(tl.int32, bitcast=True) >> 16
            column = tl.minimum(tl.maximum(bits - 13184, 0), 6143)  # _BIN_SHIFT, _BIN_FIRST, bins - 2
            column = tl.where(critical < float("inf"), column, 6144)
            tl.atomic_add(histogram + column, 1, mask=reached)
    tl.store(n_running, running_before)
    if index == 0:
        tl.store(counters, tl.load(counters) + tl.where(seen > 0, 1, 0))
        tl.store(counters + 1, tl.load(counters + 1) + seen)
    tl.store(counters + 2, tl.load(counters + 2) + (seen - running_before).to(tl.int64) * layers_ahead)
    if not watching:
        tl.store(counters + 3 + 2 * index, tl.load(counters + 3 + 2 * index) + exited)
    tl.store(counters + 4 + 2 * index, tl.load(counters + 4 + 2 * index) + odd)


@dataclasses.dataclass
class Rule:
    """The exit rule as a checkpoint's kernel reads it: device buffers, all of which may change under a captured graph."""

    thresholds: Tensor  # [checkpoints], float32
    weights: Tensor  # [checkpoints], float32
    gamma_level: Tensor  # [2], float32
    taken: Tensor  # [1], int32: 0 decides exits without taking them
    counters: Tensor  # [3 + 2 · checkpoints], int64
    histogram: Tensor | None  # [checkpoints, HISTOGRAM_BINS], int32, of critical thresholds; None if nobody reads it

    @classmethod
    def make(cls, thresholds: Tensor, weights, gamma: float, level: float, adaptive: bool) -> "Rule":
        """Fresh counters beside thresholds that stay the caller's own buffer."""
        device, checkpoints = thresholds.device, len(thresholds)
        bins = torch.zeros(checkpoints, HISTOGRAM_BINS, dtype=torch.int32, device=device) if adaptive else None
        return cls(
            thresholds,
            torch.tensor(weights, dtype=torch.float32, device=device),
            torch.tensor([gamma, level], dtype=torch.float32, device=device),
            torch.ones(1, dtype=torch.int32, device=device),
            torch.zeros(BY_CHECKPOINT + 2 * checkpoints, dtype=torch.int64, device=device),
            bins,
        )


def checkpoint(
    probe: LREProbe,
    hidden: Tensor,
    residual: Tensor,
    margin: Tensor | None,
    slots: Tensor | None,
    rule: Rule,
    index: int,
    layers_ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checkpoint `index` decides for each token; returns margin `[tokens]`, rows `[tokens]` and n_running `[1]`.

    hidden, residual `[tokens, hidden]` in the model's dtype, their sum being the residual stream; margin `[tokens]`,
    float32, as the checkpoint before left it (None at the first); slots `[tokens]`, int64, negative for padding (None:
    no padding). An exit here saves `layers_ahead` MLP rows until the next checkpoint, for the counters. Two launches.
    """
    tokens, hidden_size = hidden.shape
    assert residual.shape == hidden.shape and hidden.is_contiguous() and residual.is_contiguous()
    assert hidden.dtype == residual.dtype and probe.hidden_size == hidden_size
    assert (margin is None) == (index == 0) and (slots is None or slots.shape == (tokens,))
    rank = probe.rank
    padded = max(16, triton.next_power_of_2(rank))
    block_m = 16 if tokens <= 512 else 64
    splits = max(1, min(hidden_size // 128, 128 // triton.cdiv(tokens, block_m)))
    span = triton.cdiv(triton.cdiv(hidden_size, splits), 64) * 64
    splits = triton.cdiv(hidden_size, span)
    device = hidden.device
    partial = torch.empty(splits, tokens, padded, dtype=torch.float32, device=device)
    after = torch.empty(tokens, dtype=torch.float32, device=device)
    rows = torch.empty(tokens, dtype=torch.int64, device=device)
    n_running = torch.empty(1, dtype=torch.int32, device=device)
    _project_kernel[(triton.cdiv(tokens, block_m), splits)](
        hidden, residual, probe.proj.weight, partial,
        tokens, span, hidden_size, rank, padded, block_m, 64,
    )  # fmt: skip
    _decide_kernel[(1,)](
        partial, probe.proj.bias, probe.norm.weight, probe.norm.bias, probe.head.weight, probe.head.bias,
        rule.thresholds[index:], rule.gamma_level, rule.weights[index:], rule.taken,
        after if margin is None else margin, after if slots is None else slots,
        after, rows, n_running, rule.counters, after if rule.histogram is None else rule.histogram[index],
        tokens, layers_ahead, splits, index, probe.norm.eps, rank, padded,
        min(64, max(16, triton.next_power_of_2(tokens))), slots is not None, rule.histogram is not None,
    )  # fmt: skip
    return after, rows, n_running


def checkpoint_twin(
    probe: LREProbe,
    hidden: Tensor,
    residual: Tensor,
    margin: Tensor | None,
    slots: Tensor | None,
    rule: Rule,
    index: int,
    layers_ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`checkpoint` in torch; the tokens that do not run may stand in another order."""
    risk = probe(hidden + residual)
    gamma, level = rule.gamma_level
    threshold, weight = rule.thresholds[index], rule.weights[index]
    real = torch.ones_like(risk, dtype=torch.bool) if slots is None else slots >= 0
    before = torch.zeros_like(risk) if margin is None else margin
    reached = real & (before < float("inf"))
    after = margin_step(risk, threshold, before, gamma, weight, level)
    stays = reached & ~(after > 0)
    runs = stays | (real & (rule.taken == 0))
    counters = rule.counters
    if index == 0:
        counters[STEPS] += real.any()
        counters[TOKENS] += real.sum()
    counters[ROWS_SAVED] += (real.sum() - runs.sum()) * layers_ahead
    counters[BY_CHECKPOINT + 2 * index] += (reached & ~stays).sum() * rule.taken[0]
    counters[BY_CHECKPOINT + 2 * index + 1] += (real & ~risk.isfinite()).sum()
    if rule.histogram is not None:
        critical = critical_threshold(risk, before, gamma, weight, level)[reached]
        rule.histogram[index] += torch.bincount(histogram_bins(critical), minlength=HISTOGRAM_BINS).int()
    rows = torch.argsort(runs, descending=True, stable=True)
    return torch.where(stays, after, float("inf")), rows, runs.sum(dtype=torch.int32).view(1)


def histogram_bins(critical: Tensor) -> Tensor:
    """The bin `[n]`, int64, of each critical threshold `[n]`; what no threshold lets exit has the last one."""
    column = (critical.view(torch.int32) >> _BIN_SHIFT) - _BIN_FIRST
    column = column.clamp(0, HISTOGRAM_BINS - 2).long()
    return torch.where((critical >= 0) & (critical < float("inf")), column, HISTOGRAM_BINS - 1)


@functools.cache
def bin_centres() -> Tensor:
    """A value inside each bin, `[HISTOGRAM_BINS]`, float32: what the host's controller counts in its place."""
    bits = (torch.arange(HISTOGRAM_BINS - 1, dtype=torch.int32) + _BIN_FIRST) << _BIN_SHIFT
    centres = (bits + (1 << (_BIN_SHIFT - 1))).view(torch.float32)
    return torch.cat([centres, torch.tensor([float("inf")])])


# ---------------------------------------------------------------- the MLP, in one launch for few tokens


@triton.jit(do_not_specialize=["tokens", "programs", "splits"])
def _fused_kernel(
    x, gate_up, down, act, partial, out, rows, n_running, sync,
    tokens, hidden_size, neurons, block_neurons, span, programs, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DOWN_N: tl.constexpr, DOWN_K: tl.constexpr,
):  # fmt: skip
    """All of an MLP for up to BLOCK_M tokens: programs that all run at once share out the neurons, wait for each other,
    and share out the outputs. Weights are the left operand, so that few tokens make a narrow right one."""
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK_M)
    row = tl.load(rows + i, mask=i < tokens, other=0)
    running = tl.load(n_running)
    tiles = tl.cdiv(hidden_size, DOWN_N)
    if running == 0:
        for tile in range(program, tiles, programs):
            column = tile * DOWN_N + tl.arange(0, DOWN_N)
            zeros = tl.zeros((DOWN_N, BLOCK_M), out.dtype.element_ty)
            tl.store(out + row[None, :] * hidden_size + column[:, None], zeros, mask=(i < tokens)[None, :])
        return

    k = tl.arange(0, BLOCK_K)
    for tile in range(program, tl.cdiv(neurons, BLOCK_N), programs):
        here = tl.load(n_running + tile * BLOCK_N // block_neurons)
        neuron = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if here > 0:
            x_at = x + row[None, :] * hidden_size + k[:, None]
            gate_at = gate_up + neuron.to(tl.int64)[:, None] * hidden_size + k[None, :]
            up_at = gate_at + neurons.to(tl.int64) * hidden_size
            for _ in range(0, hidden_size, BLOCK_K):
                a = tl.load(x_at, mask=(i < here)[None, :], other=0.0)
                g = tl.load(gate_at, eviction_policy="evict_first")
                u = tl.load(up_at, eviction_policy="evict_first")
                gate = tl.dot(g, a, gate, input_precision="ieee")
                up = tl.dot(u, a, up, input_precision="ieee")
                x_at += BLOCK_K
                gate_at += BLOCK_K
                up_at += BLOCK_K
        product = (gate / (1 + tl.exp(-gate)) * up).to(act.dtype.element_ty)  # 0 where a row does not run
        tl.store(act + i[None, :] * neurons + neuron[:, None], product)

    _wait_for_all(sync, programs)

    k = tl.arange(0, DOWN_K)
    for unit in range(program, tiles * splits, programs):
        tile, split = unit // splits, unit % splits
        column = tile * DOWN_N + tl.arange(0, DOWN_N)
        first = split * span
        act_at = act + i[None, :] * neurons + (first + k)[:, None]
        down_at = down + column.to(tl.int64)[:, None] * neurons + (first + k)[None, :]
        acc = tl.zeros((DOWN_N, BLOCK_M), tl.float32)
        end = tl.minimum(first + span, neurons)
        if block_neurons < neurons:
            while (end > first) & (tl.load(n_running + (end - 1) // block_neurons) == 0):
                end = tl.maximum(first, (end - 1) // block_neurons * block_neurons)
        for _ in range(first, end, DOWN_K):
            a = tl.load(act_at)
            w = tl.load(down_at, eviction_policy="evict_first")
            acc = tl.dot(w, a, acc, input_precision="ieee")
            act_at += DOWN_K
            down_at += DOWN_K
        out_at = out + row[None, :] * hidden_size + column[:, None]
        if splits > 1:  # the last program to bring its share adds them up, in order
            at = partial + i[None, :] * hidden_size + column[:, None]
            tl.store(at + split * BLOCK_M * hidden_size, acc)
            tl.debug_barrier()
            if tl.atomic_add(sync + 2 + tile, 1, sem="acq_rel") == splits - 1:
                tl.debug_barrier()
                total = tl.zeros((DOWN_N, BLOCK_M), tl.float32)
                for s in range(splits):
                    total += tl.load(at + s * BLOCK_M * hidden_size, cache_modifier=".cg")
                tl.store(out_at, total.to(out.dtype.element_ty), mask=(i < tokens)[None, :])
                tl.atomic_xchg(sync + 2 + tile, 0, sem="relaxed")
        else:
            tl.store(out_at, acc.to(out.dtype.element_ty), mask=(i < tokens)[None, :])


@triton.jit
def _wait_for_all(sync, programs):
    """A barrier for all programs of a cooperative launch: the last to arrive opens the gate, a number that all others
    watch. It leaves the count at zero, so the next launch finds it ready."""
    gate = tl.atomic_add(sync + 1, 0, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(sync, 1, sem="acq_rel") == programs - 1:
        tl.atomic_xchg(sync, 0, sem="relaxed")
        tl.atomic_add(sync + 1, 1, sem="release")
    else:
        while tl.atomic_add(sync + 1, 0, sem="acquire") == gate:
            pass
    tl.debug_barrier()


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
    """Counts and gate of the fused kernel's barriers, `[2 + tiles]`; zeros between launches. Launches on one device must
    follow each other on one stream, as vLLM's do."""
    return torch.zeros(2 + 1024, dtype=torch.int32, device=device)


def fused_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, rows: Tensor, n_running: Tensor, block_neurons: int, s: Fused
) -> Tensor:
    (tokens, hidden_size), neurons, device = x.shape, down.shape[1], x.device
    block_m = max(16, triton.next_power_of_2(tokens))
    assert hidden_size % s.block_k == 0 == hidden_size % s.down_n and hidden_size // s.down_n <= 1024
    assert block_neurons % s.block_n == 0 == block_neurons % s.down_k
    act = torch.empty(block_m, neurons, dtype=x.dtype, device=device)
    span = triton.cdiv(triton.cdiv(neurons, s.splits), s.down_k) * s.down_k
    splits = triton.cdiv(neurons, span)
    partial = torch.empty(splits, block_m, hidden_size, dtype=torch.float32, device=device)
    out = torch.empty_like(x)
    # The interpreter runs one program after the other: none could wait for another.
    programs = s.programs_per_sm * _processors(device) if device.type == "cuda" else 1
    _fused_kernel[(programs,)](
        x, gate_up, down, act, partial, out, rows, n_running, _sync(device),
        tokens, hidden_size, neurons, block_neurons, span, programs, splits,
        block_m, s.block_n, s.block_k, s.down_n, s.down_k,
        num_warps=s.warps, num_stages=s.stages, launch_cooperative_grid=True,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- the MLP, tiled for more tokens


@triton.jit(do_not_specialize=["tokens"])
def _gather_kernel(x, gathered, rows, n_running, hidden_size, BLOCK: tl.constexpr):
    """gathered[i] = x[rows[i]] for the running rows."""
    i = tl.program_id(0)
    if i >= tl.load(n_running):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + tl.load(rows + i) * hidden_size + column, mask=column < hidden_size)
    tl.store(gathered + i.to(tl.int64) * hidden_size + column, values, mask=column < hidden_size)


@triton.jit
def _gate_up_kernel(
    x, gate_up, act, n_running, hidden_size, neurons, block_neurons,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) · up over tensor descriptors of the gathered rows; zeros where a running row lacks a block."""
    m, n = tl.program_id(0), tl.program_id(1)
    if m * BLOCK_M >= tl.load(n_running):
        return
    here = tl.load(n_running + n * BLOCK_N // block_neurons)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if m * BLOCK_M < here:
        for k in range(0, hidden_size, BLOCK_K):
            a = x.load([m * BLOCK_M, k])
            g = gate_up.load([n * BLOCK_N, k])
            u = gate_up.load([neurons + n * BLOCK_N, k])
            gate = tl.dot(a, tl.trans(g), gate, input_precision="ieee")
            up = tl.dot(a, tl.trans(u), up, input_precision="ieee")
    product = gate / (1 + tl.exp(-gate)) * up
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    act.store([m * BLOCK_M, n * BLOCK_N], tl.where((i < here)[:, None], product, 0.0).to(act.dtype))


@triton.jit(do_not_specialize=["tokens"])
def _down_kernel(
    act, down, partial, n_running, tokens, hidden_size, neurons, block_neurons, span,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split] = one span of neurons' share of the output, `[splits, tokens, hidden]` in the order of the rows."""
    m, n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if m * BLOCK_M >= tl.load(n_running):
        return
    first = split * span
    end = tl.minimum(first + span, neurons)
    if block_neurons < neurons:  # blocks that none of these rows runs are zeros
        while (end > first) & (tl.load(n_running + (end - 1) // block_neurons) <= m * BLOCK_M):
            end = tl.maximum(first, (end - 1) // block_neurons * block_neurons)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, end, BLOCK_K):
        acc = tl.dot(act.load([m * BLOCK_M, k]), tl.trans(down.load([n * BLOCK_N, k])), acc, input_precision="ieee")
    i = m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (split * tokens + i.to(tl.int64))[:, None] * hidden_size + column[None, :]
    tl.store(partial + at, acc, mask=(i < tokens)[:, None] & (column < hidden_size)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _reduce_kernel(partial, out, rows, n_running, tokens, hidden_size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[rows[i]] = the sum of row i's splits, zeros for what does not run."""
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden_size
    acc = tl.zeros((BLOCK,), tl.float32)
    if i < tl.load(n_running):
        for split in tl.static_range(SPLITS):
            at = (split * tokens + i).to(tl.int64) * hidden_size + column
            acc += tl.load(partial + at, mask=inside, other=0.0)
    tl.store(out + tl.load(rows + i) * hidden_size + column, acc.to(out.dtype.element_ty), mask=inside)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """How the tiled kernels run: BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of each half, splits of the second."""

    gate_up: tuple[int, int, int, int, int] = (64, 64, 64, 4, 3)
    down: tuple[int, int, int, int, int] = (64, 64, 64, 4, 4)
    splits: int = 4


def tiled_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, rows: Tensor, n_running: Tensor, block_neurons: int, s: Tiled
) -> Tensor:
    tokens, hidden_size = x.shape
    gathered = torch.empty_like(x)
    _gather_kernel[(tokens, triton.cdiv(hidden_size, 1024))](x, gathered, rows, n_running, hidden_size, 1024)
    act = tiled_gate_up(gathered, gate_up, n_running, block_neurons, s)
    return tiled_down(act, down, rows, n_running, block_neurons, s)


def tiled_gate_up(x: Tensor, gate_up: Tensor, n_running: Tensor, block_neurons: int, s: Tiled) -> Tensor:
    """silu(gate) · up, `[tokens, neurons]`, for gathered rows `[tokens, hidden]`; undefined from row n_running[0] on."""
    (tokens, hidden_size), neurons = x.shape, len(gate_up) // 2
    block_m, block_n, block_k, warps, stages = s.gate_up
    assert block_neurons % block_n == 0
    act = torch.empty(tokens, neurons, dtype=x.dtype, device=x.device)
    _gate_up_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(neurons, block_n))](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(gate_up, [block_n, block_k]),
        TensorDescriptor.from_tensor(act, [block_m, block_n]),
        n_running, hidden_size, neurons, block_neurons, block_m, block_n, block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return act


def tiled_down(act: Tensor, down: Tensor, rows: Tensor, n_running: Tensor, block_neurons: int, s: Tiled) -> Tensor:
    """The output `[tokens, hidden]` of activations `[tokens, neurons]` that are in the order of `rows`."""
    (tokens, neurons), hidden_size = act.shape, len(down)
    block_m, block_n, block_k, warps, stages = s.down
    assert block_neurons % block_k == 0
    span = triton.cdiv(triton.cdiv(neurons, s.splits), block_k) * block_k
    splits = triton.cdiv(neurons, span)
    partial = torch.empty(splits, tokens, hidden_size, dtype=torch.float32, device=act.device)
    _down_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(hidden_size, block_n), splits)](
        TensorDescriptor.from_tensor(act, [block_m, block_k]),
        TensorDescriptor.from_tensor(down, [block_n, block_k]),
        partial, n_running, tokens, hidden_size, neurons, block_neurons, span,
        block_m, block_n, block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = torch.empty(tokens, hidden_size, dtype=act.dtype, device=act.device)
    _reduce_kernel[(tokens, triton.cdiv(hidden_size, 1024))](
        partial, out, rows, n_running, tokens, hidden_size, splits, 1024
    )
    return out


# ---------------------------------------------------------------- the MLP


@dataclasses.dataclass(frozen=True)
class MlpSettings:
    """The kernels for steps of some size, and whether they keep up with the dense MLP when every row runs."""

    kernel: Fused | Tiled
    predicated: bool


@functools.cache
def _tuned() -> dict[str, dict[int, MlpSettings]]:
    table = json.loads(SETTINGS_FILE.read_text())["settings"] if SETTINGS_FILE.exists() else {}

    def settings(found: dict) -> MlpSettings:
        kernel = Fused(*found["fused"]) if "fused" in found else Tiled(*map(_tuple, found["tiled"]))
        return MlpSettings(kernel, found["predicated"])

    return {shape: {int(size): settings(found) for size, found in rows.items()} for shape, rows in table.items()}


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


DEFAULTS = {32: MlpSettings(Fused(), False), 512: MlpSettings(Tiled(), False)}  # for shapes that were not tuned


def mlp_settings(tokens: int, hidden_size: int, neurons: int) -> MlpSettings:
    """The settings for a step of so many tokens: tuned ones where this shape is in the table, else the defaults, which
    are not predicated: nobody has measured that they cost nothing."""
    table = _tuned().get(f"{hidden_size}x{neurons}", DEFAULTS)
    return table[min((size for size in table if tokens <= size), default=max(table))]


def mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows: Tensor,
    n_running: Tensor,
    block_neurons: int | None = None,
    kernel: Fused | Tiled | None = None,
) -> Tensor:
    """down(silu(gate(x)) · up(x)) for the running rows, `[tokens, hidden]`; zeros for the others.

    x `[tokens, hidden]`; gate_up `[2 · neurons, hidden]`, the gate's rows first; down `[hidden, neurons]`; rows
    `[tokens]`, int64; n_running `[blocks]`, int32, for blocks of `block_neurons` neurons (default: one block). A block of
    weights that no row needs is not read. One launch where the settings of this size are `Fused`, four where `Tiled`.
    """
    tokens, hidden_size = x.shape
    neurons = down.shape[1]
    block_neurons = block_neurons or neurons
    assert gate_up.shape == (2 * neurons, hidden_size) and down.shape == (hidden_size, neurons)
    assert x.is_contiguous() and gate_up.is_contiguous() and down.is_contiguous() and rows.is_contiguous()
    assert x.dtype == gate_up.dtype == down.dtype and rows.shape == (tokens,)
    assert n_running.shape == (triton.cdiv(neurons, block_neurons),) and n_running.dtype == torch.int32
    kernel = kernel or mlp_settings(tokens, hidden_size, neurons).kernel
    run = fused_mlp if isinstance(kernel, Fused) else tiled_mlp
    return run(x, gate_up, down, rows, n_running, block_neurons, kernel)


@triton.jit
def _zero_kernel(out, rows, n_running, hidden_size: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    if i < tl.load(n_running):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i)
    zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
    tl.store(out + row * hidden_size + column, zeros, mask=column < hidden_size)


def zero_exited(out: Tensor, rows: Tensor, n_running: Tensor) -> Tensor:
    """Set an MLP's output `[tokens, hidden]` to zero, in place, for the rows after the first n_running."""
    tokens, hidden_size = out.shape
    assert out.is_contiguous() and rows.shape == (tokens,)
    _zero_kernel[(tokens, triton.cdiv(hidden_size, 1024))](out, rows, n_running, hidden_size, 1024)
    return out


def mlp_twin(
    x: Tensor, gate_up: Tensor, down: Tensor, rows: Tensor, n_running: Tensor, block_neurons: int | None = None
) -> Tensor:
    """`mlp` in torch, in float32: every neuron of every row, masked."""
    neurons = down.shape[1]
    gate, up = F.linear(x.float(), gate_up.float()).chunk(2, dim=-1)
    place = torch.empty_like(rows)
    place[rows] = torch.arange(len(rows), device=rows.device)
    running = n_running.long().repeat_interleave(block_neurons or neurons)[:neurons]  # [neurons]
    act = (F.silu(gate) * up).to(x.dtype) * (place[:, None] < running[None, :])
    return F.linear(act.float(), down.float()).to(x.dtype)
