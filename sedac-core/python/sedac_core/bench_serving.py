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
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import bench_dashboard, demo_model, serving
from .artifacts import Manifest
from .bench import percentile, results_file, spread
from .cli import SedacError, positive
from .collection import read_documents
from .load import KEY, Answer, Load, answers, compared, excess, refused, tally_of, vllm_bench
from .policy import choices
from .serving import Server
from .settings import Settings
from .soak import Watch

ALONE_MINUTES = 0.5  # of one client
FLAT = {"memory": 0.5, "files": 0.1, "metrics_folder": 0.01}  # growth a minute, MiB or files, that counts as none
SOAK = 20.0  # minutes of load from which on growth is judged: in shorter runs caches are still filling
ROUNDING = (
    0.5  # nats between two tokens that rounding in bfloat16 cannot turn: stock's own reach 0.125, a step of its logits
)
WRONG = ("offf", "OFF", "aggresive")
FEW = 4  # clients while settings change: where steps are small, whatever is skipped is saved
SETTLED = 0.5  # seconds until what was counted before has come to /metrics
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


# ---------------------------------------------------------------- what the counters say


def settled(server: Server) -> dict[str, float]:
    """Its counters, of all that is done; `SedacError` where its worker's are not among them."""
    time.sleep(SETTLED)
    found = serving.counters(server.url)
    if not by_label(found, "sedac_mlp_bytes_total"):
        said = f"/metrics of {server.name} shows none of its worker's counters: do they have room in the temporary folder? "
        raise SedacError(said + serving.log_says(server.log))
    return found


def difference(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in now.items()}


def by_label(seen: dict[str, float], name: str) -> dict[str, float]:
    """`sedac_steps_by_path_total{path="dense"}` and the like, by the label's value; layers rise."""
    found = {key.split('"')[1]: value for key, value in seen.items() if key.startswith(f"{name}{{")}
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def saved_share(seen: dict[str, float]) -> float:
    parts = by_label(seen, "sedac_mlp_bytes_total")
    return 1 - parts["read"] / parts["stock"]


def counted(seen: dict[str, float], load: Load, model: str, dtype: str) -> list[dict[str, Any]]:
    """What the server counted under a load, and how much of it is not what the clients were answered."""
    config = json.loads((Path(model) / "config.json").read_text())
    layers = config["num_hidden_layers"]
    mlp = 3 * config["hidden_size"] * config["intermediate_size"] * (4 if dtype == "float32" else 2)  # bytes
    sent = sum(tally.tokens for tally in load.tallies.values())
    tokens, off = seen["sedac_tokens_total"], seen.get('sedac_fallback_tokens_total{reason="request"}', 0)
    rows = {name: seen[f"sedac_mlp_rows_{name}_total"] for name in ("computed", "saved")}
    bytes_of, paths = by_label(seen, "sedac_mlp_bytes_total"), by_label(seen, "sedac_steps_by_path_total")
    pairs = {
        "tokens": (tokens, sent),
        "tokens of requests that opted out": (off, load.tallies["off"].tokens),
        "steps by path": (sum(paths.values()), seen["sedac_forward_steps_total"]),
        "MLP rows": (sum(rows.values()), layers * tokens),
        "bytes that stock needs": (bytes_of["stock"], layers * tokens * mlp),
    }
    levels = by_label(seen, "sedac_mlp_level_rows_total")
    if levels:
        pairs["MLP rows by level"] = (sum(levels.values()), layers * tokens)
        pairs["MLP rows at level 0 that opting out leaves"] = (max(levels["0"], layers * off), levels["0"])
    else:
        pairs["bytes read"] = (bytes_of["read"], rows["computed"] * mlp)
    exits, reached = by_label(seen, "sedac_exits_total"), tokens
    for layer in exits:
        decided = {
            name: seen.get(f'sedac_decisions_total{{checkpoint="{layer}",decision="{name}"}}', 0.0)
            for name in ("exit", "run", "not_finite")
        }
        pairs[f"decisions at layer {layer}"] = (sum(decided.values()), reached)
        pairs[f"risks at layer {layer}"] = (
            seen[f'sedac_risk_bucket{{checkpoint="{layer}",le="+Inf"}}'],
            reached - decided["not_finite"],
        )
        pairs[f"exits at layer {layer}"] = (decided["exit"], exits[layer])
        reached -= decided["exit"]
    wrong = [name for name, (here, there) in pairs.items() if not math.isclose(here, there, rel_tol=1e-9)]
    for name in wrong:
        print(f"counted: {name}: {pairs[name][0]:.12g}, not {pairs[name][1]:.12g}", file=sys.stderr)
    found = {"tokens_sent": sent, "tokens_counted": tokens, "figures_compared": len(pairs), "figures_wrong": len(wrong)}
    records = [{"metric": name, "value": value, "unit": ""} for name, value in found.items()]
    records += [{"metric": "steps", "path": path, "value": value, "unit": ""} for path, value in paths.items() if value]
    for layer, number in exits.items():
        records.append({"metric": "exits", "checkpoint": int(layer), "value": number / tokens, "unit": "share"})
    for level, number in levels.items():
        records.append(
            {"metric": "rows_at_level", "level": int(level), "value": number / layers / tokens, "unit": "share"}
        )
    for reason, number in by_label(seen, "sedac_fallback_tokens_total").items():
        records.append({"metric": "fallback", "reason": reason, "value": number / tokens, "unit": "share"})
    records.append({"metric": "saved_bytes", "value": saved_share(seen), "unit": "share"})
    return [{"load": "openai", **record} for record in records]


# ---------------------------------------------------------------- settings that change under load


@dataclasses.dataclass
class Setting:
    name: str
    change: dict[str, Any]  # what the admin call asks for
    saves: int  # more than settings of lower numbers


def settings_of(now: dict[str, Any]) -> list[Setting]:
    """Settings for a server in its own, `now`: some that save less and more, off, and back."""
    if now["policy"] == "hard":
        own = [float(value) for value in now["thresholds"]]
        steps = [{"thresholds": [factor * value for value in own]} for factor in (0.5, 2.0, 1.0)]
    else:
        steps = [{"log_lambda": now["log_lambda"] + step} for step in (-1.0, 1.0, 0.0)]
    less, more, back = steps
    beyond = {"beyond_certificate": True}
    return [
        Setting("less", less, 1),
        Setting("more", {**more, **beyond}, 3),
        Setting("off", {"enabled": False}, 0),
        Setting("on again", {"enabled": True, **back}, 2),
    ]


def settings_change(
    sedac: Server, prompts: list[str], wanted: list[Answer], own: list[Answer], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """What each admin call does to a server at work: the share of MLP bytes saved, the time between tokens, /metrics, the log,
    and answers one at a time where SEDAC is off and where it is back."""
    seconds = min(10.0, 6 * arguments.minutes)
    log_before = len(sedac.log.read_text(errors="replace"))
    now = json.loads(serving.get(sedac.url, "/sedac", api_key=KEY))["now"]
    load = Load(sedac, prompts, arguments.max_tokens, math.inf)
    records = []
    with running(load, FEW):
        for setting in (Setting("as it stands", {}, 2), *settings_of(now)):
            called = time.perf_counter()
            told = serving.post(sedac.url, "/sedac", setting.change, api_key=KEY)["now"] if setting.change else now
            taken = time.perf_counter() - called
            before, begin = settled(sedac), time.perf_counter()
            time.sleep(seconds)
            seen, after = difference(serving.counters(sedac.url), before), serving.counters(sedac.url)
            gaps = gaps_between(load, begin, time.perf_counter())
            told_right = in_force(after, told)
            found = [
                {"metric": "saved_bytes", "value": saved_share(seen), "unit": "share", "saves": setting.saves},
                {"metric": "mean_itl_ms", "value": 1000 * sum(gaps) / len(gaps), "unit": "ms"},
                {"metric": "longest_itl_ms", "value": 1000 * max(gaps), "unit": "ms"},
                {"metric": "call_ms", "value": 1000 * taken, "unit": "ms"},
                {"metric": "wrong_on_metrics", "value": int(not told_right), "unit": ""},
            ]
            records += [{"setting": setting.name, **record} for record in found]
    records.append({"metric": "failures", "value": len(load.failures), "unit": ""})
    log = sedac.log.read_text(errors="replace")[log_before:]
    records.append({"metric": "requests", "value": len(load.gaps), "unit": ""})
    records.append({"metric": "changes_logged", "value": log.count("SEDAC changed by an admin call"), "unit": ""})
    compiled = re.findall(r"(?i)^.*(?:captur|compil|dynamo).*$", log, re.MULTILINE)
    for line in compiled:
        print(f"log: {line}", file=sys.stderr)
    records.append({"metric": "compiled_or_captured", "value": len(compiled), "unit": "lines of the log"})
    size = arguments.max_tokens
    serving.post(sedac.url, "/sedac", {"enabled": False}, api_key=KEY)
    off = tally_of(asyncio.run(answers(sedac, prompts, size)), wanted)
    records += [
        {"setting": "off", **record} for record in compared("off", off)
    ]  # held to stock's like those that opt out
    serving.post(sedac.url, "/sedac", {"enabled": True}, api_key=KEY)
    back = tally_of(asyncio.run(answers(sedac, prompts, size)), own)
    records.append({"setting": "on again", "metric": "unlike_before", "value": back.unlike(), "unit": ""})
    return [{"load": "settings change", **record} for record in records]


@contextlib.contextmanager
def running(load: Load, concurrency: int) -> Iterator[None]:
    """A load in a thread of its own, until the block ends."""
    thread = threading.Thread(target=lambda: asyncio.run(load.run(concurrency)))
    thread.start()
    try:
        yield
    finally:
        load.end = True
        thread.join()


def gaps_between(load: Load, begin: float, end: float) -> list[float]:
    """Seconds between tokens of requests that were answered, of those that came between the two times."""
    found = [gap for at, gap in list(load.times) if begin <= at <= end]
    if not found:
        raise SedacError(f"no answer came from {load.server.url} in {end - begin:.0f} s: read {load.server.log}")
    return found


def in_force(counters: dict[str, float], told: dict[str, Any]) -> bool:
    """Whether /metrics shows the settings that the admin call says are in force."""
    if bool(counters.get('sedac_calibration{state="switched off"}')) == told["enabled"]:
        return False
    if not told["enabled"]:
        return True
    if told["policy"] == "hard":
        shown = list(by_label(counters, "sedac_threshold").values())
        wanted = [float(value) for value in told["thresholds"]]
    else:
        shown, wanted = [by_label(counters, "sedac_log_lambda")[told["source"]]], [told["log_lambda"]]
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(shown, wanted, strict=True))


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
