"""`python -m sedac_core.bench gpu --models configs/shapes/qwen2.5-3b`: SEDAC inside vLLM against stock, on one GPU.

Two engines live in one process on dummy weights, stock and patched, and take turns round by round (engines.py). Times of decode are
those of long answers less short ones, divided by the steps between; times of prefill those of one prompt, or of several in one step
(4x2048), and one token. At large batches the engine's Python takes longer than the GPU, so the graph that vLLM captured of a whole
decode step is timed by itself as well, replay after replay on the last step's inputs: all layers, without LM head and sampling. Needs
vLLM patched (step 4).

With `--policy gates` gates stand in every layer; a share of tokens, a different one in each layer, runs at one narrow level, the others
whole. Where vLLM captured a step twice (recordings.py), both recordings are timed, the one that the host picks first. With both
policies three engines live side by side, and stock's starts once.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import vllm_patch
from .bench import ratios, read_results, results_file, spread
from .ceilings import GatedShares, Shares, copy_bandwidth
from .cli import SedacError, positive
from .engines import (
    CAPTURED,
    Engine,
    GatedEngine,
    random_artefact,
    random_gates,
    replays_of,
    steps_of,
)
from .gates import BITS, LEVELS
from .metrics import saved_share
from .results_gpu import run_of

CHECKPOINTS = {24: 5, 28: 5, 36: 7}  # layers of the model: the README's first checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench gpu", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--models", type=Path, nargs="+", required=True, help="folders of a config.json; weights are dummies")
    option("--policy", choices=tuple(MEASURES), nargs="+", default=["hard"], help="one after the other")
    option("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 128, 256, 512], help="decode")
    option("--prefill", type=prompts_of, nargs="*", default=[(1, 512), (1, 2048), (1, 8192)], metavar="TOKENS", help="tokens of the "
           "prompt, or prompts and tokens such as 4x2048, at once in steps of at most 8192 tokens (default: 512 2048 8192)")  # fmt: skip
    option("--rates", type=float, nargs="+", help="shares that exit or narrow at batch 1")
    option("--batch-rates", type=float, nargs="+", help="the same for greater batches")
    option("--prefill-rates", type=float, nargs="+", help="the same in prefill (default: as at batch 1)")
    option("--bits", action="store_true", help=f"gates: levels of {', '.join(f'{bits:g}' for bits in BITS)} bits a weight in place "
           "of shares of neurons; named in the results")  # fmt: skip
    option("--levels", type=int, nargs="+", help="gates: numbers of the levels that tokens narrow to, the last at all rates, the "
           "others in prefill and at batch 1 by all tokens (default: the last)")  # fmt: skip
    option("--captured", type=int, nargs="+", default=[], metavar="TOKENS", help="let vLLM capture steps of so many tokens "
           "as well, such as the prefill's, in both engines; the greatest is named in the results")  # fmt: skip
    option("--gather", action="store_true", help="cascades: gather rows in prefill of any size that is not captured; named in the "
           "results")  # fmt: skip
    option("--checkpoint", type=int, help="layer of the probe (default: the README's first)")
    option("--keep-last", type=int, help="cascades: last layers that run whole (default: as served, 2); named in the "
           "results")  # fmt: skip
    option("--quantization", choices=("fp8",), help="let vLLM quantise the weights as it loads them, in both engines; named "
           "with the model in the results")  # fmt: skip
    option("--enable-lora", action="store_true", help="let vLLM take LoRA adapters, in both engines, though no request uses one; named "
           "with the model in the results")  # fmt: skip
    option("--repeats", type=int, default=5)
    option("--replays-only", type=int, default=1 << 30, metavar="BATCH", help="decode from this batch on: time captured "
           "steps by themselves, not the engine's")  # fmt: skip
    option("--trace", type=int, nargs="*", default=[], metavar="BATCH", help="record a decode step's kernels, too")
    option("--out", type=Path, nargs="+", help="a file for each policy (default: docs/results/gpu_h200.json and "
           "gpu_gates_h200.json); records of other models in it are kept")  # fmt: skip
    arguments = parser.parse_args()
    arguments.out = arguments.out or [Path("docs/results") / MEASURES[policy][1] for policy in arguments.policy]
    if len(arguments.out) != len(arguments.policy):
        raise SedacError(f"--out takes a file for each policy, found {len(arguments.out)} for {len(arguments.policy)}")
    last = len(BITS if arguments.bits else LEVELS) - 1
    arguments.levels = arguments.levels or [last]
    if not set(arguments.levels) <= set(range(1, last + 1)):
        raise SedacError(f"--levels are 1 to {last}, found {arguments.levels}")
    if arguments.bits and arguments.policy != ["gates"]:
        raise SedacError("--bits goes with --policy gates alone")
    if arguments.quantization and "gates" in arguments.policy:
        raise SedacError("--quantization goes with --policy hard: gates need plain weights")
    if arguments.enable_lora and "gates" in arguments.policy:
        raise SedacError("--enable-lora goes with --policy hard: gates do not support LoRA yet")
    if arguments.gather and "hard" not in arguments.policy:
        raise SedacError("--gather goes with --policy hard: gates gather no rows")
    if arguments.keep_last is not None and "hard" not in arguments.policy:
        raise SedacError("--keep-last goes with --policy hard: gates stand in all layers")
    vllm_patch.require_patched()
    if not torch.cuda.is_available():
        raise SedacError("this benchmark needs an NVIDIA GPU, and none is present")
    Engine.OPTIONS = Engine.OPTIONS | {"quantization": arguments.quantization, "enable_lora": arguments.enable_lora}
    if arguments.captured:
        sizes = sorted({*CAPTURED, *arguments.captured})
        Engine.OPTIONS["compilation_config"] = {
            "cudagraph_capture_sizes": sizes,
            "max_cudagraph_capture_size": sizes[-1],
        }
    if len(arguments.models) > 1:  # a process each: what one engine leaves on the GPU, another would miss
        for folder in arguments.models:
            command = [sys.executable, "-m", "sedac_core.bench", "gpu", *sys.argv[1:], "--models", str(folder)]
            if subprocess.run(command).returncode:
                raise SedacError(f"{folder} could not be timed, see above; records of the models before it are kept")
        return
    (folder,) = arguments.models
    name = model_name(folder, arguments)
    started = {"stock": Engine(folder, {"SEDAC_ENABLED": "0"}, 1 + len(arguments.policy))}
    for policy, out in zip(arguments.policy, arguments.out, strict=True):
        kept = read_results(out)["records"] if out.exists() else []
        again = run_of({"model": name, **unusual(arguments, policy)})
        kept = [record for record in kept if run_of(record) != again]
        for records in MEASURES[policy][0](folder, started, arguments):
            kept += records
            results_file(out, kept)
    print(json.dumps({"results": list(map(str, arguments.out)), "model": name}))


def model_name(folder: Path, arguments: argparse.Namespace) -> str:
    """What records call a model: the same name, or with how it is quantised, and with adapters."""
    return "-".join(filter(None, (folder.name, arguments.quantization, "lora" if arguments.enable_lora else None)))


def unusual(arguments: argparse.Namespace, policy: str) -> dict[str, Any]:
    """What records say of runs that are not the usual ones: the tokens of the greatest step that was captured though vLLM by
    itself would not; of a cascade, how many last layers run whole, and that large steps gathered whatever it saved; of gates, levels
    in bits."""
    found = {"captured": max(arguments.captured, default=None)}
    if policy == "hard":
        found |= {"keep_last": arguments.keep_last, "gathered": arguments.gather or None}
    else:
        found["levels_in"] = "bits" if arguments.bits else None
    return {key: value for key, value in found.items() if value is not None}


def measure(folder: Path, started: dict[str, Engine], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Start the engine of this policy beside those started before; the records of one model, phase by phase."""
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    checkpoint = CHECKPOINTS.get(layers, layers // 5) if arguments.checkpoint is None else arguments.checkpoint
    name = model_name(folder, arguments)
    known = {"system": "sedac", "model": name, "weights": "dummy", "checkpoint": checkpoint}
    known |= unusual(arguments, "hard")
    with tempfile.TemporaryDirectory() as artefact:
        random_artefact(Path(artefact), folder.name, config, checkpoint)
        on = {"SEDAC_ENABLED": "1", "SEDAC_PROBE_DIR": artefact, "SEDAC_THRESHOLDS": "0", "SEDAC_LOG_EVERY": "0"}
        if arguments.keep_last is not None:
            on["SEDAC_KEEP_LAST"] = str(arguments.keep_last)
        if arguments.gather:
            from . import gpu_cascade

            gpu_cascade.GATHER_FROM = 0
        sedac = started["hard"] = Engine(folder, on, 1 + len(arguments.policy))
    engines, bandwidth = {"stock": started["stock"], "sedac": sedac}, copy_bandwidth()
    shares = Shares(config, sedac.runtime, bandwidth, 1 if arguments.quantization else 2)
    yield [{**known, "system": "copy", "metric": "bandwidth", "value": bandwidth / 1e9, "unit": "GB/s"}]
    for where, rates in phases(arguments, [0, 0.25, 0.5, 0.75, 1], [0, 0.5, 1], name):
        one, phase, size = {**known, **where}, where["phase"], size_of(where)
        records, points = [], []
        for rate in rates:
            few = phase == "prefill" or size == 1 or rate in (0, 1)
            for pattern in ("random",) if few else ("random", "all_or_none"):
                before, found = sedac.force(rate, pattern), []
                if phase == "prefill" or size < arguments.replays_only:
                    times = steps_of({name: work(engine, where) for name, engine in engines.items()}, arguments.repeats)
                    seen = sedac.counters() - before
                    found += compare(times, seen, shares, phase, size, rate, pattern)
                    points.append((float(seen[3] / seen[1]), statistics.median(times["sedac"])))
                else:
                    most = shares.ceiling(phase, size, rate, pattern)
                    found.append({"metric": "theoretical_speedup", "value": most, "unit": "x"})
                if phase == "decode" and (size > 1 or rate in (0, 1)):  # one token's replays exit all alike
                    before = sedac.counters()
                    found += compare_replays(replays_of(engines, size, arguments.repeats))
                    seen = sedac.counters() - before
                    rate_seen = float(seen[3] / seen[1])
                    found.append({"metric": "replay_exit_rate_seen", "value": rate_seen, "unit": "share"})
                records += [{**one, "pattern": pattern, "exit_rate": rate, **record} for record in found]
        if size == 1:
            records += [{**one, "pattern": "random", **record} for record in over_line(points)]
        yield records
    for batch, rate in itertools.product(arguments.trace, (0.0, 1.0)):
        sedac.force(rate)
        yield [{**known, "phase": "decode", "batch": batch, "exit_rate": rate, **r} for r in traced(engines, batch)]


def measure_gates(
    folder: Path, started: dict[str, Engine], arguments: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """The same with a gate in every layer."""
    config = json.loads((folder / "config.json").read_text())
    known = {"system": "sedac", "model": folder.name, "weights": "dummy", "policy": "gates"}
    known |= unusual(arguments, "gates")
    with tempfile.TemporaryDirectory() as artefact:
        random_gates(Path(artefact), folder.name, config, BITS if arguments.bits else LEVELS)
        on = {"SEDAC_ENABLED": "1", "SEDAC_PROBE_DIR": artefact, "SEDAC_LAMBDA": "-30", "SEDAC_LOG_EVERY": "0"}
        sedac = started["gates"] = GatedEngine(folder, on, 1 + len(arguments.policy))
    engines, bandwidth = {"stock": started["stock"], "sedac": sedac}, copy_bandwidth()
    shares = GatedShares(config, sedac.runtime, bandwidth)
    yield [{**known, "system": "copy", "metric": "bandwidth", "value": bandwidth / 1e9, "unit": "GB/s"}]
    for where, rates in phases(arguments, [0, 0.25, 0.4, 0.5, 0.75, 1], [0, 0.4, 1], folder.name):
        one, phase, size = {**known, **where}, where["phase"], size_of(where)
        narrowest, *wider = sorted(arguments.levels, reverse=True)
        cases = [(narrowest, rate) for rate in rates]
        cases += [(level, 1) for level in wider if phase == "prefill" or size == 1]
        records, points = [], []
        for level, rate in cases:
            sedac.narrow(rate, level)
            before, found = sedac.counters(), []
            if phase == "prefill" or size < arguments.replays_only:
                times = steps_of({name: work(engine, where) for name, engine in engines.items()}, arguments.repeats)
                found += compare_gates(times, sedac.counters() - before, shares, phase, size, rate, level)
            else:
                most = shares.ceiling(phase, size, rate, level)
                found.append({"metric": "theoretical_speedup", "value": most, "unit": "x"})
            if phase == "decode":
                picked, *rest = sedac.recordings(size)
                before = sedac.counters()
                replays = replays_of(engines, size, arguments.repeats, (picked, *rest))
                levels = (sedac.counters() - before)[0, 2:].tolist()
                saved = saved_share(shares.shape, levels) if any(levels) else 0.0
                found += compare_replays(replays)
                found.append(
                    {"recording": "predicated", "metric": "replay_saved_bytes", "value": saved, "unit": "share"}
                )
                points.append((saved if picked == "predicated" else 0.0, statistics.median(replays[picked])))
            case = {**one, "narrowed": rate, "bits" if arguments.bits else "width": shares.shape.levels[level]}
            records += [{**case, **record} for record in found]
        if size == 1:
            records += [{**one, **record} for record in over_line(points)]
        yield records
    for batch, rate in itertools.product(arguments.trace, (0.0, 1.0)):
        sedac.narrow(rate, max(arguments.levels))
        yield [{**known, "phase": "decode", "batch": batch, "narrowed": rate, **r} for r in traced(engines, batch)]


MEASURES = {"hard": (measure, "gpu_h200.json"), "gates": (measure_gates, "gpu_gates_h200.json")}


def phases(
    arguments: argparse.Namespace, rates: list[float], batch_rates: list[float], model: str
) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """What to time, as records say it, decode of a batch or prefill of prompts, and the shares that exit or narrow; the lists are
    the usual ones."""
    one = arguments.rates or rates
    found: list[tuple[dict[str, Any], list[float]]] = [
        ({"phase": "decode", "batch": batch}, one if batch == 1 else arguments.batch_rates or batch_rates)
        for batch in arguments.batches
    ]
    for prompts, tokens in arguments.prefill:
        several = {"prompts": prompts} if prompts > 1 else {}
        found.append(({"phase": "prefill", "tokens": tokens, **several}, arguments.prefill_rates or one))
    yield from tqdm(found, desc=model, file=sys.stderr)


def prompts_of(text: str) -> tuple[int, int]:
    """The prompts and the tokens of each that `4x2048` or `2048` names."""
    prompts, _, tokens = text.rpartition("x")
    return positive(prompts or "1"), positive(tokens)


def size_of(where: dict[str, Any]) -> int:
    """Tokens of a step."""
    return where["batch"] if where["phase"] == "decode" else where["tokens"] * where.get("prompts", 1)


def work(engine: Engine, where: dict[str, Any]) -> tuple:
    """What `steps_of` times."""
    if where["phase"] == "decode":
        return engine.decode(where["batch"])
    return engine.prefill(where["tokens"], where.get("prompts", 1))


def over_line(points: list[tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """Of steps that saved a share in so many seconds each: their time over the line between the least and the most saved."""
    if len({saved for saved, _ in points}) < 2:
        return
    (least, slow), *between, (most, fast) = sorted(points)
    for saved, seconds in between:
        line = slow + (fast - slow) * (saved - least) / (most - least)
        yield {"metric": "over_line", "saved": saved, "value": seconds / line, "unit": "of the line's time"}


def compare_gates(
    times: dict[str, list[float]],
    seen: torch.Tensor,
    shares: GatedShares,
    phase: str,
    size: int,
    rate: float,
    level: int,
) -> Iterator[dict[str, Any]]:
    """The records of stock's and SEDAC's seconds a step, taken while the device counted `seen`."""
    yield {"metric": "speedup", **spread(ratios(times["stock"], times["sedac"])), "unit": "x"}
    for name, samples in times.items():
        yield {"system": name, "metric": "time_ms", **spread([1000 * seconds for seconds in samples]), "unit": "ms"}
    kernels, otherwise = seen
    # In decode the other steps are prefill, whose time is taken off, unless the host picks whole recordings.
    levels = (kernels if phase == "decode" and kernels[0] > otherwise[0] else seen.sum(0))[2:].tolist()
    yield {"metric": "steps_predicated", "value": float(kernels[0] / seen.sum(0)[0]), "unit": "share"}
    yield {"metric": "narrowed_seen", "value": levels[level] / max(1, sum(levels)), "unit": "share"}
    yield {"metric": "saved_bytes", "value": saved_share(shares.shape, levels), "unit": "share"}
    yield {"metric": "theoretical_speedup", "value": shares.ceiling(phase, size, rate, level), "unit": "x"}
    if phase == "decode":
        for name, narrowed in (("stock", None), ("sedac", rate if shares.skips(size) else None)):
            mlps = shares.mlp_bytes(size, narrowed, level)
            read = mlps + shares.other_bytes
            share = read / shares.bandwidth / statistics.median(times[name])
            yield {"system": name, "metric": "mlp_bytes_read", "value": mlps, "unit": "bytes a step"}
            yield {"system": name, "metric": "weight_bytes_read", "value": read, "unit": "bytes a step"}
            yield {"system": name, "metric": "roofline_share", "value": share, "unit": "share"}


def compare_replays(times: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """The records of stock's and SEDAC's seconds a replay, of each recording of SEDAC's that was timed."""
    for name, samples in times.items():
        recording = {} if name in ("stock", "sedac") else {"recording": name}
        spread_ms = spread([1000 * seconds for seconds in samples])
        if name == "stock":
            yield {"system": "stock", "metric": "replay_ms", **spread_ms, "unit": "ms"}
            continue
        yield {**recording, "metric": "replay_speedup", **spread(ratios(times["stock"], samples)), "unit": "x"}
        yield {**recording, "metric": "replay_ms", **spread_ms, "unit": "ms"}


def traced(engines: dict[str, Engine], batch: int) -> Iterator[dict[str, Any]]:
    """The kernels of each engine's captured decode step."""
    for system, engine in engines.items():
        for kernel, (launches, microseconds) in engine.trace(batch).items():
            known = {"system": system, "kernel": kernel}
            yield {**known, "metric": "launches", "value": launches, "unit": "a step"}
            yield {**known, "metric": "kernel_us", "value": microseconds, "unit": "us a step"}


def compare(
    times: dict[str, list[float]],
    seen: torch.Tensor,
    shares: Shares,
    phase: str,
    size: int,
    rate: float,
    pattern: str,
) -> Iterator[dict[str, Any]]:
    """The records of stock's and SEDAC's seconds a step, taken while the device counted `seen`."""
    yield {"metric": "speedup", **spread(ratios(times["stock"], times["sedac"])), "unit": "x"}
    for name, samples in times.items():
        yield {"system": name, "metric": "time_ms", **spread([1000 * seconds for seconds in samples]), "unit": "ms"}
    yield {"metric": "exit_rate_seen", "value": float(seen[3] / seen[1]), "unit": "share"}
    yield {"metric": "mlp_rows_saved", "value": float(seen[2] / (seen[1] * shares.layers)), "unit": "share"}
    yield {"metric": "theoretical_speedup", "value": shares.ceiling(phase, size, rate, pattern), "unit": "x"}
    if phase == "decode":
        for name, exits in (("stock", 0.0), ("sedac", rate if shares.skips(size) else 0.0)):
            read = shares.bytes_read(size, exits, pattern)
            share = read / shares.bandwidth / statistics.median(times[name])
            yield {"system": name, "metric": "weight_bytes_read", "value": read, "unit": "bytes a step"}
            yield {"system": name, "metric": "roofline_share", "value": share, "unit": "share"}
