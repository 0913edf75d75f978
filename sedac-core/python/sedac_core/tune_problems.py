"""What `bench tune` times: the MLPs of a shape, with their inputs and the cases that they are timed in, and the settings to try."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import kernels, tiled_kernels
from .adapter import AdapterBank
from .gate_kernels import levels_of
from .gate_parts import DeviceGate
from .gates import BITS, Gate, GateShape
from .graph_times import captured, replay_us
from .kernels import AT_BITS, AT_WIDTH, Fused, Tiled, Weights
from .norm_kernels import Norm, gated_norm, normed, normed_twin
from .precision import GROUP, Planes
from .step_counters import new_counters

LAYERS = 24  # MLPs of a graph, about a window's
LARGE_LAYERS = 4  # of a graph of large steps, which take milliseconds each
# Tiles of either half to try at large sizes, the fastest of some more on an H100 (docs/LOG.md).
LARGE_TILES = (
    ((128, 128, 64, 8, 4), (128, 128, 64, 8, 3)),
    ((128, 256, 64, 8, 3), (256, 128, 64, 8, 3)),
)
SHARED_MEMORY, PROCESSORS = 220_000, 132  # of a Hopper GPU, to leave out what cannot run


def fused_candidates(tokens: int) -> list[Fused]:
    """One-launch settings to try, their splits still to be chosen."""
    if tokens > 64:
        return []
    found = []
    for block_n, block_k, down_n, down_k, (programs, warps, stages) in itertools.product(
        (32, 64), (64, 128), (32, 64, 128), (64, 128), ((1, 4, 4), (1, 8, 4), (2, 4, 3), (2, 4, 4), (3, 4, 3))
    ):
        option = Fused(block_n, block_k, down_n, down_k, 0, programs, warps, stages)
        if fits_fused(option, tokens):
            found.append(option)
    return found


def tiled_candidates(tokens: int) -> tuple[list[Tiled], list[Tiled]]:
    """Settings to try for each half of the tiled kernels."""
    if tokens < 64:
        return [], []
    tiles = itertools.product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5))
    tiles = [tile for tile in tiles if tile[0] <= tokens]
    first = [tile for tile in tiles if tile[2] == 64 and fits(tile, 2 * tile[1])]
    return [Tiled(gate_up=tile) for tile in first], [Tiled(down=tile) for tile in tiles if fits(tile, tile[1])]


def relatives(base: Fused | Tiled, tokens: int) -> list[Fused | Tiled]:
    """Settings to try with a gate before the MLP, given the ones that were found without."""
    if isinstance(base, Tiled):
        return [base]
    found = []
    for block_n, programs, stages in itertools.product((32, 64), (1, 2, 3), (3, 4)):
        option = dataclasses.replace(base, block_n=block_n, programs_per_sm=programs, stages=stages, splits=0)
        if fits_fused(option, tokens):
            found.append(option)
    return found


def large_candidates() -> list[Tiled]:
    """Settings to try for large steps."""
    return [Tiled(*halves, splits=1) for halves in itertools.product(*LARGE_TILES)]


def rounded_relatives(base: Fused, tokens: int) -> list[Fused]:
    """Settings to try with levels in bits, given the ones that were found without a gate."""
    # Of few tokens a column block smaller than all warps' rows would be read twice.
    down_n = base.down_n if tokens == 1 else max(64, base.down_n)
    across = {"block_n": 64, "down_n": down_n, "splits": 0}
    return [
        dataclasses.replace(base, **across, programs_per_sm=programs, warps=warps, stages=stages)
        for programs, warps, stages in ((2, 4, 3), (2, 4, 4), (1, 8, 3), (3, 4, 3))
    ]


def fits_fused(option: Fused, tokens: int) -> bool:
    """Whether a fused kernel's pipeline is deep enough to hide the memory's latency, and still fits into a processor."""
    block_m = max(16, triton.next_power_of_2(tokens))
    operands = max(option.block_k * (block_m + 2 * option.block_n), option.down_k * (block_m + option.down_n))
    inside = 80_000 < 2 * option.stages * operands * option.programs_per_sm <= SHARED_MEMORY
    return inside and 2 * option.block_n * block_m <= 4096 * option.warps


def fits(tile: tuple[int, ...], columns: int) -> bool:
    """Whether operands and accumulators of a tile that is so many columns wide fit into a processor."""
    block_m, _, block_k, warps, stages = tile
    return 2 * stages * block_k * (block_m + columns) <= SHARED_MEMORY and block_m * columns <= 4480 * warps


class Problem:
    """One shape's weights, several copies of them, inputs, and the cases that the predicated MLP is timed in."""

    def __init__(self, hidden: int, neurons: int, copies: int | None = None):
        self.hidden, self.neurons = hidden, neurons
        self.copies = copies or max(2, -(-(300 << 20) // (6 * hidden * neurons)))
        self.weights = [self.make() for _ in range(self.copies)]

    def make(self) -> Weights:
        return Weights(*self.plain())

    def plain(self) -> tuple[Tensor, Tensor]:
        """gate_up `[2 · neurons, hidden]` and down `[hidden, neurons]`."""
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        gate_up = torch.randn(2 * self.neurons, self.hidden, **options) * 0.02
        return gate_up, torch.randn(self.hidden, self.neurons, **options) * 0.02

    def start(self, tokens: int) -> None:
        """Inputs of so many tokens, all rows running."""
        self.layers = LAYERS if tokens <= kernels.SMALL else LARGE_LAYERS
        self.x = torch.randn(tokens, self.hidden, dtype=torch.bfloat16, device="cuda")
        self.rows = torch.randperm(tokens, device="cuda")
        self.ends = torch.full((self.weights[0].levels,), tokens, dtype=torch.int32, device="cuda")

    def candidates(self, tokens: int) -> list[Fused | Tiled]:
        """One-launch settings to try, and the tiled ones whose halves are the fastest."""
        found: list[Fused | Tiled] = [
            option
            for option in with_splits(fused_candidates(tokens), self.hidden)
            if self.hidden % max(option.block_k, option.down_n) == 0
            and self.neurons % max(option.block_n, option.down_k) == 0
        ]
        first, second = tiled_candidates(tokens)
        if first:
            act = torch.randn(tokens, self.neurons, dtype=self.x.dtype, device="cuda")
            one = self.fastest(
                [k for k in first if self.neurons % k.gate_up[1] == 0 == self.hidden % k.gate_up[2]],
                lambda k: lambda i: tiled_kernels.tiled_gate_up(self.x, self.weights[i], self.ends, k),
            )
            splits = itertools.product([k for k in second if self.neurons % k.down[2] == 0], (1, 2, 4, 8))
            two = self.fastest(
                [dataclasses.replace(k, splits=number) for k, number in splits],
                lambda k: lambda i: tiled_kernels.tiled_down(act, self.weights[i], self.rows, self.ends, k),
            )
            found.append(Tiled(one.gate_up, two.down, two.splits))
        return found

    def fastest(self, options: list, once: Callable) -> Any:
        return min(options, key=lambda kernel: self.time_us(once(kernel)))

    def time_us(self, once: Callable[[int], Any], repeats: int = 3) -> float:
        """Microseconds of `once(i)`, the median over replays of a graph that runs it on each copy of the weights."""
        try:
            once(0)
        except (triton.OutOfResources, RuntimeError):  # too large a tile for this chip
            return float("inf")
        torch.cuda.synchronize()
        calls = -(-self.layers // self.copies) * self.copies
        graph = captured(lambda i: once(i % self.copies), calls)
        return statistics.median([replay_us(graph, calls) for _ in range(repeats + 1)][1:])

    def run(self, kernel: Fused | Tiled) -> Callable[[int], Any]:
        return lambda i: kernels.mlp(self.x, self.weights[i], self.rows, self.ends, kernel)

    def errors(self, kernel: Fused | Tiled) -> dict[str, float]:
        """How far the output is from the torch twin's in each case, relative in the norm."""
        found = {}
        for name in self.cases():
            out, wanted = (each.float() for each in self.beside_twin(kernel))
            found[name] = ((out - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
        return found

    def beside_twin(self, kernel: Fused | Tiled) -> tuple[Tensor, Tensor]:
        """Outputs `[tokens, hidden]` of the kernel and of its twin."""
        level = (self.rows.argsort()[:, None] >= self.ends).sum(1)
        return self.run(kernel)(0), kernels.mlp_twin(self.x, self.weights[0], level)

    def dense(self, i: int, x: Tensor | None = None) -> Tensor:
        """The MLP as stock runs it: two cuBLAS products around one fused activation."""
        weights = self.weights[i]
        act = kernels.silu_mul((self.x if x is None else x) @ weights.gate_up[: 2 * self.neurons].T)
        return act @ weights.down[:, : self.neurons].T

    def cases(self) -> Iterator[str]:
        """Set up each case in turn, all rows whole first."""
        for name, share in (("all rows", 1.0), ("half of the rows", 0.5), ("no rows", 0.0)):
            self.ends.fill_(int(share * len(self.x)))
            yield name

    def limit(self, fastest: float, dense: float) -> float:
        """Microseconds that a setting may take with all rows whole to be looked at in the other cases."""
        return 1.01 * fastest

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """The cases whose times decide between settings."""
        return ("all rows",)

    def aside(self) -> dict[str, float]:
        """Other times worth knowing, microseconds by name."""
        return {}


class GatedProblem(Problem):
    """The same with the norm before the MLP and, in it, a gate, whose levels are forced by its bias or spread by its head."""

    twin = staticmethod(kernels.mlp_twin)

    @property
    def shape(self) -> GateShape:
        return GateShape(self.hidden, self.neurons, 2)

    def make(self) -> Weights:
        shape = self.shape
        bank = AdapterBank(self.hidden, shape.adapter_rank, len(shape.levels) - 1).to("cuda").requires_grad_(False)
        order = torch.arange(self.neurons, device="cuda")
        return Weights.narrowed(*self.plain(), order, bank, shape.widths)

    def start(self, tokens: int) -> None:
        super().start(tokens)
        shape = self.shape
        gate = Gate(self.hidden, len(shape.levels) - 1)
        self.gates = [  # the model's first one counts the step
            DeviceGate.make(gate, shape.gains()[0], 1, i == 0, self.weights[0].down) for i in range(self.copies)
        ]
        self.norm = Norm(torch.ones_like(self.x[0]), 1e-6)
        self.price = torch.tensor([0.0, -torch.inf], device="cuda")
        self.slots = torch.arange(tokens, device="cuda")
        self.chosen = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        self.counters = new_counters(len(shape.levels), self.x.device)

    def candidates(self, tokens: int) -> list[Fused | Tiled]:
        if tokens > kernels.SMALL:
            return large_candidates()
        base = kernels.mlp_settings(tokens, self.hidden, self.neurons).kernel
        options = relatives(base, tokens)
        return with_splits(options, self.hidden) if isinstance(base, Fused) else options

    def run(self, kernel: Fused | Tiled) -> Callable[[int], Any]:
        decides = (self.price, self.slots, self.counters, kernel, self.chosen)
        return lambda i: kernels.gated_mlp(self.x, self.x, self.norm, self.weights[i], self.gates[i], *decides)

    def beside_twin(self, kernel: Fused | Tiled) -> tuple[Tensor, Tensor]:
        out, _, level = self.run(kernel)(0)
        return out, self.twin(normed_twin(self.x, self.x, self.norm)[0], self.weights[0], level.long())

    def dense(self, i: int) -> Tensor:
        """As stock runs it, with the norm before it."""
        return super().dense(i, normed(self.x, self.x, self.norm)[0])

    def cases(self) -> Iterator[str]:
        """All rows at each level, then levels that differ from row to row, which those of one token do not."""
        for level, name in enumerate(self.at_levels):
            for gate in self.gates:
                gate.head.zero_()
                gate.head_bias.fill_(6.0)  # the greatest damage
                if level:
                    gate.head_bias[level - 1] = -14.0
            yield name
        if len(self.x) == 1:
            return
        for gate in self.gates:
            gate.head.copy_(torch.randn_like(gate.head))
            gate.head_bias.zero_()
        yield "mixed"

    def limit(self, fastest: float, dense: float) -> float:
        return max(1.01 * fastest, dense)

    @property
    def at_levels(self) -> tuple[str, ...]:
        """The cases of all rows at one level."""
        return ("all rows", *map(AT_WIDTH.format, self.shape.widths[1:]))

    @property
    def chosen_by(self) -> tuple[str, ...]:
        return self.at_levels if len(self.x) == 1 else (*self.at_levels, "mixed")

    def aside(self) -> dict[str, float]:
        if len(self.x) > kernels.SMALL:
            decides = (self.gates[0], self.price, self.slots, self.counters, self.chosen)
            return {"gate in a launch of its own": self.time_us(lambda i: levels_of(self.x, *decides), 9)}
        own = (self.x, self.x, self.norm)
        decides = (self.price, self.slots, self.chosen)
        return {
            "norm": self.time_us(lambda i: normed(*own), 9),
            "norm with the gate": self.time_us(lambda i: gated_norm(*own, self.gates[i], *decides), 9),
        }


class RoundedProblem(GatedProblem):
    """The same with levels in bits a weight."""

    twin = staticmethod(kernels.rounded_twin)

    @property
    def shape(self) -> GateShape:
        return GateShape(self.hidden, self.neurons, 2, levels=BITS, adapter_rank=0)

    def make(self) -> Weights:
        own = self.plain()
        return Weights(*own, self.shape.widths, planes=tuple(random_planes(*weight.shape) for weight in own))

    def candidates(self, tokens: int) -> list[Fused | Tiled]:
        base = kernels.mlp_settings(tokens, self.hidden, self.neurons).kernel
        return with_splits(rounded_relatives(base, tokens), self.hidden)

    def limit(self, fastest: float, dense: float) -> float:
        return max(1.03 * fastest, dense)

    @property
    def at_levels(self) -> tuple[str, ...]:
        return ("all rows", *map(AT_BITS.format, self.shape.bits[1:]))


def random_planes(rows: int, depth: int) -> Planes:
    """Planes of some weight `[rows, depth]`: what they hold takes no time."""
    high, low = (torch.randint(256, (rows, depth // 2), dtype=torch.uint8, device="cuda") for _ in range(2))
    scale = torch.tensor([0.01, -0.07], dtype=torch.bfloat16, device="cuda")  # a step and the least value
    return Planes(high, low, scale.expand(rows, depth // GROUP, 2).contiguous())


PROBLEMS = {"gates": GatedProblem, "rounded": RoundedProblem}  # by policy, where there is a gate before each MLP


def with_splits(options: list[Fused], hidden: int) -> list[Fused]:
    """Each with as many splits as let all programs have one unit of the second half, or two."""
    found = []
    for option in options:
        shares = {
            max(1, round(rounds * option.programs_per_sm * PROCESSORS * option.down_n / hidden)) for rounds in (1, 2)
        }
        found += [dataclasses.replace(option, splits=share) for share in sorted(shares) if share <= 48]
    return found
