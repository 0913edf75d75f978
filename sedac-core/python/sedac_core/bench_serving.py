"""`python -m sedac_core.bench serving`: a server under mixed load of requests that opt out and requests that do not.

First a stock server answers every prompt, alone. Then a SEDAC server gets them from many clients at once (the openai package,
streaming), half opting out, a quarter as it stands, a quarter by a preset. Counted are failures, answers of those that opted
out which are not stock's, and the memory of all the server's processes over time. Last, one client alone: its forward steps a
second say what the counters cost, whose time for one step is measured apart.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from tqdm import tqdm

from . import demo_model
from .bench import percentile, results_file
from .cli import positive
from .collection import read_documents
from .serving import Server, counters

CHOICES = ("off", None, "off", "balanced")
ALONE = 15.0  # seconds of one client at the end
STEP = """
import time, numpy
from sedac_core.metrics import Counters, survive_a_full_folder
survive_a_full_folder()
counters, best = Counters((7, 14, 21), 30, 1), float("inf")
risk, reached = numpy.random.rand(3, 1).astype("float32"), numpy.ones((3, 1), bool)
def step():
    counters.add(1, 1, 29, (0, 1, 0), counters.risks(risk, reached))
    counters.path("gather")
    counters.fallback("request", 1)
for _ in range(9):
    start = time.perf_counter()
    for _ in range(1000):
        step()
    best = min(best, (time.perf_counter() - start) / 1000)
print(best)
"""  # seconds of what is counted in a decode step of one token


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench serving", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", default="default", help="model folder, Hub name or 'default' (default: %(default)s)")
    option("--probe-dir", type=Path, default=Path("sedac_data"), help="its artefact (default: %(default)s)")
    option("--minutes", type=float, default=10.0, help="of the load (default: %(default)s)")
    option("--concurrency", type=positive, default=64, help="requests in flight (default: %(default)s)")
    option("--max-tokens", type=positive, default=32, help="of an answer (default: %(default)s)")
    option("--prompts", type=positive, default=32, help="of Python's documentation (default: %(default)s)")
    option("--log-dir", type=Path, default=Path("reports"), help="for the servers' logs (default: %(default)s)")
    option("--out", type=Path, default=Path("docs/results/serving.json"))
    arguments = parser.parse_args()
    prompts = [text[:240] for text in read_documents("pydoc") if len(text) > 240][: arguments.prompts]
    records = measure(arguments, demo_model.resolve(arguments.model), prompts)
    results_file(arguments.out, records)
    print(json.dumps({"results": str(arguments.out)} | {record["metric"]: record["value"] for record in records}))


def measure(arguments: argparse.Namespace, model: str, prompts: list[str]) -> list[dict[str, Any]]:
    args = ["--dtype", "float32", "--max-model-len", "512"]
    with Server(model, arguments.log_dir / "stock.log", {"SEDAC_ENABLED": "0"}, args, name="stock") as stock:
        wanted = asyncio.run(answers(stock, prompts, arguments.max_tokens))
    on = {"SEDAC_ENABLED": "1", "SEDAC_ADAPTIVE": "0", "SEDAC_PROBE_DIR": str(arguments.probe_dir.resolve())}
    with Server(model, arguments.log_dir / "sedac.log", on, args, name="sedac") as sedac:
        load = asyncio.run(Load(sedac, prompts, wanted, arguments).run())
        before, start = counters(sedac.url), time.perf_counter()
        asyncio.run(answers(sedac, prompts, arguments.max_tokens, seconds=ALONE))
        name = "sedac_forward_steps_total"
        steps = (counters(sedac.url)[name] - before[name]) / (time.perf_counter() - start)
    known = {"system": "sedac", "model": Path(model).name, "phase": "serving", "concurrency": arguments.concurrency}
    known |= {"minutes": arguments.minutes, "max_tokens": arguments.max_tokens}
    found = [("requests", len(load.gaps), ""), ("failures", len(load.failures), ""), ("unlike_stock", load.unlike, "")]
    found += [("opted_out", load.opted_out, "")]
    gaps = [gap for own in load.gaps for gap in own]
    found += [("p50_itl_ms", 1000 * percentile(gaps, 0.5), "ms"), ("p99_itl_ms", 1000 * percentile(gaps, 0.99), "ms")]
    quarter = max(1, len(load.memory) // 4)
    growth = statistics.median(load.memory[-quarter:]) / statistics.median(load.memory[quarter : 2 * quarter]) - 1
    found += [("memory_mib", load.memory[-1] / 2**20, "MiB"), ("memory_growth", growth, "")]
    found += [("metrics_cost_share", steps * cost_of_a_step(), ""), ("steps_per_second_alone", steps, "1/s")]
    for failure in sorted(set(load.failures))[:5]:
        print(f"failed: {failure}", file=sys.stderr)
    return [{**known, "metric": metric, "value": value, "unit": unit} for metric, value, unit in found]


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
    """Clients that keep so many requests in flight for some minutes, and what became of them."""

    def __init__(self, server: Server, prompts: list[str], wanted: list[str], arguments: argparse.Namespace):
        self.server, self.prompts, self.wanted, self.arguments = server, prompts, wanted, arguments
        self.client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
        self.numbers = itertools.count()
        self.gaps: list[list[float]] = []  # seconds between tokens, by request that was answered
        self.failures: list[str] = []
        self.unlike = self.opted_out = 0
        self.memory: list[int] = []  # bytes, once a second

    async def run(self) -> "Load":
        self.give_up = time.monotonic() + 60 * self.arguments.minutes
        async with self.client:
            await self.keep_busy()
        return self

    async def keep_busy(self) -> None:
        with tqdm(desc="requests") as self.bar:
            watch = asyncio.create_task(self.watch())
            await asyncio.gather(*(self.one_client() for _ in range(self.arguments.concurrency)))
            watch.cancel()

    async def watch(self) -> None:
        while True:
            self.memory.append(resident_bytes(self.server.process.pid))
            await asyncio.sleep(1)

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


def resident_bytes(group: int) -> int:
    """Resident memory of all processes of a group."""
    pages = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if os.getpgid(int(process.name)) == group:
                    pages += int((process / "statm").read_text().split()[1])
            except (OSError, IndexError):
                continue  # it has ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def cost_of_a_step() -> float:
    """Seconds that counting takes in a decode step of one token, in a process that counts as the worker does."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder}
        return float(
            subprocess.run([sys.executable, "-c", STEP], env=environment, check=True, capture_output=True).stdout
        )
