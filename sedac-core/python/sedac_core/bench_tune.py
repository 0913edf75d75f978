"""`python -m sedac_core.bench tune`: the predicated MLP's launch settings by shape, into kernel_settings.json.

For each shape and step size every candidate is timed in a captured graph over rotating copies of the weights, so that
none finds them in the cache; the best pair is then timed against the dense MLP (cuBLAS and a fused activation), which
decides whether the predicated kernels are used where all rows run. Needs a GPU; takes a few minutes.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from tqdm import tqdm

from . import kernels
from .artifacts import replacing
from .bench import cores, provenance
from .cli import SedacError
from .kernels import SETTINGS_FILE, Fused, Tiled

SHAPES = {"0.5b": (896, 4864), "1.5b": (1536, 8960), "3b": (2048, 11008), "7b": (3584, 18944)}  # hidden, neurons
SIZES = (1, 16, 32, 64, 128, 256, 512)  # tokens a step
SHARED_MEMORY, PROCESSORS = 220_000, 132  # of a Hopper GPU, to leave out what cannot run


def allowed(tokens: int) -> float:
    """How long the predicated MLP may take when all rows run, over the dense one: the MLPs of the window are about half
    of a step, which may take 1 % longer, 2 % from 128 tokens on."""
    return 1.02 if tokens <= 64 else 1.04


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SETTINGS_FILE)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SedacError("tuning needs an NVIDIA GPU, and none is present")
    compile_all(arguments.sizes)
    table: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(arguments.shapes) * len(arguments.sizes), desc="tuning", file=sys.stderr) as bar:
        for name in arguments.shapes:
            hidden, neurons = SHAPES[name]
            problem = Problem(hidden, neurons)
            rows = table[f"{hidden}x{neurons}"] = {}
            for tokens in arguments.sizes:
                rows[str(tokens)] = tune(problem, tokens)
                bar.write(f"{name} {tokens}: {rows[str(tokens)]}", file=sys.stderr)
                bar.update()
    with replacing(arguments.out) as temporary:
        temporary.write_text(json.dumps({"provenance": provenance(), "settings": table}, indent=1) + "\n")
    print(json.dumps({"settings": str(arguments.out), "shapes": len(table)}))


def fused_candidates(tokens: int) -> list[Fused]:
    """One-launch settings to try, their splits still to be chosen."""
    if tokens > 64:
        return []
    block_m = max(16, triton.next_power_of_2(tokens))
    found = []
    for block_n, block_k, down_n, down_k, (programs, warps, stages) in itertools.product(
        (32, 64), (64, 128), (32, 64, 128), (64, 128), ((1, 4, 4), (1, 8, 4), (2, 4, 3), (2, 4, 4), (3, 4, 3))
    ):
        operands = max(block_k * (block_m + 2 * block_n), down_k * (block_m + down_n))
        if 80_000 < 2 * stages * operands * programs <= SHARED_MEMORY and 2 * block_n * block_m <= 4096 * warps:
            found.append(Fused(block_n, block_k, down_n, down_k, 0, programs, warps, stages))
    return found


def tiled_candidates(tokens: int) -> tuple[list[Tiled], list[Tiled]]:
    """Settings to try for each half of the tiled kernels."""
    if tokens < 64:
        return [], []
    tiles = itertools.product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5))
    tiles = [tile for tile in tiles if tile[0] <= tokens]
    first = [tile for tile in tiles if tile[2] == 64 and fits(tile, 2 * tile[1])]
    return [Tiled(gate_up=tile) for tile in first], [Tiled(down=tile) for tile in tiles if fits(tile, tile[1])]


def fits(tile: tuple[int, ...], columns: int) -> bool:
    """Whether operands and accumulators of a tile that is so many columns wide fit into a processor."""
    block_m, _, block_k, warps, stages = tile
    return 2 * stages * block_k * (block_m + columns) <= SHARED_MEMORY and block_m * columns <= 4480 * warps


class Problem:
    """One shape's weights, several copies of them, and inputs."""

    def __init__(self, hidden: int, neurons: int):
        self.hidden, self.neurons = hidden, neurons
        copies = max(2, -(-(300 << 20) // (6 * hidden * neurons)))
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        self.gate_up = [torch.randn(2 * neurons, hidden, **options) * 0.02 for _ in range(copies)]
        self.down = [torch.randn(hidden, neurons, **options) * 0.02 for _ in range(copies)]

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, self.hidden, dtype=torch.bfloat16, device="cuda")
        rows = torch.randperm(tokens, device="cuda")
        return x, rows, torch.full((1,), tokens, dtype=torch.int32, device="cuda")


def tune(problem: Problem, tokens: int) -> dict[str, Any]:
    """The fastest settings of a shape for a step of so many tokens, and their time beside the dense MLP's."""
    x, rows, n_running = problem.inputs(tokens)
    copies, neurons = len(problem.down), problem.neurons

    def run(kernel: Fused | Tiled):
        return lambda i: kernels.mlp(x, problem.gate_up[i], problem.down[i], rows, n_running, kernel=kernel)

    def fastest(options: list, halves) -> Any:
        return min(options, key=lambda kernel: time_us(halves(kernel), copies), default=None)

    found: list[Fused | Tiled] = []
    fused = []
    for option in fused_candidates(tokens):
        tiles = problem.hidden / option.down_n
        shares = {max(1, round(rounds * option.programs_per_sm * PROCESSORS / tiles)) for rounds in (1, 2)}
        fused += [dataclasses.replace(option, splits=share) for share in shares if share <= 48]
    fused = [k for k in fused if problem.hidden % max(k.block_k, k.down_n) == 0 == neurons % max(k.block_n, k.down_k)]
    if fused:
        found.append(fastest(fused, run))
    first, second = tiled_candidates(tokens)
    if first:
        act = torch.randn(tokens, neurons, dtype=x.dtype, device="cuda")
        one = fastest(
            [k for k in first if neurons % k.gate_up[1] == 0 == problem.hidden % k.gate_up[2]],
            lambda k: lambda i: kernels.tiled_gate_up(x, problem.gate_up[i], n_running, neurons, k),
        )
        two = fastest(
            [
                dataclasses.replace(k, splits=splits)
                for k in second
                if neurons % k.down[2] == 0
                for splits in (1, 2, 4, 8)
            ],
            lambda k: lambda i: kernels.tiled_down(act, problem.down[i], rows, n_running, neurons, k),
        )
        found.append(Tiled(one.gate_up, two.down, two.splits))
    chosen = fastest(found, run)
    dense = time_us(lambda i: dense_mlp(x, problem.gate_up[i], problem.down[i]), copies, 9)
    whole = time_us(run(chosen), copies, 9)
    times = {"dense": dense, "all rows": whole}
    for name, share in (("half of the rows", 0.5), ("no rows", 0.0)):
        n_running.fill_(int(share * tokens))
        times[name] = time_us(run(chosen), copies, 9)
    return {
        "fused" if isinstance(chosen, Fused) else "tiled": dataclasses.astuple(chosen),
        "predicated": whole <= allowed(tokens) * dense,
        "us": {name: round(value, 2) for name, value in times.items()},
    }


def time_us(once, copies: int, repeats: int = 3) -> float:
    """Microseconds of `once(i)`, the median over replays of a graph that runs it on each copy of the weights."""
    try:
        once(0)
    except (triton.OutOfResources, RuntimeError):  # too large a tile for this chip
        return float("inf")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = 2 * copies
    with torch.cuda.graph(graph):
        for i in range(calls):
            once(i % copies)
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / calls)
    return statistics.median(times[1:])


@triton.jit
def _silu_mul_kernel(gate_up, act, neurons, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * neurons + column, mask=column < neurons).to(tl.float32)
    up = tl.load(gate_up + row * 2 * neurons + neurons + column, mask=column < neurons).to(tl.float32)
    out = (gate / (1 + tl.exp(-gate)) * up).to(act.dtype.element_ty)
    tl.store(act + row * neurons + column, out, mask=column < neurons)


def dense_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The MLP as stock runs it: two cuBLAS products around one fused activation."""
    both = x @ gate_up.T
    act = torch.empty(len(x), down.shape[1], dtype=x.dtype, device=x.device)
    _silu_mul_kernel[(len(x), triton.cdiv(down.shape[1], 1024))](both, act, down.shape[1], 1024)
    return act @ down.T


def compile_all(sizes: list[int]) -> None:
    """Compile every candidate beforehand, on all cores, into Triton's cache."""
    jobs: list[tuple[int, Fused | Tiled]] = []
    for tokens in sizes:
        jobs += [(max(16, tokens), dataclasses.replace(option, splits=2)) for option in fused_candidates(tokens)]
        jobs += [(512, option) for options in tiled_candidates(tokens) for option in options]
    jobs = list(dict.fromkeys(jobs))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, cores()), mp_context=context) as pool:
        list(tqdm(pool.map(compile_one, jobs, chunksize=4), "compiling", len(jobs), file=sys.stderr))


def compile_one(job: tuple[int, Fused | Tiled]) -> None:
    """Compile one candidate by running it on no rows."""
    tokens, kernel = job
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    nothing, rows = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.arange(tokens, device="cuda")
    x, gate_up, down = (
        torch.zeros(tokens, 512, **options),
        torch.zeros(4096, 512, **options),
        torch.zeros(512, 2048, **options),
    )
    with contextlib.suppress(triton.OutOfResources, RuntimeError):  # `time_us` leaves it out
        kernels.mlp(x, gate_up, down, rows, nothing, kernel=kernel)
