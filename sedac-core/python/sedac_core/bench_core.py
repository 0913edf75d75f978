"""`python -m sedac_core.bench core`: the Rust kernels against their NumPy and torch twins, into docs/results/core.json.

Figures that Python cannot take (a threshold read lasts nanoseconds) come from criterion's files, if they are there:
    cargo bench --manifest-path sedac-core/benches/Cargo.toml
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import _rust
from .bench import cores, paired, ratios, results_file, spread
from .calibration import thresholds_for_rates
from .cascade import decide, margin_step

CHECKPOINTS = 3
THRESHOLDS, WEIGHTS, GAMMA, LEVEL = np.float32([0.3, 0.5, 0.8]), np.ones(3, np.float32), 0.5, 0.5
TOKENS = (1, 8, 256, 65_536, 4_000_000)
BYTES = 4 * (CHECKPOINTS + 2)  # a token's risks are read, its exit and confidence written


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench core", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/core.json"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="batch sizes of the evaluation")
    parser.add_argument("--sweep-tokens", type=int, default=1_000_000)
    parser.add_argument("--criterion", type=Path, default=Path("sedac-core/benches/target/criterion"))
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    records, load = [], os.getloadavg()[0]
    with tqdm(desc="core", unit=" measurements", file=sys.stderr) as bar:
        for measured in (
            *(evaluation(tokens, arguments.repeats) for tokens in arguments.tokens),
            bandwidth(max(arguments.tokens), arguments.repeats),
            sweep(arguments.sweep_tokens, min(arguments.repeats, 5)),
            controller(arguments.repeats),
            criterion(arguments.criterion),
        ):
            for record in measured:
                records.append({"checkpoints": CHECKPOINTS, **record})
                bar.update()
    results_file(arguments.out, records, load_before=load)  # over 0.2 or so, something else was running
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()))
    print(json.dumps({"results": str(arguments.out), "records": len(records)}))


def some_risks(tokens: int) -> np.ndarray:
    """Risks `[checkpoints, tokens]` that fall from one checkpoint to the next, as probes' do."""
    rng = np.random.default_rng(0)
    return (rng.gamma(1.5, 0.6, (1, tokens)) * rng.lognormal(0, 0.4, (CHECKPOINTS, tokens))).astype(np.float32)


def decide_numpy(
    risks: np.ndarray, thresholds: np.ndarray, gamma: float = GAMMA, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """The cascade as one would write it in NumPy: exit checkpoint and confidence `[tokens]`."""
    gamma, level, greatest = np.float32(gamma), np.float32(level), np.float32(0)
    margin = np.zeros(risks.shape[1], np.float32)
    confidence = np.zeros(risks.shape[1], np.float32)
    exit_checkpoint = np.full(risks.shape[1], len(risks), np.int32)
    with np.errstate(all="ignore"):
        for i, risk in enumerate(risks):
            margin = margin_step(risk, thresholds[i], margin, gamma, WEIGHTS[i], level)
            greatest = gamma * greatest + WEIGHTS[i]
            running = exit_checkpoint == len(risks)
            confidence = np.where(running, margin + level * greatest, confidence)
            exit_checkpoint = np.where(running & (margin > 0), i, exit_checkpoint)
    return exit_checkpoint, confidence


def repeated(action: Callable[[], Any], tokens: int) -> Callable[[], None]:
    """Small batches many times over, so that the clock's own cost does not count."""
    times = max(1, 2_000 // tokens)

    def run() -> None:
        for _ in range(times):
            action()

    run.times = times
    return run


def compare(
    conditions: dict[str, Any], actions: dict[str, Callable[[], Any]], repeats: int, unit: str, scale: float
) -> Iterator[dict[str, Any]]:
    """Times of the systems in turn, and how many times faster rust is than each of the others."""
    seconds = paired(actions, repeats)
    for system, samples in seconds.items():
        times = [scale * sample / getattr(actions[system], "times", 1) for sample in samples]
        yield {"system": system, **conditions, "metric": f"time_{unit}", **spread(times), "unit": unit}
    for baseline in actions.keys() - {"rust"}:
        speedups = ratios(seconds[baseline], seconds["rust"])
        yield {
            "system": "rust", "baseline": baseline, **conditions, "metric": "speedup", **spread(speedups), "unit": "x",
        }  # fmt: skip


def evaluation(tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One batch, from Python."""
    risks = some_risks(tokens)
    tensor, thresholds = torch.from_numpy(risks), THRESHOLDS.tolist()
    actions = {
        "rust": lambda: _rust.evaluate(risks, thresholds, None, GAMMA, LEVEL),
        "numpy": lambda: decide_numpy(risks, THRESHOLDS),
        "torch": lambda: decide(tensor, thresholds, GAMMA, None, LEVEL),
    }
    actions = {name: repeated(action, tokens) for name, action in actions.items()}
    yield from compare({"kernel": "evaluate", "tokens": tokens}, actions, repeats, "us", 1e6)


def bandwidth(tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """What share of the machine's copy bandwidth the evaluation reaches: a copy reads and writes as many bytes.

    Both write into arrays that they have written before: new ones cost more than the work, page by page.
    """
    risks, thresholds = some_risks(tokens), THRESHOLDS.tolist()
    out = _rust.evaluate(risks, thresholds)
    source = np.ones(BYTES * tokens // 2, np.uint8)
    parts = list(zip(np.array_split(source, cores()), np.array_split(np.empty_like(source), cores()), strict=True))
    with ThreadPoolExecutor(cores()) as pool:  # NumPy lets go of the GIL while it copies
        actions = {
            "rust": lambda: _rust.evaluate(risks, thresholds, None, GAMMA, LEVEL, out),
            "copy": lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)),
        }
        seconds = paired(actions, repeats)
    for system, samples in seconds.items():
        rates = [BYTES * tokens / sample / 1e9 for sample in samples]
        yield {"system": system, "tokens": tokens, "metric": "bandwidth", **spread(rates), "unit": "GB/s"}
    shares = ratios(seconds["copy"], seconds["rust"])
    yield {
        "system": "rust", "baseline": "copy", "tokens": tokens, "metric": "bandwidth_share", **spread(shares),
        "unit": "share",
    }  # fmt: skip


def sweep(tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """10,000 settings in one call, against a NumPy loop of which a few settings are timed."""
    risks = some_risks(tokens)
    target = np.random.default_rng(1).random(risks.shape, dtype=np.float32)
    quantiles = np.linspace(0.1, 0.9, 10)
    grid = np.float32(list(itertools.product(*(np.quantile(risk, quantiles) for risk in risks))))  # [1000, 3]
    gammas, levels, timed = [0.0, 0.25, 0.5, 0.75, 1.0], [0.4, 0.5], 5

    def loop() -> None:
        for row in grid[:: len(grid) // timed]:
            exits, _ = decide_numpy(risks, row, 0.5, 0.4)
            exited = exits < CHECKPOINTS
            np.bincount(exits, minlength=CHECKPOINTS + 1)
            target[exits[exited], np.flatnonzero(exited)].mean()

    settings = len(grid) * len(gammas) * len(levels)
    actions = {"rust": lambda: _rust.sweep(risks, grid, gammas, levels, None, target), "numpy": loop}
    seconds = paired(actions, repeats, warmup=1)
    seconds["numpy"] = [sample / timed * settings for sample in seconds["numpy"]]
    conditions = {"kernel": "sweep", "tokens": tokens, "settings": settings}
    for system, samples in seconds.items():
        note = {} if system == "rust" else {"settings_timed": timed}
        yield {"system": system, **conditions, **note, "metric": "time_s", **spread(samples), "unit": "s"}
    speedups = ratios(seconds["numpy"], seconds["rust"])
    yield {
        "system": "rust", "baseline": "numpy", **conditions, "settings_timed": timed, "metric": "speedup",
        **spread(speedups), "unit": "x",
    }  # fmt: skip


def controller(repeats: int) -> Iterator[dict[str, Any]]:
    """One forward step of adaptive thresholds: three observations and an update, from Python."""
    for tokens in (1, 8, 512):
        risks = some_risks(tokens)
        rates = [0.2, 0.6, 0.9]
        thresholds = _rust.ThresholdController(rates, 0.2, 8192, thresholds_for_rates(some_risks(1000), rates))

        def step(thresholds=thresholds, risks=risks) -> None:
            for checkpoint, risk in enumerate(risks):
                thresholds.observe(checkpoint, risk)
            thresholds.update()

        action = repeated(step, tokens)
        times = [1e6 * sample / action.times for sample in paired({"rust": action}, repeats)["rust"]]
        yield {
            "system": "rust",
            "kernel": "controller_step",
            "tokens": tokens,
            "metric": "time_us",
            **spread(times),
            "unit": "us",
        }


def criterion(folder: Path) -> Iterator[dict[str, Any]]:
    """Criterion's medians with their confidence intervals."""
    for path in sorted(folder.glob("**/new/estimates.json")):
        median = json.loads(path.read_text())["median"]
        interval = median["confidence_interval"]
        samples = json.loads(path.with_name("sample.json").read_text())["times"]
        yield {
            "system": "rust", "kernel": str(path.parent.parent.relative_to(folder)), "harness": "criterion",
            "metric": "time_ns", "value": median["point_estimate"], "low": interval["lower_bound"],
            "high": interval["upper_bound"], "unit": "ns", "repeats": len(samples),
        }  # fmt: skip
