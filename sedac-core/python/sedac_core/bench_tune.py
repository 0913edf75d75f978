"""`python -m sedac_core.bench tune`: the predicated MLP's launch settings by GPU and shape, into kernel_settings.json.

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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from . import fused_kernel, kernels
from .artifacts import replacing
from .bench import cores, in_turns, provenance
from .cli import SedacError
from .conditional import Switches
from .graph_times import captured, replay_us
from .kernels import SETTINGS_FILE, Fused, Tiled
from .tune_problems import (
    LAYERS,
    PROBLEMS,
    Problem,
    fused_candidates,
    large_candidates,
    relatives,
    rounded_relatives,
    tiled_candidates,
)

SHAPES = {"0.5b": (896, 4864), "1.5b": (1536, 8960), "3b": (2048, 11008), "7b": (3584, 18944)}  # hidden, neurons
SIZES = (1, 16, 32, 64, 128, 256, kernels.SMALL)  # tokens a step
LARGE_SIZES = (kernels.LARGE, 8192)  # of prefill; only gates have kernels there
# Each has a table in the file, but conditional, which adds to the rows of hard.
POLICIES = ("hard", "conditional", "gates", "rounded")
ROUNDED_SIZES = (1, 4, 16)  # tokens a step, with levels in bits
CONDITIONAL_FROM = 64  # tokens
WRONG = 0.02  # relative error of an output in bfloat16 from which on it is another one
CLOSE = 8  # of the settings that are fast enough with all rows whole, how many are timed in all cases
Job = tuple[str, tuple[int, int] | None, int, Fused | Tiled]  # to compile: policy, shape, tokens and settings


def allowed(tokens: int, policy: str) -> float:
    """How long the predicated MLP may take when all rows run, over the dense one: the MLPs of the window are about half
    of a step, which may take 1 % longer, 2 % from 128 tokens on. With gates the MLPs of all layers are half to two thirds
    of a step, and it may take 2 % longer; with levels in bits it may not, as their kernel loses as much between an engine's other
    kernels, whose code takes the place of its own (docs/LOG.md)."""
    return {"gates": 1.03, "rounded": 1.0}.get(policy, 1.02 if tokens <= 64 else 1.04)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SETTINGS_FILE)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[*SIZES, *LARGE_SIZES])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--check", action="store_true", help="time nothing: hold what the table has to the torch twins")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SedacError("tuning needs an NVIDIA GPU, and none is present")
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.check:
        print(json.dumps({"right": check_table(found, arguments.policies, arguments.shapes, arguments.sizes)}))
        return
    own = found.setdefault(torch.cuda.get_device_name(), {})
    compile_all(candidates(arguments.policies, arguments.shapes, arguments.sizes))
    jobs = list(itertools.product(arguments.policies, arguments.shapes))
    total = sum(len(sizes_of(policy, arguments.sizes)) for policy, _ in jobs)
    with tqdm(total=total, desc="tuning", file=sys.stderr) as bar:
        for policy, name in jobs:
            shape = SHAPES[name]
            problem = PROBLEMS.get(policy, Problem)(*shape)
            table = own.setdefault("hard" if policy == "conditional" else policy, {})
            rows = table.setdefault("x".join(map(str, shape)), {})
            for tokens in sizes_of(policy, arguments.sizes):
                row = rows.get(str(tokens), {})
                if policy == "conditional":
                    if not row:
                        raise SedacError(f"no kernels were tuned for {name} at {tokens} tokens: add --policies hard")
                    row = row | {"conditional": conditional(problem, tokens)}
                else:
                    row = tune(problem, tokens) | {key: row[key] for key in row if key == "conditional"}
                rows[str(tokens)] = row | {"path": path(row, allowed(tokens, policy))}
                bar.write(f"{policy} {name} {tokens}: {rows[str(tokens)]}", file=sys.stderr)
                bar.update()
            own.setdefault("provenance", {})[policy] = provenance()
            with replacing(arguments.out) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"settings": str(arguments.out), "shapes": len(arguments.shapes)}))


def sizes_of(policy: str, sizes: Sequence[int]) -> Sequence[int]:
    """The sizes to time a policy at, of those asked for; levels in bits have sizes of their own."""
    if policy == "rounded":
        return ROUNDED_SIZES
    least, most = CONDITIONAL_FROM if policy == "conditional" else 1, max(LARGE_SIZES if policy == "gates" else SIZES)
    return [tokens for tokens in sizes if least <= tokens <= most]


def tune(problem: Problem, tokens: int) -> dict[str, Any]:
    """The fastest settings of a shape for a step of so many tokens, and their time beside the dense MLP's."""
    problem.start(tokens)
    next(problem.cases())  # all rows whole
    found = [(problem.time_us(problem.run(kernel)), kernel) for kernel in problem.candidates(tokens)]
    found.sort(key=lambda pair: pair[0])
    dense = problem.time_us(problem.dense, 9)
    close = [kernel for time, kernel in found if time <= problem.limit(found[0][0], dense)][:CLOSE]
    for kernel in close:
        check(problem, kernel)
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


def check(problem: Problem, kernel: Fused | Tiled) -> None:
    """`SedacError` where a kernel computes something else than its torch twin: what it does not compute would save time."""
    for case, error in problem.errors(kernel).items():
        if not error <= WRONG:
            raise SedacError(
                f"{kernel} computes something else than its torch twin at {problem.hidden} x {problem.neurons}, "
                f"{len(problem.x)} tokens, {case}: relative error {error:.3g}; mend the kernel, its times are worth nothing"
            )


def check_table(found: dict[str, Any], policies: list[str], shapes: list[str], sizes: Sequence[int]) -> int:
    """`check` of all settings of these policies, shapes and sizes that there are, of whatever GPU; how many. `SedacError` where
    there are none."""
    jobs: list[Job] = []
    for gpu, policy, name in itertools.product(found, policies, shapes):
        rows = found[gpu].get(policy, {}).get("x".join(map(str, SHAPES[name])), {})
        own = [tokens for tokens in sizes_of(policy, sizes) if str(tokens) in rows]
        jobs += [(policy, SHAPES[name], tokens, kernels.kernel_of(rows[str(tokens)])) for tokens in own]
    if not jobs:
        raise SedacError(
            "the table has no settings of these policies, shapes and sizes: tune them first, or name others"
        )
    compile_all(jobs)
    for policy, shape, tokens, kernel in tqdm(jobs, "checking", file=sys.stderr):
        problem = _problem(policy, shape)
        problem.start(tokens)
        check(problem, kernel)
    return len(jobs)


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


def candidates(policies: list[str], shapes: list[str], sizes: list[int]) -> list[Job]:
    """Every setting that tuning may time, once."""
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
    return list(dict.fromkeys(jobs))


def compile_all(jobs: list[Job]) -> None:
    """Compile these beforehand, on all cores, into Triton's cache."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, cores()), mp_context=context) as pool:
        list(tqdm(pool.map(compile_one, jobs), "compiling", len(jobs), file=sys.stderr))


@functools.lru_cache(1)
def _problem(policy: str, shape: tuple[int, int] | None) -> Problem:
    return Problem(512, 2048, 1) if shape is None else PROBLEMS.get(policy, Problem)(*shape, 1)


def compile_one(job: Job) -> None:
    """Compile one candidate by running it."""
    policy, shape, tokens, kernel = job
    problem = _problem(policy, shape)
    problem.start(tokens)
    with contextlib.suppress(triton.OutOfResources, RuntimeError):  # `time_us` leaves it out
        problem.run(kernel)(0)
