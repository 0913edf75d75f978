"""`python -m sedac_core.bench serving`: a server under mixed load of requests that opt out and requests that do not.

A stock server answers every prompt, alone. So does a SEDAC server, by each choice, and then it gets them from many clients at
once: for two thirds of the time through the openai package (streaming; half opting out, a quarter as it stands, a quarter by
a preset), for the last third from two of vLLM's own `vllm bench serve`, one of which opts out. Counted are failures, and answers of
those that opted out which are not stock's. In bfloat16 rounding alone makes answers part, so the stock server is put under
load as well, and where answers part both are held to what rounding can do. Its counters are held to what the clients sent.
Then an admin call changes its settings while requests run. Every two seconds memory, open files and metrics folder of
the server's processes are looked at: with --minutes 30 this is a soak, each load judged by itself. A Prometheus, where one is
installed, scrapes meanwhile; --dashboard draws its answers. What was found is written even where it is bad; the exit code is 1 then.

    python -m sedac_core.bench serving --model MODEL --probe-dir my_gates --dtype bfloat16 --minutes 2 --out serving_gpu.json

On a GPU both servers run side by side; what stands after -- is for both of them, such as --gpu-memory-utilization 0.3.

    python -m sedac_core.bench serving --minutes 0 --out docs/results/serving_cost.json

puts no load on. On a CPU: one client alone, and how much of the time between its tokens the counters take, whose work for one
step is timed apart. On a GPU: what counts in captured decode steps, as it is and not counting (counting.py). That wants an idle machine; the load does not.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import bench_dashboard, demo_model, serving
from .artifacts import Manifest
from .bench import percentile, results_file, spread
from .cli import positive
from .collection import read_documents
from .load import KEY, Answer, Load, answers, compared, excess, refused, tally_of, vllm_bench
from .policy import choices
from .served_counts import counted, difference, settled
from .serving import Server
from .setting_changes import settings_change
from .settings import Settings
from .soak import Watch

ALONE_MINUTES = 0.5  # of one client
FLAT = {"memory": 0.5, "files": 0.1, "metrics_folder": 0.01}  # growth a minute, MiB or files, that counts as none
SOAK = 20.0  # minutes of load from which on growth is judged: in shorter runs caches are still filling
ROUNDING = (
    0.5  # nats between two tokens that rounding in bfloat16 cannot turn: stock's own reach 0.125, a step of its logits
)
WRONG = ("offf", "OFF", "aggresive")
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench serving", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", default="default", help="model folder, Hub name or 'default' (default: %(default)s)")
    option("--probe-dir", type=Path, default=Path("sedac_data"), help="its artefact (default: %(default)s)")
    option("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    option("--minutes", type=float, default=10.0, help="of load; 0 for the counters' cost (default: %(default)s)")
    option("--concurrency", type=positive, default=64, help="requests in flight (default: %(default)s)")
    option("--max-tokens", type=positive, default=32, help="of an answer (default: %(default)s)")
    option("--prompts", type=positive, default=32, help="of Python's documentation (default: %(default)s)")
    option("--prometheus", default=shutil.which("prometheus"), help="its program (default: the one on PATH, if any)")
    option("--dashboard", type=Path, help="where to draw what Prometheus saw, such as docs/dashboard.png")
    option("--log-dir", type=Path, default=Path("reports"), help="for logs, samples, metrics (default: %(default)s)")
    option("--out", type=Path, default=Path("docs/results/serving.json"))
    option("vllm", nargs=argparse.REMAINDER, metavar="-- VLLM ARGUMENTS", help="passed on to both servers")
    arguments = parser.parse_args()
    arguments.vllm = arguments.vllm[1:] if arguments.vllm[:1] == ["--"] else arguments.vllm
    if not (arguments.minutes == 0 or 0.5 <= arguments.minutes < math.inf):
        parser.error("--minutes is 0 or at least 0.5: memory has no trend in less")
    if arguments.dashboard and not (arguments.prometheus and arguments.minutes):
        parser.error(
            "--dashboard needs load and Prometheus: install it (Debian: apt install prometheus) or name --prometheus"
        )
    model = demo_model.resolve(arguments.model)
    prompts = [text[:240] for text in read_documents("pydoc") if len(text) > 240][: arguments.prompts]
    known = {"system": "sedac", "model": Path(model).name, "phase": "serving", "dtype": arguments.dtype}
    known |= {"policy": Manifest.load(arguments.probe_dir).policy, "max_tokens": arguments.max_tokens}
    records: list[dict[str, Any]] = []
    for found in (under_load if arguments.minutes else cost)(arguments, model, prompts):
        records += [{**known, **record} for record in found]
        results_file(arguments.out, records)  # whatever ends a long run, what was found is kept
    bad = faults(records)
    for fault in bad:
        print(f"fault: {fault}", file=sys.stderr)
    print(json.dumps({"results": str(arguments.out), "faults": bad}))
    return 1 if bad else 0


def server(name: str, model: str, arguments: argparse.Namespace) -> Server:
    """A SEDAC server, or with the name 'stock' one without."""
    args = ["--dtype", arguments.dtype, "--max-model-len", "512", "--enable-prompt-tokens-details", *arguments.vllm]
    settings = {"SEDAC_ENABLED": "0", "VLLM_API_KEY": KEY}
    if name != "stock":
        settings |= {"SEDAC_ENABLED": "1", "SEDAC_ADAPTIVE": "0", "SEDAC_PROBE_DIR": str(arguments.probe_dir.resolve())}
        settings["SEDAC_ADMIN"] = "loopback"
        args += ["--middleware", "sedac_core.control.Admin", "--worker-extension-cls", "sedac_core.control.Worker"]
    settings["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB: small, so that it is soon all in use and memory shows what grows
    return Server(model, arguments.log_dir / f"{name}.log", settings, args, name=name)


def under_load(arguments: argparse.Namespace, model: str, prompts: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The records, part by part."""
    minutes, size = arguments.minutes, arguments.max_tokens
    known = {"concurrency": arguments.concurrency, "minutes": minutes}
    stock, sedac = server("stock", model, arguments), server("sedac", model, arguments)
    with contextlib.ExitStack() as stack:
        both = not serving.is_cpu_build()  # a GPU has room for both, and a start takes a minute
        for each in (stock, sedac) if both else (stock,):
            stack.callback(each.stop)
            each.launch()
        stock.wait_until_ready()
        wanted = asyncio.run(answers(stock, prompts, size))
        control = None
        if arguments.dtype != "float32":  # how far rounding alone carries answers, with no SEDAC in it
            together = tally_of(asyncio.run(answers(stock, prompts, size, at_once=True)), wanted)
            found = [{"load": "all at once, stock", **record} for record in compared(None, together)]
            control = Load(stock, prompts, size, minutes / 6, (None,), wanted)
            asyncio.run(control.run(arguments.concurrency))
            found += control.records("openai, stock")
            yield [{**known, **record, "system": "stock"} for record in found]
        stock.stop()
        if not both:
            stack.callback(sedac.stop)
            sedac.launch()
        sedac.wait_until_ready()
        kinds = kinds_of_requests(arguments)
        found, own = one_at_a_time(sedac, prompts, wanted, size, kinds)
        yield [{**known, **record} for record in found]
        if arguments.prometheus:
            folder = arguments.log_dir / "prometheus"
            prometheus = stack.enter_context(bench_dashboard.Prometheus(sedac.url, folder, arguments.prometheus))
        start = time.time()
        with Watch(sedac, arguments.log_dir / "soak.csv", "openai") as watch:
            load = Load(sedac, prompts, size, minutes * 2 / 3, kinds, wanted)
            before = settled(sedac)
            asyncio.run(load.run(arguments.concurrency))
            found = load.records("openai") + counted(difference(settled(sedac), before), load, model, arguments.dtype)
            if control is not None:
                more = excess(load.tallies["off"], control.tallies[None])
                found.append({"load": "openai", "metric": "unlike_stock_excess", **more, "unit": "share"})
            yield [{**known, **record} for record in found]
            rest = max(2, round(len(load.gaps) / 2))  # requests: half of what two thirds of the time have brought
            watch.load = "vllm bench serve"
            folder = arguments.log_dir.resolve()
            found = vllm_bench(sedac, prompts, wanted, size, arguments.concurrency, rest, folder)
        yield [{**known, **record} for record in found + watch.records()]
        if arguments.dashboard:
            bench_dashboard.draw(prometheus.url, start, time.time(), arguments.dashboard)
        yield [{**known, **record} for record in settings_change(sedac, prompts, wanted, own, arguments)]


def kinds_of_requests(arguments: argparse.Namespace) -> tuple[str | None, ...]:
    """What clients choose, in turn; the last one is a preset where this artefact has any."""
    offered = choices(Settings(probe_dir=arguments.probe_dir, adaptive=False), Manifest.load(arguments.probe_dir))
    return "off", None, "off", "balanced" if "balanced" in offered else offered[-1] if len(offered) > 1 else None


def one_at_a_time(
    sedac: Server, prompts: list[str], wanted: list[Answer], size: int, kinds: Sequence[str | None]
) -> tuple[list[dict[str, Any]], list[Answer]]:
    """Answers that no other request rounds otherwise, by each choice; and those of requests that chose nothing."""
    own = asyncio.run(answers(sedac, prompts, size))
    off = asyncio.run(answers(sedac, prompts, size, "off"))
    records = compared(None, tally_of(own, wanted)) + compared("off", tally_of(off, wanted))
    reused = sum(answer.cached for answer in off)  # of prompts that have been there, under other settings
    records.append({"metric": "reused_from_another_choice", "value": reused, "unit": "tokens"})
    again = asyncio.run(answers(sedac, prompts, size, "off"))
    records.append({"metric": "reused_from_the_same", "value": sum(a.cached for a in again), "unit": "tokens"})
    if kinds[-1]:
        records += compared(kinds[-1], tally_of(asyncio.run(answers(sedac, prompts, size, kinds[-1])), wanted))
    refusals = asyncio.run(refused(sedac, prompts[0], WRONG))
    records += [{"metric": "wrong_choices", "value": len(WRONG), "unit": ""}]
    records += [{"metric": "wrong_choices_refused", "value": refusals, "unit": ""}]
    return [{"load": "one at a time", **record} for record in records], own


# ---------------------------------------------------------------- verdict


def faults(records: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, in words: failures, answers of opted-out requests that are not stock's, wrong figures, growth."""
    found = []
    own = [record for record in records if record.get("system") != "stock"]
    for record in own:
        metric, value, load = record["metric"], record["value"], record.get("load")
        if metric in MUST_BE_NONE and value:
            found.append(f"{value} {MUST_BE_NONE[metric]} under the load of {load}")
        if metric == "unlike_stock" and value and record.get("dtype", "float32") == "float32":
            found.append(f"{value} unlike stock under the load of {load}")
        if metric == "gap_nats" and record["high"] > ROUNDING:
            found.append(
                f"an answer under {load} parts from stock's where that preferred its own token by {record['high']:.3g} nats: "
                "no rounding does that"
            )
        grows = metric.removesuffix("_growth")
        if metric != grows and record["minutes"] >= SOAK and value > FLAT[grows]:
            found.append(
                f"{grows.replace('_', ' ')} grows by {value:.3g} {record['unit']} under {load}, {FLAT[grows]} count as none"
            )
    refusals = {record["metric"]: record["value"] for record in own if record["metric"].startswith("wrong_choices")}
    if len(set(refusals.values())) > 1:
        found.append(f"{refusals['wrong_choices_refused']} of {refusals['wrong_choices']} wrong choices were refused")
    shares = [(record["saves"], record["value"], record["setting"]) for record in own if "saves" in record]
    for (low, less, first), (high, more, second) in zip(sorted(shares), sorted(shares)[1:], strict=False):
        if low < high and not less < more:
            found.append(
                f"the setting '{second}' saves {more:.3f} of the MLP bytes, no more than '{first}', {less:.3f}"
            )
    return found


MUST_BE_NONE = {
    "failures": "failures",
    "figures_wrong": "figures on /metrics that are not what was sent",
    "reused_from_another_choice": "cached tokens reused from another choice",
    "compiled_or_captured": "lines of the log that tell of compiling or capturing",
    "wrong_on_metrics": "settings that /metrics does not show",
}


# ---------------------------------------------------------------- what counting costs


def cost(arguments: argparse.Namespace, model: str, prompts: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The records, part by part."""
    if not serving.is_cpu_build():
        from . import counting

        yield from counting.records(model, arguments.probe_dir, arguments.dtype)
        return
    with server("sedac", model, arguments) as sedac:
        asyncio.run(answers(sedac, prompts, arguments.max_tokens))  # warm
        load = Load(sedac, prompts, arguments.max_tokens, ALONE_MINUTES)
        asyncio.run(load.run(1))
    gap = percentile([gap for gaps in load.gaps for gap in gaps], 0.5)
    costs = costs_of_a_step()
    shares = [{"metric": "metrics_cost_share", **spread([cost / gap for cost in costs]), "unit": ""}]
    shares += [{"metric": "metrics_cost_us", **spread([1e6 * cost for cost in costs]), "unit": "µs"}]
    yield [{"concurrency": 1, **record} for record in load.records("openai") + shares]


def costs_of_a_step() -> list[float]:
    """Seconds that counting takes in a decode step of one token, in a process that counts as the worker does; nine times."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder}
        done = subprocess.run([sys.executable, "-c", STEP], env=environment, check=True, capture_output=True)
    return [float(line) for line in done.stdout.split()]
