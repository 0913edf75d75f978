"""`python -m sedac_core.bench results`: docs/RESULTS.md and its figure, from the files in docs/results.

Nothing is typed by hand: every number of the page is a record of a results file, and the page says which run it is from.
"""

import argparse
import json
from pathlib import Path

from .artifacts import replacing
from .bench import read_results
from .report import RC, pareto_figure, quality_tables
from .results_gpu import draw
from .results_tables import SECTIONS, Record, cells, find, percent, section, table, text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench results", description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    docs = parser.parse_args().docs
    with replacing(docs / "RESULTS.md") as temporary:
        temporary.write_text(page(docs / "results"), encoding="utf-8")
    gpu = docs / "results" / "gpu_h200.json"
    if gpu.exists():
        draw(read_results(gpu)["records"], docs / "gpu_h200.svg")
    for path in sorted((docs / "results").glob("quality_*.json")):
        draw_quality(read_results(path)["records"], docs)
    print(json.dumps({"page": str(docs / "RESULTS.md")}))


def page(folder: Path) -> str:
    """The Markdown of all results files in a folder that have a section here."""
    parts = ["# Results", "", "Made by `python -m sedac_core.bench results` from the files in [results](results).", ""]
    for name, (title, lines) in SECTIONS.items():
        for path in sorted(folder.glob(f"{name}.json")):
            results = read_results(path)
            models = {record.get("model") for record in results["records"]}
            of = f", {models.pop()}" if "*" in name and len(models) == 1 else ""
            parts += [f"## {title}{of}", "", *lines(results["records"]), ""]
            parts += [*origin(path.name, results["provenance"]), ""]
    return "\n".join(parts)


def origin(name: str, provenance: Record) -> list[str]:
    """Where the figures of a file come from."""
    found = []
    for run in provenance.get("runs", [provenance]):
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        commit = (run["commit"] or "unknown")[:10] + (" and changes" if run["dirty"] else "")
        found.append(
            f"[{name}](results/{name}): `{run['command']}`, {run['date'][:10]}, {run['hardware']}; commit {commit}; {versions}."
        )
    return found


@section("core", "The Rust core")
def core(records: list[Record]) -> list[str]:
    rows = []
    for tokens in (1, 8, 256, 65_536, 4_000_000):
        time = find(records, system="rust", kernel="evaluate", tokens=tokens, metric="time_us")
        numpy = find(records, system="rust", baseline="numpy", kernel="evaluate", tokens=tokens, metric="speedup")
        torch = find(records, system="rust", baseline="torch", kernel="evaluate", tokens=tokens, metric="speedup")
        rows.append([f"{tokens:,}", text(time, " µs", 2), text(numpy, "x", 1), text(torch, "x", 1)])
    lines = table(["tokens × 3 checkpoints", "Rust", "against NumPy", "against torch"], rows)
    share = find(records, metric="bandwidth_share")
    sweep = find(records, kernel="sweep", baseline="numpy")
    lines += ["", f"Share of the machine's copy bandwidth at 4,000,000 tokens: {text(share, '', 2)}. "
              f"A sweep of 10,000 settings over 1,000,000 tokens: {text(sweep, 'x', 0)} a NumPy loop."]  # fmt: skip
    reads = [r for r in records if r.get("harness") == "criterion" and str(r.get("kernel")).startswith("read")]
    if reads:
        lines += ["", *table(["threshold read", "time"], [[r["kernel"], text(r, " ns", 1)] for r in reads])]
    return lines


@section("cpu_server", "vLLM's server on a CPU, the default model, two cores")
@section("cpu", "vLLM on a CPU, the default model, both engines in one process")
@section("cpu_gates_*", "Gates in vLLM on a CPU, both engines in one process")
def cpu(records: list[Record]) -> list[str]:
    rows = []
    for case in dict.fromkeys(r["case"] for r in records):
        own = [r for r in records if r["case"] == case]
        for speed in [r for r in own if r["metric"] == "speedup"]:
            where = {key: speed[key] for key in ("phase", "batch", "tokens") if key in speed}
            saved = find(own, metric="mlp_rows_saved", **where) or find(own, metric="saved_bytes", **where)
            rows.append([case, " ".join(map(str, where.values())), text(speed, "x"), text(saved, "", 2), "–"])
        ratio = find(own, metric="ppl_ratio")
        if ratio is not None:
            saved = find(own, metric="mlp_rows_saved", text=ratio["text"])
            rows.append([case, f"perplexity on {ratio['text']}", "–", text(saved, "", 2), text(ratio, "x")])
    head = ["case", "phase and size", "speed-up against stock", "MLP rows or bytes saved", "perplexity against stock"]
    return table(head, rows)


@section("serving", "A server under mixed load")
def serving(records: list[Record]) -> list[str]:
    names = {
        "requests": "answered", "failures": "failed", "opted_out": "opted out", "unlike_stock": "of these, unlike stock",
        "requests_per_second": "a second", "p50_itl_ms": "between tokens, median", "p99_itl_ms": "99 %",
    }  # fmt: skip
    digits, units = {"requests_per_second": 1}, {"p50_itl_ms": " ms", "p99_itl_ms": " ms"}
    rows = []
    for load in dict.fromkeys(r["load"] for r in records if r["metric"] == "requests"):
        own = [find(records, load=load, metric=name) for name in names]
        rows.append([load, *(text(r, units.get(n, ""), digits.get(n, 0)) for n, r in zip(names, own, strict=True))])
    first = records[0]
    whose = {"openai": "the openai package", "vllm bench serve, opted-out": "two of `vllm bench serve`"}
    taken = [(find(records, load=load, metric="minutes_taken"), name) for load, name in whose.items()]
    minutes = " and ".join(f"{text(record, '', 1)} minutes by {name}" for record, name in taken)
    lines = [f"{first['concurrency']} requests in flight, {minutes}; {first['model']}, answers of {first['max_tokens']} tokens. This tests stability, "
             "beside whatever else the machine had to do: times say little about speed.", "", *table(["load", *names.values()], rows)]  # fmt: skip
    rows = []
    for load in dict.fromkeys(r["load"] for r in records if r["metric"] == "memory_growth"):
        for name, metric in (
            ("memory", "memory_mib"),
            ("files", "files_open"),
            ("metrics_folder", "metrics_folder_mib"),
        ):
            medians = [find(records, load=load, metric=metric, third=third) for third in ("first", "last")]
            growth = find(records, load=load, metric=f"{name}_growth")
            rows.append([load, metric.replace("_", " "), *(text(r, "", 1) for r in medians), text(growth, "", 3)])
    head = [
        "load",
        "all processes of the server",
        "median, first third",
        "last third",
        "growth a minute, last two thirds",
    ]
    note = "Growth is the Theil–Sen slope with its 95 % interval; memory that processes share counts in each."
    return [*lines, "", *table(head, rows), "", note]


@section("serving_cost", "What the counters take of a decode step")
def serving_cost(records: list[Record]) -> list[str]:
    share, cost = find(records, metric="metrics_cost_share"), find(records, metric="metrics_cost_us")
    gap = find(records, metric="p50_itl_ms")
    return [
        f"One client alone, {records[0]['model']}: {text(cost, ' µs', 1)} for counting in a step, {text(gap, ' ms', 1)} between tokens: "
        f"{text(share and percent(share), ' %', 3)}."
    ]


POLICIES = {"hard": "A cascade of three entropy probes", "gates": "Gates in every layer"}
SERVED = {  # by metric: its column, and how it is written
    "requests": ("answered", "", 0), "failures": ("failed", "", 0), "opted_out": ("compared", "", 0),
    "unlike_stock": ("unlike stock alone", "", 0), "gap_nats": ("where they part, stock preferred its token by", " nats", 2),
    "drift_nats": ("until then log-probabilities differ by", " nats", 3), "p50_tpot_ms": ("between tokens", " ms", 2),
}  # fmt: skip
OTHERS = {
    "opted_out": "answers",
    "unlike_stock": "unlike",
    "gap_nats": "other_gap_nats",
}  # of answers that did not opt out
SETTINGS = {
    "saved_bytes": ("MLP bytes saved", "", 3), "mean_itl_ms": ("between tokens", " ms", 2),
    "longest_itl_ms": ("the longest", " ms", 0), "call_ms": ("the call took", " ms", 0),
}  # fmt: skip
COUNTING = {
    "step_us": ("captured step", " µs", 1), "counting_us": ("of it counting", " µs", 2),
    "counting_known_to_us": ("known to", " µs", 2), "counting_share": ("share", " %", 2),
    "polling_share": ("slower while polled", " %", 2), "polling_processor_share": ("polling's share of a processor", " %", 2),
}  # fmt: skip


@section("serving_gpu", "A server on a GPU, in captured CUDA graphs")
def serving_gpu(records: list[Record]) -> list[str]:
    first = find(records, phase="serving")
    lines = [
        f"{first['model']} in {first['dtype']}, {first['concurrency']} requests in flight, answers of {first['max_tokens']} tokens. Compared "
        "are answers of requests that opted out, and stock's own, with what stock answers to one request at a time: in batches of other sizes "
        "rounding alone makes right answers part. Gaps and differences are medians, with the least and the greatest.",
    ]
    for policy in dict.fromkeys(r["policy"] for r in records):
        own = [r for r in records if r["policy"] == policy and r["phase"] == "serving"]
        only_stock = all(r["system"] == "stock" for r in own)
        title = "Stock's own answers; SEDAC's were not reached" if only_stock else POLICIES[policy]
        lines += ["", f"### {title}", "", *served(own)]
        lines += ["", *changed(own)] if any("saves" in r for r in own) else []
    rows = []
    for step in [r for r in records if r["metric"] == "step_us"]:
        where = {key: step[key] for key in ("policy", "batch")}
        own = [find(records, metric=metric, **where) for metric in COUNTING]
        own = [percent(r) if r and unit == " %" else r for r, (_, unit, _) in zip(own, COUNTING.values(), strict=True)]
        rows.append([f"{step['policy']}, {step['batch']}", *cells(own, COUNTING)])
    head = ["policy, requests in a step", *(name for name, *_ in COUNTING.values())]
    return [*lines, "", "### What counting costs", "", *table(head, rows)] if rows else lines


def served(records: list[Record]) -> list[str]:
    rows = []
    for load in dict.fromkeys(r["load"] for r in records if r["metric"] in ("requests", "answers", "opted_out")):
        stock = find(records, load=load).get("system") == "stock"
        own = [r for r in records if r["load"] == load and "setting" not in r and (stock or "choice" not in r)]
        rows.append([load, *cells([find(own, metric=OTHERS.get(m, m) if stock else m) for m in SERVED], SERVED)])
    return table(["load", *(name for name, *_ in SERVED.values())], rows)


def changed(records: list[Record]) -> list[str]:
    rows = []
    for setting in dict.fromkeys(r["setting"] for r in records if "saves" in r):
        rows.append([setting, *cells([find(records, setting=setting, metric=m) for m in SETTINGS], SETTINGS)])
    return table(["settings, changed under load", *(name for name, *_ in SETTINGS.values())], rows)


@section("adaptive", "The exit rates that adaptive thresholds hold")
def adaptive(records: list[Record]) -> list[str]:
    first = records[0]
    rows = []
    for size in dict.fromkeys(r["tokens"] for r in records if r["metric"] == "window_miss"):
        own = [find(records, metric="window_miss", system=system, tokens=size) for system in ("adaptive", "fixed")]
        rows.append(
            [f"{size:,}", *(f"{100 * r['value']:.2f}, {r['within']} of {r['windows']} within 2" for r in own if r)]
        )
    drift = find(records, metric="drift", system="adaptive") or {}
    targets = ", ".join(f"{rate:.0%}" for rate in first["targets"])
    lines = [
        f"{drift['tokens']:,} tokens of {first['text']} in each of {drift['orders']} orders, {first['model']}; targets {targets}; {first['requests']} "
        f"requests side by side, window {first['window']:,}, α {first['alpha']:g}. The greatest miss of a window, in points:",
        "",
        *table(["tokens of a window", "adaptive", "fixed at what is right for all of these tokens"], rows),
        "",
        f"From the first half to the second the rates move by {100 * drift['value']:.2f} points at most, on average over the orders.",
        "",
    ]
    rows = []
    for name in dict.fromkeys(r["text"] for r in records if r["metric"] == "tokens_to_hold"):
        off, held, most = (
            find(records, text=name, metric=metric)
            for metric in ("off_at_change", "tokens_to_hold", "tokens_to_hold_at_most")
        )
        rows.append(
            [name, f"{off['text_tokens']:,}", f"{100 * off['value']:.1f} points", text(held, "", 0), text(most, "", 0)]
        )
    head = ["then the text changes to", "tokens there are of it", "rates are off at first"]
    head += ["tokens until all are within 2 points", "in the slowest order"]
    return [
        *lines,
        *table(head, rows),
        "",
        "Rates are those of all checkpoints, the worst counts; `manual:de` is the German pages of the system's manual (Debian's).",
    ]


@section("target_default", "Whom to let exit: entropy, damage or chance, the default model, plain skipping")
def target(records: list[Record]) -> list[str]:
    names = {"random": "chance", "entropy_plain": "entropy probes", "sedac_plain": "damage probes"}
    rows = []
    for rate in dict.fromkeys(r["exit_rate"] for r in records):
        for system in names:
            own = [r for r in records if (r["exit_rate"], r["system"]) == (rate, system)]
            kl, top1, ppl = (find(own, metric=metric) for metric in ("kl", "top1_agreement", "ppl_ratio"))
            if kl is not None:
                rows.append(
                    [f"{rate:.0%}", names[system], f"{kl['saved_bytes']:.1%}", text(kl), text(top1), text(ppl, "x")]
                )
    first = records[0]
    head = ["exited by the last checkpoint", "chosen by", "MLP bytes saved", "KL, nats", "top-1 kept", "perplexity"]
    return [
        *table(head, rows),
        "",
        f"Checkpoints {', '.join(map(str, first['checkpoints']))}, the last {first['keep_last']} layers whole, on {first['text']} "
        f"that no probe was trained on; intervals over {first['repeats']} documents. Perplexity is over the full model's.",
    ]


@section("quality_*", "What saved bytes cost")
def quality(records: list[Record]) -> list[str]:
    model = records[0]["model"]
    lines = [f"![KL to the full model by saved MLP bytes](quality_{model}.svg)"] if pareto_figure(records) else []
    for title, head, rows in quality_tables(records):
        lines += ["", f"**{title}**", "", *table(head, rows)]
    return lines


@section("training_memory", "Memory that training gates takes")
def training_memory(records: list[Record]) -> list[str]:
    rows = []
    for record in records:
        if record["metric"] != "reserved":
            continue
        held = find(records, **{key: record[key] for key in ("model", "levels_in", "tokens")}, metric="allocated")
        name, tokens = f"{record['model']}, {record['weights']} weights", f"{record['tokens']:,}"
        rows.append([name, record["levels_in"], tokens, text(record, " GiB", 1), text(held, " GiB", 1)])
    lines = table(["model", "levels in", "tokens a step", "memory taken, at most", "of it in use"], rows)
    return [*lines, "", "With `--gradient-checkpointing`, on a GPU of which the process was given 23.5 GiB."]


@section("certificate_*", "What a certified price saves")
def certificate(records: list[Record]) -> list[str]:
    saved, kl, top1, ppl = (find(records, metric=m) for m in ("saved_bytes", "kl", "top1_agreement", "ppl_ratio"))
    bound = find(records, metric="certified_bound")
    return [
        f"{bound['documents']:,} documents of {bound['text']} that training held out: {bound['loss']}, is certified to stay under {bound['value']:g} in "
        f"expectation, with confidence {bound['confidence']:g} (mean {bound['mean_loss']:.4f}, p = {bound['p_value']:.2g}).",
        "",
        *table(
            ["log λ", "MLP bytes saved", "KL, nats", "top-1 kept", "perplexity"],
            [[f"{bound['log_lambda']:.3f}", text(saved), text(kl, "", 4), text(top1), text(ppl, "x")]],
        ),
    ]


def draw_quality(records: list[Record], docs: Path) -> None:
    """KL by saved bytes, `docs/quality_MODEL.svg`."""
    import matplotlib

    with matplotlib.rc_context({**RC, "svg.hashsalt": "sedac"}):
        figure = pareto_figure(records)
        if figure is not None:
            with replacing(docs / f"quality_{records[0]['model']}.svg") as temporary:
                figure.savefig(temporary, format="svg", metadata={"Date": None})
