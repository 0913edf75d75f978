"""`python -m sedac_core.bench tune`: the predicated MLP's launch settings by shape, into kernel_settings.json.

For each shape and step size every candidate is timed in a captured graph over rotating copies of the weights, so that
none finds them in the cache; the best pair is then timed against the dense MLP (cuBLAS and a fused activation), which
decides whether the predicated kernels are used where all rows run. Needs a GPU; takes a few minutes.
"""

import argparse
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
from .kernels import SETTINGS_FILE, MlpSettings

SHAPES = {"0.5b": (896, 4864), "1.5b": (1536, 8960), "3b": (2048, 11008), "7b": (3584, 18944)}  # hidden, neurons
SIZES = (1, 16, 32, 64, 128, 256, 512)  # tokens a step
NEVER_SLOWER = 1.02  # of the dense MLP's time; an MLP is about half of a step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SETTINGS_FILE)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
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


def candidates(tokens: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Tiles, warps and stages to try for gate_up and for down (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    if tokens <= 32:
        m = 16 if tokens <= 16 else 32
        tiles = itertools.product((m,), (16, 32, 64), (64, 128, 256), (4, 8), (3, 5))
    elif tokens <= 64:
        tiles = itertools.product((64,), (32, 64, 128), (64, 128), (4, 8), (3, 4))
    else:
        tiles = itertools.product((64, 128, 256) if tokens > 128 else (64, 128), (64, 128), (64,), (4, 8), (3, 4))
    fitting = [tile for tile in tiles if fits(*tile)]
    wide = [tile for tile in fitting if tile[0] * tile[1] <= 128 * 128]  # gate and up: two accumulators
    return [t for t in wide if fits(t[0], 2 * t[1], *t[2:])], fitting


def fits(m: int, n: int, k: int, warps: int, stages: int) -> bool:
    """Whether a tile's operands fit into shared memory, and its accumulator into the registers of its warps."""
    return 2 * stages * k * (m + n) <= 220_000 and m * n <= 32 * warps * 160 and 16 * 16 * warps <= 8 * m * n


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
    """The fastest settings of a shape for a step of so many tokens, and their time over the dense MLP's."""
    x, rows, n_running = problem.inputs(tokens)
    gate_ups, downs = candidates(tokens)
    splits = (1, 2, 4, 8) if tokens <= 128 else (1, 2)

    def first(settings: MlpSettings):
        return lambda i: kernels.activations(x, problem.gate_up[i], rows, n_running, problem.neurons, settings)

    act = torch.randn(tokens, problem.neurons, dtype=x.dtype, device="cuda")

    def second(settings: MlpSettings):
        return lambda i: kernels.project_down(act, problem.down[i], rows, n_running, problem.neurons, settings)

    def fastest(options: list[MlpSettings], half) -> MlpSettings:
        return min(options, key=lambda settings: time_us(half(settings), len(problem.down)))

    gate_up = fastest([MlpSettings(tile) for tile in gate_ups], first).gate_up
    chosen = fastest([MlpSettings(gate_up, tile, split) for tile in downs for split in splits], second)

    def run(i: int) -> None:
        kernels.mlp(x, problem.gate_up[i], problem.down[i], rows, n_running, settings=chosen)

    dense = time_us(lambda i: dense_mlp(x, problem.gate_up[i], problem.down[i]), len(problem.down), 9)
    whole = time_us(run, len(problem.down), 9)
    n_running.zero_()
    nothing = time_us(run, len(problem.down), 9)
    return {
        "gate_up": chosen.gate_up,
        "down": chosen.down,
        "splits": chosen.splits,
        "predicated": whole <= NEVER_SLOWER * dense,
        "us": {"dense": round(dense, 2), "all rows": round(whole, 2), "no rows": round(nothing, 2)},
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
    tiles = [candidates(tokens) for tokens in sizes]
    jobs = {("gate_up", tile) for gate_ups, _ in tiles for tile in gate_ups}
    jobs |= {("down", tile) for _, downs in tiles for tile in downs}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, cores()), mp_context=context) as pool:
        list(tqdm(pool.map(compile_one, sorted(jobs), chunksize=4), "compiling", len(jobs), file=sys.stderr))


def compile_one(job: tuple[str, tuple[int, ...]]) -> None:
    """Compile one tile by running it on no rows."""
    half, tile = job
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    nothing, rows = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.arange(32, device="cuda")
    try:
        if half == "gate_up":
            x, weight = torch.zeros(32, 512, **options), torch.zeros(2048, 512, **options)
            kernels.activations(x, weight, rows, nothing, 1024, MlpSettings(tile))
        else:
            act, weight = torch.zeros(32, 1024, **options), torch.zeros(512, 1024, **options)
            for splits in (1, 2):
                kernels.project_down(act, weight, rows, nothing, 1024, MlpSettings(down=tile, splits=splits))
    except (triton.OutOfResources, RuntimeError):
        pass  # `time_us` leaves it out
