"""Triton kernels for a GPU: an MLP that reads only the weights that its rows need.

Grids depend on shapes alone and a program with nothing to do returns at once, so a captured CUDA graph skips without a
branch on the host: nothing here, nor in any other module that imports triton, reads a device value back. Each wrapper has its torch twin beside it, and tests hold the two together, in Triton's
interpreter (TRITON_INTERPRET=1) and on a GPU.

Rows have levels. At level j an MLP runs the first `widths[j]` of its neurons and adapter j, a few neurons of its own and a
bias; level 0 runs all neurons and no adapter. Sorted by level, the rows that run some neuron of the MLP are the first ones,
and those of an adapter follow each other: `ends [levels]` says how many rows have each level or one before it. Rows after
the last of them do not run. A cascade's hard exit has one level, and its `ends` is `n_running`, the rows that stay.

Weights with planes have levels in bits a weight: level 0 is the MLP's own weights, and all others read all neurons, their `widths[j]` of
them at eight bits, the others at four. Every row of a step runs at the least level of its rows: weights are read once
for all of them, so that costs nothing, and is never worse for the answer.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .fused_kernel import Fused, fused
from .gate_kernels import levels_of, levels_twin, sorted_by_level
from .gate_parts import DeviceGate
from .mlp_weights import Weights
from .norm_kernels import Norm, gated_norm, normed
from .precision import COARSE, FINE, MOST_ROUNDED
from .step_counters import BY_LEVEL
from .tiled_kernels import Tiled, tiled

SETTINGS_FILE = Path(__file__).with_name("kernel_settings.json")

US = ("dense", "no rows", "half of the rows", "all rows")
AT_WIDTH, AT_BITS = "all at width {}", "all at {:g} bits"
_AT_LEVEL = re.compile(r"all at (?:width )?([\d.]+)")


@dataclasses.dataclass(frozen=True)
class MlpSettings:
    """The kernels for steps of some size, and the way such steps go through an MLP."""

    kernel: Fused | Tiled
    path: str | None  # "predicated", "conditional" or "dense", by their measured cost; None: nobody has measured
    us: Mapping[str, float] | None = None  # where that is dense: microseconds by case, as bench tune timed them
    gpu: str | None = None  # where they were timed, as its driver calls it

    def gains(self, running: float, tokens: int) -> float:
        """Microseconds that the kernels save an MLP of a step of so many tokens if this share of its rows runs.

        Between none and half of the rows the weights are read as for half, unless the step has no running row at all.
        """
        dense, none, half, whole = (self.us[case] for case in US)
        if running * tokens < 0.5:
            return dense - none
        return dense - half - max(0.0, 2 * running - 1) * (whole - half)

    def gains_narrowed(self, shares: Sequence[float], levels: Sequence[float], tokens: int) -> float:
        """The same with a gate, if these shares `[levels]` of the rows run at these widths or bits `[levels]`, the whole MLP's first.

        Weights are read for a step's widest row, products computed for each row. How much of the time either takes shows in
        how long mixed levels took: as long as whole rows alone, or the mean of all levels. Rows are taken to be independent.
        One token has one level, and levels in bits were those of all rows of a step already.
        """
        whole = self.us["all rows"]
        timed = {float(found[1]): us for case, us in self.us.items() if (found := _AT_LEVEL.match(case))}
        timed[levels[0]] = whole
        own = np.interp(levels, sorted(timed), [timed[level] for level in sorted(timed)])
        if tokens == 1 or any(case.endswith("bits") for case in self.us):
            return float(self.us["dense"] - own @ shares)
        none_wider = np.cumsum(np.asarray(shares)[::-1])[::-1].clip(0, 1) ** tokens  # [levels], a chance
        widest = own @ (none_wider - np.append(none_wider[1:], 0.0))
        per_row = np.clip((whole - self.us["mixed"]) / max(1e-9, whole - np.mean(list(timed.values()))), 0, 1)
        return float(self.us["dense"] - per_row * (own @ shares) - (1 - per_row) * widest)


@functools.cache
def _tuned(table: str) -> dict[str, dict[int, MlpSettings]]:
    """The rows of a table by shape and tokens: what was timed on a GPU such as this one, and the others' rows where nothing was."""
    gpus = json.loads(SETTINGS_FILE.read_text()) if SETTINGS_FILE.exists() else {}
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found: dict[str, dict[int, MlpSettings]] = {}
    for gpu in sorted(gpus, key=lambda gpu: gpu == here):  # its own last, so that they stay
        for shape, rows in gpus[gpu].get(table, {}).items():
            found.setdefault(shape, {}).update({int(size): _settings(row, gpu) for size, row in rows.items()})
    return found


def _settings(row: dict, gpu: str) -> MlpSettings:
    return MlpSettings(kernel_of(row), row["path"], row["us"] if row["path"] == "dense" else None, gpu)


def timed_elsewhere(policy: str, hidden_size: int, neurons: int, here: str) -> dict[str, list[int]]:
    """Of this shape, the tokens of the rows for a policy, "hard", "gates" or "rounded", that were timed on another GPU than
    this, by its name: nothing where nobody has timed the shape, as no cost decides then."""
    rows, found = _tuned(policy).get(f"{hidden_size}x{neurons}", {}), {}
    for tokens, settings in sorted(rows.items()):
        if settings.gpu != here:
            found.setdefault(settings.gpu, []).append(tokens)
    return found


def kernel_of(row: dict) -> Fused | Tiled:
    """The launch settings in a row of the table."""
    return Fused(*row["fused"]) if "fused" in row else Tiled(*map(_tuple, row["tiled"]))


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


# Tokens: settings of sizes from LARGE on are those of all steps larger than SMALL, and of no other.
SMALL, LARGE = 512, 2048
DEFAULTS = {32: MlpSettings(Fused(), None), 512: MlpSettings(Tiled(), None)}  # for what was not tuned
ROUNDED_DEFAULTS = {MOST_ROUNDED: MlpSettings(Fused(), None), 512: MlpSettings(Fused(), "dense")}


def mlp_settings(
    tokens: int, hidden_size: int, neurons: int, gated: bool = False, rounded: bool = False
) -> MlpSettings:
    """The settings for a step of so many tokens: tuned ones where the table has this shape and a size as large, else the
    defaults. `gated`: with a gate before each MLP; `rounded`: whose levels are in bits."""
    policy, large = "rounded" if rounded else "gates" if gated else "hard", tokens > SMALL
    table = _tuned(policy).get(f"{hidden_size}x{neurons}", {})
    table = {size: found for size, found in table.items() if (size >= LARGE) == large}
    if not table or (tokens > max(table) and not large):
        table = ROUNDED_DEFAULTS if rounded else DEFAULTS
    return table[min((size for size in table if tokens <= size), default=max(table))]


@dataclasses.dataclass
class Paths:
    """Which way a step goes through the MLPs that tokens skip, by its size alone.

    Up to `static_limit` tokens nothing may be read back. There the cost table says: kernels that skip (predicated), switches in
    the graph (conditional), or all rows (dense), each at most so much slower than stock where no row exits. Where the
    table cannot say, for a shape that is not in it or because the kernels do not carry the weights, steps are conditional from
    `conditional_from` tokens on, where an MLP takes long enough for what a node costs, and dense below. Above the limit, rows
    are gathered from `gather_from` tokens on, and all run below.
    """

    static_limit: int
    gather_from: int
    conditional_from: int
    shape: tuple[int, int] | None = None  # hidden size and neurons, None where the kernels do not carry the weights
    switches: bool = True  # False: without conditional nodes, such steps run all rows
    twice: bool = True  # whether captured steps can be recorded twice

    def second(self, tokens: int) -> MlpSettings | None:
        """The settings of a captured step that has a second recording, by the kernels (recordings.py); else None."""
        found = mlp_settings(tokens, *self.shape) if self.twice and self.shape and tokens <= self.static_limit else None
        return found if found is not None and found.us else None

    def __call__(self, tokens: int) -> str:
        """ "predicated", "conditional", "dense" or "gather"."""
        if tokens > self.static_limit:
            return "gather" if tokens >= self.gather_from else "dense"
        found = mlp_settings(tokens, *self.shape).path if self.shape else None
        if found is None:
            found = "conditional" if tokens >= self.conditional_from else "dense"
        return "dense" if found == "conditional" and not self.switches else found


def mlp(x: Tensor, weights: Weights, rows: Tensor, ends: Tensor, kernel: Fused | Tiled | None = None) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's level, `[tokens, hidden]`; zeros for rows that do not run.

    x `[tokens, hidden]`; rows `[tokens]`, int64, in the order of their levels; ends `[levels]`, int32, how many rows have
    each level or one before it. Weights that no row needs are not read. One launch where the settings of this size are
    `Fused`, four where `Tiled`.
    """
    kernel = _check(x, weights, kernel)
    assert rows.shape == (len(x),) and rows.is_contiguous()
    assert ends.shape == (weights.levels,) and ends.dtype == torch.int32 and ends.is_contiguous()
    if isinstance(kernel, Tiled):
        return tiled(x, weights, kernel, rows, ends)
    return fused(x, weights, kernel, "sorted", rows, ends)


def gated_mlp(
    hidden: Tensor,
    residual: Tensor,
    norm: Norm,
    weights: Weights,
    gate: DeviceGate,
    price: Tensor,
    slots: Tensor | None,
    counters: Tensor,
    kernel: Fused | Tiled | None = None,
    chosen: Tensor | None = None,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of hidden plus residual, both `[tokens, hidden]`, on which the gate decides, and each token's MLP at its level: output and
    that sum `[tokens, hidden]` and level `[tokens]`, int32.

    The arguments from the gate on are those of `gate_kernels.levels_of`. Two launches, the norm's and the MLP's, where the settings of
    this size are `Fused`, six where `Tiled`.
    """
    kernel = _check(hidden, weights, kernel, gated=True)
    if isinstance(kernel, Tiled):
        x, summed = normed(hidden, residual, norm)
        level, rows, ends = levels_of(x, gate, price, slots, counters, chosen, least)
        return tiled(x, weights, kernel, rows, ends), summed, level
    assert gate.levels == weights.levels
    x, summed, level = gated_norm(hidden, residual, norm, gate, price, slots, chosen, least)
    counted = {"gate": gate, "price": price, "counters": counters, "chosen": chosen}
    return fused(x, weights, kernel, "given", level=level, **counted), summed, level


def narrowed_mlp(x: Tensor, weights: Weights, level: Tensor, kernel: Fused | Tiled | None = None) -> Tensor:
    """The MLP at levels `[tokens]`, int32, that a gate before it decided, `[tokens, hidden]`."""
    kernel = _check(x, weights, kernel, gated=True)
    assert level.shape == (len(x),) and level.dtype == torch.int32
    if isinstance(kernel, Tiled):
        rows, ends = sorted_by_level(level, weights.levels)
        return tiled(x, weights, kernel, rows, ends)
    return fused(x, weights, kernel, "given", level=level)


def _check(x: Tensor, weights: Weights, kernel: Fused | Tiled | None, gated: bool = False) -> Fused | Tiled:
    (tokens, hidden_size), rounded = x.shape, weights.planes is not None
    assert hidden_size == len(weights.down) and x.is_contiguous() and x.dtype == weights.down.dtype
    kernel = kernel or mlp_settings(tokens, hidden_size, weights.neurons, gated, rounded).kernel
    assert not (rounded and isinstance(kernel, Tiled)), kernel
    return kernel


# ---------------------------------------------------------------- parts of dense MLPs


@triton.jit
def _silu_mul_kernel(gate_up, act, rows, n_running, neurons, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(neurons, BLOCK)
    i = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row, read = i.to(tl.int64), column < neurons
    if HAS_ROWS:
        row = tl.load(rows + i)
        read = read & (i < tl.load(n_running))
    at = gate_up + row * 2 * neurons + column
    gate = tl.load(at, mask=read, other=0.0).to(tl.float32)
    up = tl.load(at + neurons, mask=read, other=0.0).to(tl.float32)
    out = (gate / (1 + tl.exp(-gate)) * up).to(act.dtype.element_ty)  # 0 where a row does not run
    tl.store(act + row * neurons + column, out, mask=column < neurons)


def silu_mul(gate_up: Tensor, rows: Tensor | None = None, n_running: Tensor | None = None, block: int = 1024) -> Tensor:
    """silu(gate) · up, `[tokens, neurons]`, of their products side by side, `[tokens, 2 · neurons]`; where rows `[tokens]`,
    int64, and n_running `[1]`, int32, are given, zeros for the rows after the first n_running. One launch."""
    tokens, neurons = len(gate_up), gate_up.shape[1] // 2
    assert gate_up.is_contiguous() and (rows is None) == (n_running is None)
    assert rows is None or (rows.shape == (tokens,) and rows.is_contiguous() and n_running.dtype == torch.int32)
    act = gate_up.new_empty(tokens, neurons)
    _silu_mul_kernel[(tokens * triton.cdiv(neurons, block),)](
        gate_up, act, act if rows is None else rows, act if n_running is None else n_running, neurons, rows is not None, block,
    )  # fmt: skip
    return act


def silu_mul_twin(gate_up: Tensor, rows: Tensor | None = None, n_running: Tensor | None = None) -> Tensor:
    """`silu_mul` in torch."""
    gate, up = gate_up.float().chunk(2, 1)
    act = F.silu(gate) * up
    if rows is not None:
        act[rows[int(n_running) :]] = 0
    return act.to(gate_up.dtype)


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


@triton.jit
def _place_kernel(part, out, rows, n_running, hidden_size, GATHERED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden_size
    row = tl.load(rows + i)
    source = i.to(tl.int64) if GATHERED else row
    runs = i < tl.load(n_running)
    values = tl.load(part + source * hidden_size + column, mask=inside & runs, other=0.0)
    tl.store(out + row * hidden_size + column, values, mask=inside)


def place(part: Tensor, rows: Tensor, n_running: Tensor, out: Tensor, gathered: bool) -> Tensor:
    """Fill an MLP's output `[tokens, hidden]`: the running rows from `part`, zeros for the rows after the first n_running.

    `gathered`: row i of part `[at least n_running, hidden]` is that of token `rows[i]`; else part is `[tokens, hidden]`.
    """
    tokens, hidden_size = out.shape
    assert part.is_contiguous() and out.is_contiguous() and part.dtype == out.dtype and rows.shape == (tokens,)
    assert part.shape[1] == hidden_size and (gathered or len(part) == tokens)
    grid = (tokens, triton.cdiv(hidden_size, 1024))
    _place_kernel[grid](part, out, rows, n_running, hidden_size, gathered, 1024)
    return out


def mlp_twin(x: Tensor, weights: Weights, level: Tensor) -> Tensor:
    """The MLP at levels `[tokens]` in torch, in float32: every neuron of every row, masked; level `levels` does not run."""
    neurons, adapters, rank = weights.neurons, weights.adapters, weights.rank
    own, adapter = F.linear(x.float(), weights.gate_up.float()).split([2 * neurons, 2 * adapters], 1)
    (gate, up), (adapter_gate, adapter_up) = own.chunk(2, 1), adapter.chunk(2, 1)
    inner = torch.cat([F.silu(gate) * up, F.silu(adapter_gate) * adapter_up], 1).to(x.dtype)
    place = torch.arange(neurons + adapters, device=x.device)
    widths = torch.tensor([*weights.widths, 0], device=x.device)[level.long()]  # [tokens]
    runs = place < widths[:, None]  # [tokens, neurons + adapters]
    out_of = torch.zeros(len(x), len(weights.down), device=x.device)
    if rank:
        runs = torch.where(place < neurons, runs, (place - neurons) // rank + 1 == level[:, None])
        adapted = (level > 0) & (level < weights.levels)
        out_of[adapted] = weights.bias.float()[level[adapted].long() - 1]
    out = F.linear(inner.float().where(runs, 0.0), weights.down.float()) + out_of
    return out.to(x.dtype)


def rounded_twin(x: Tensor, weights: Weights, level: Tensor) -> Tensor:
    """The MLP of weights with planes at levels `[tokens]` in torch, in float32; level `levels` does not run."""
    level = led_twin(level, weights.levels)
    runs = level < weights.levels  # [tokens]
    if not runs.any() or level.min() == 0:
        return mlp_twin(x, weights, level)
    place = torch.arange(weights.neurons, device=x.device)
    fine = place < weights.widths[int(level.min())]  # [neurons]
    (fine_in, fine_out), (coarse_in, coarse_out) = (
        [own.values(bits) for own in weights.planes] for bits in (FINE, COARSE)
    )
    gate, up = F.linear(x.float(), torch.where(torch.cat([fine, fine])[:, None], fine_in, coarse_in)).chunk(2, 1)
    inner = (F.silu(gate) * up).to(x.dtype).float()
    return F.linear(inner.where(runs[:, None], 0.0), torch.where(fine, fine_out, coarse_out)).to(x.dtype)


def led_twin(level: Tensor, levels: int) -> Tensor:
    """The least of a step's levels `[tokens]` for all tokens but padding, which has level `levels`."""
    return torch.where(level < levels, level.min(), level)


def rounded_levels_twin(
    x: Tensor, gate: DeviceGate, price: Tensor, slots: Tensor | None, counters: Tensor, *rest: Tensor | None
) -> Tensor:
    """`levels_twin`, whose arguments these are, for levels in bits: the least one for all tokens, and counted as such."""
    own = levels_twin(x, gate, price, slots, counters, *rest)
    level = led_twin(own, gate.levels)
    led, wanted = (torch.bincount(each, minlength=gate.levels + 1)[: gate.levels] for each in (level, own))
    counters[BY_LEVEL:] += gate.group * (led - wanted)
    return level
