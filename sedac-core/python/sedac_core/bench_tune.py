"""`python -m sedac_core.bench tune`: the predicated MLP's launch settings by shape, into kernel_settings.json.

For each shape and step size every candidate is timed in a captured graph over rotating copies of the weights, so that
none finds them in the cache; the best pair is then timed against the dense MLP (cuBLAS and a fused activation). From 64 tokens
on the dense MLP in a conditional node of the graph is timed as well. The row's `path` is the way that costs least over all, half
and no rows, of those that cost no more than allowed where all run; dense if none. The same with a gate before each MLP, at the usual
levels and rank of adapters, among relatives of the settings found without: of those that keep up when all rows run whole, the
ones that are fastest over all whole, mixed, and all at each width, for large steps as well. And with levels in bits a weight, for the
sizes of ROUNDED_SIZES, at each of the usual bits. Needs a GPU; takes a few minutes.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm

from . import fused_kernel, kernels, tiled_kernels
from .adapter import AdapterBank
from .artifacts import replacing
from .bench import cores, in_turns, provenance
from .cli import SedacError
from .conditional import Switches
from .gate_kernels import DeviceGate, levels_of, new_counters
from .gates import BITS, Gate, GateShape
from .kernels import AT_BITS, AT_WIDTH, SETTINGS_FILE, Fused, Tiled, Weights
from .precision import GROUP, Planes

SHAPES = {"0.5b": (896, 4864), "1.5b": (1536, 8960), "3b": (2048, 11008), "7b": (3584, 18944)}  # hidden, neurons
SIZES = (1, 16, 32, 64, 128, 256, kernels.SMALL)  # tokens a step
LARGE_SIZES = (kernels.LARGE, 8192)  # of prefill; only gates have kernels there
# What to time, and its table in the file.
POLICIES = {"hard": "settings", "conditional": "settings", "gates": "gates", "rounded": "rounded"}
ROUNDED_SIZES = (1, 4, 16)  # tokens a step, with levels in bits
LAYERS = 24  # MLPs of a graph, about a window's
LARGE_LAYERS = 4  # of a graph of large steps, which take milliseconds each
# Tiles of either half to try at large sizes, the fastest of some more on an H100 (docs/LOG.md).
LARGE_TILES = (
    ((128, 128, 64, 8, 4), (128, 128, 64, 8, 3)),
    ((128, 256, 64, 8, 3), (256, 128, 64, 8, 3)),
)
CONDITIONAL_FROM = 64  # tokens
CLOSE = 8  # of the settings that are fast enough with all rows whole, how many are timed in all cases
Job = tuple[str, tuple[int, int] | None, int, Fused | Tiled]  # to compile: policy, shape, tokens and settings
SHARED_MEMORY, PROCESSORS = 220_000, 132  # of a Hopper GPU, to leave out what cannot run


def allowed(tokens: int, gated: bool) -> float:
    """How long the predicated MLP may take when all rows run, over the dense one: the MLPs of the window are about half
    of a step, which may take 1 % longer, 2 % from 128 tokens on. With gates the MLPs of all layers are half to two thirds
    of a step, and it may take 2 % longer."""
    return 1.03 if gated else 1.02 if tokens <= 64 else 1.04


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SETTINGS_FILE)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES, *LARGE_SIZES])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SedacError("tuning needs an NVIDIA GPU, and none is present")
    compile_all(arguments.policies, arguments.shapes, arguments.sizes)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    jobs = list(itertools.product(arguments.policies, arguments.shapes))
    total = sum(len(sizes_of(policy, arguments.sizes)) for policy, _ in jobs)
    with tqdm(total=total, desc="tuning", file=sys.stderr) as bar:
        for policy, name in jobs:
            shape = SHAPES[name]
            problem = PROBLEMS.get(policy, Problem)(*shape)
            rows = found.setdefault(POLICIES[policy], {}).setdefault("x".join(map(str, shape)), {})
            for tokens in sizes_of(policy, arguments.sizes):
                row = rows.get(str(tokens), {})
                if policy == "conditional":
                    if not row:
                        raise SedacError(f"no kernels were tuned for {name} at {tokens} tokens: add --policies hard")
                    row = row | {"conditional": conditional(problem, tokens)}
                else:
                    row = tune(problem, tokens) | {key: row[key] for key in row if key == "conditional"}
                rows[str(tokens)] = row | {"path": path(row, allowed(tokens, policy in PROBLEMS))}
                bar.write(f"{policy} {name} {tokens}: {rows[str(tokens)]}", file=sys.stderr)
                bar.update()
            found.setdefault("provenance", {})[policy] = provenance()
            with replacing(arguments.out) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"settings": str(arguments.out), "shapes": len(arguments.shapes)}))


def sizes_of(policy: str, sizes: Sequence[int]) -> Sequence[int]:
    """The sizes to time a policy at, of those asked for; levels in bits have sizes of their own."""
    if policy == "rounded":
        return ROUNDED_SIZES
    least, most = CONDITIONAL_FROM if policy == "conditional" else 1, max(LARGE_SIZES if policy == "gates" else SIZES)
    return [tokens for tokens in sizes if least <= tokens <= most]


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
    for block_n, programs, stages, share in itertools.product((32, 64), (1, 2, 3), (3, 4), (True, False)):
        option = dataclasses.replace(
            base, block_n=block_n, programs_per_sm=programs, stages=stages, share_gate=share, splits=0
        )
        if fits_fused(option, tokens):
            found.append(option)
    return found


def large_candidates() -> list[Tiled]:
    """Settings to try for large steps."""
    return [Tiled(*halves, splits=1) for halves in itertools.product(*LARGE_TILES)]


def rounded_relatives(base: Fused, tokens: int) -> list[Fused]:
    """Settings to try with levels in bits, given the ones that were found without a gate."""
    rest = itertools.product(((2, 4, 3), (2, 4, 4), (1, 8, 3), (3, 4, 3)), (True, False))
    # Of few tokens a column block smaller than all warps' rows would be read twice.
    down_n = base.down_n if tokens == 1 else max(64, base.down_n)
    across = {"block_n": 64, "down_n": down_n, "splits": 0}
    return [
        dataclasses.replace(base, **across, programs_per_sm=programs, warps=warps, stages=stages, share_gate=share)
        for (programs, warps, stages), share in rest
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
    """The same with a gate before the MLP, its levels forced by its bias or spread by its head."""

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
        return lambda i: kernels.gated_mlp(
            self.x, self.weights[i], self.gates[i], self.price, self.slots, self.counters, kernel, self.chosen
        )

    def cases(self) -> Iterator[str]:
        """All rows at each level, then levels that differ from row to row."""
        for level, name in enumerate(self.chosen_by[:-1]):
            for gate in self.gates:
                gate.head.zero_()
                gate.head_bias.fill_(6.0)  # the greatest damage
                if level:
                    gate.head_bias[level - 1] = -14.0
            yield name
        for gate in self.gates:
            gate.head.copy_(torch.randn_like(gate.head))
            gate.head_bias.zero_()
        yield "mixed"

    def limit(self, fastest: float, dense: float) -> float:
        return max(1.01 * fastest, dense)

    @property
    def chosen_by(self) -> tuple[str, ...]:
        return ("all rows", *map(AT_WIDTH.format, self.shape.widths[1:]), "mixed")

    def aside(self) -> dict[str, float]:
        gate = self.gates[0]
        decides = (self.x, gate, self.price, self.slots, self.counters, self.chosen)
        return {"gate in a launch of its own": self.time_us(lambda i: levels_of(*decides), 9)}


class RoundedProblem(GatedProblem):
    """The same with levels in bits a weight."""

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
    def chosen_by(self) -> tuple[str, ...]:
        return ("all rows", *map(AT_BITS.format, self.shape.bits[1:]), "mixed")


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


def tune(problem: Problem, tokens: int) -> dict[str, Any]:
    """The fastest settings of a shape for a step of so many tokens, and their time beside the dense MLP's."""
    problem.start(tokens)
    next(problem.cases())  # all rows whole
    found = [(problem.time_us(problem.run(kernel)), kernel) for kernel in problem.candidates(tokens)]
    found.sort(key=lambda pair: pair[0])
    dense = problem.time_us(problem.dense, 9)
    close = [kernel for time, kernel in found if time <= problem.limit(found[0][0], dense)][:CLOSE]
    times: dict[Any, dict[str, float]] = {kernel: {} for kernel in close}
    for name in problem.cases():
        for kernel in close:
            times[kernel][name] = problem.time_us(problem.run(kernel), 9)
    chosen = min(close, key=lambda kernel: sum(times[kernel][name] for name in problem.chosen_by))
    own = {"dense": dense, **times[chosen], **problem.aside()}
    return {
        "fused" if isinstance(chosen, Fused) else "tiled": dataclasses.astuple(chosen),
        "us": {name: round(value, 2) for name, value in own.items()},
    }


def path(row: dict[str, Any], most: float) -> str:
    """The way through the MLP that costs least, of those that take at most `most` times the dense one's time if all rows run,
    at whatever level."""
    sums = {}
    for name, us in (("predicated", row["us"]), ("conditional", row.get("conditional"))):
        at_levels = [us[case] for case in us or () if case.startswith("all at ") or case == "mixed"]
        if us is not None and max([us["all rows"], *at_levels]) <= most * us["dense"]:
            sums[name] = sum(us.get(case, 0.0) for case in ("all rows", "half of the rows", "no rows"))
    return min(sums, key=lambda name: sums[name], default="dense")


def conditional(problem: Problem, tokens: int) -> dict[str, float]:
    """Microseconds of the MLP in a conditional node by the rows that run, and of the dense one, in graphs of LAYERS of them."""
    problem.start(tokens)
    switches, saved = Switches(problem.x.device, LAYERS), torch.zeros(1, dtype=torch.int64, device="cuda")
    switches.prepare(problem.x, functools.partial(problem.dense, 0))

    def node(layers: Sequence[int]) -> None:
        own = functools.partial(problem.dense, layers[0] % problem.copies)
        switches.mlp(problem.x, problem.rows, problem.ends, layers, own, None, saved)

    def together(layer: int) -> None:
        if layer == 0:
            switches.checkpoint()
        node(range(layer, LAYERS))

    graphs = {
        "dense": captured(lambda layer: problem.dense(layer % problem.copies), LAYERS),
        "together": captured(together, LAYERS),
        "alone": captured(lambda layer: node((layer,)), LAYERS),
    }
    cases = {
        "dense": ("dense", tokens),
        "all rows": ("together", tokens),
        "all rows but one": ("together", tokens - 1),
        "half of the rows": ("together", tokens // 2),
        "a quarter of the rows": ("together", tokens // 4),
        "no rows": ("together", 0),
        "all rows, each node set alone": ("alone", tokens),
    }

    def once(graph: str, rows: int) -> float:
        problem.ends.fill_(rows)
        return replay_us(graphs[graph], LAYERS, in_a_row=4)

    times = in_turns({name: functools.partial(once, *case) for name, case in cases.items()}, 9)
    return {name: round(statistics.median(samples), 2) for name, samples in times.items()}


def captured(
    once: Callable[[int], Any], calls: int, beside: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph:
    """A graph of `once(0)`, `once(1)` and so on; with `beside`, in the memory of that graph, which must not run meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=beside and beside.pool()):
        for i in range(calls):
            once(i)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int, in_a_row: int = 1) -> float:
    """Microseconds of one of a graph's calls, over so many replays in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(in_a_row):
        graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / calls / in_a_row


def compile_all(policies: list[str], shapes: list[str], sizes: list[int]) -> None:
    """Compile every candidate beforehand, on all cores, into Triton's cache."""
    jobs: list[Job] = []
    for tokens in sizes_of("hard", sizes) if "hard" in policies else ():
        options = [dataclasses.replace(option, splits=2) for option in fused_candidates(tokens)]
        jobs += [("hard", None, max(16, tokens), option) for option in options]
        jobs += [("hard", None, 512, option) for options in tiled_candidates(tokens) for option in options]
    for name, tokens in itertools.product(shapes, sizes) if "gates" in policies else ():
        base = kernels.mlp_settings(tokens, *SHAPES[name]).kernel
        if tokens in LARGE_SIZES:
            jobs += [("gates", SHAPES[name], 2 * kernels.SMALL, option) for option in large_candidates()]
            continue
        options = {dataclasses.replace(k, splits=2) for k in relatives(base, tokens)}
        jobs += [("gates", SHAPES[name], max(16, tokens), option) for option in options]
    for name, tokens in itertools.product(shapes, ROUNDED_SIZES) if "rounded" in policies else ():
        base = kernels.mlp_settings(tokens, *SHAPES[name]).kernel
        options = [dataclasses.replace(k, splits=2) for k in rounded_relatives(base, tokens)]
        alike = 1 if tokens == 1 else fused_kernel.columns(tokens, rounded=True)  # one token's kernel is its own
        jobs += [("rounded", SHAPES[name], alike, option) for option in options]
    jobs = list(dict.fromkeys(jobs))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, cores()), mp_context=context) as pool:
        list(tqdm(pool.map(compile_one, jobs), "compiling", len(jobs), file=sys.stderr))


@functools.lru_cache(1)
def _problem(policy: str, shape: tuple[int, int] | None) -> Problem:
    return Problem(512, 2048, 1) if shape is None else PROBLEMS[policy](*shape, 1)


def compile_one(job: Job) -> None:
    """Compile one candidate by running it."""
    policy, shape, tokens, kernel = job
    problem = _problem(policy, shape)
    problem.start(tokens)
    with contextlib.suppress(triton.OutOfResources, RuntimeError):  # `time_us` leaves it out
        problem.run(kernel)(0)
