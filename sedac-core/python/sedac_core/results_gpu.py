"""What `bench gpu` found, as sections of docs/RESULTS.md, and the README's figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .artifacts import replacing
from .results_tables import Record, find, section, table, text

TIMES = ["stock", "SEDAC", "speed-up", "graph alone: stock", "SEDAC", "speed-up", "ceiling"]  # columns of `times`


def times(records: list[Record], **where: Any) -> list[str]:
    """A row's figures: a step of the engine, a replay of its captured graph, and what was to be had at most."""
    cells = []
    for time, speed in (("time_ms", "speedup"), ("replay_ms", "replay_speedup")):
        cells += [text(find(records, metric=time, system=system, **where), " ms", 2) for system in ("stock", "sedac")]
        cells.append(text(find(records, metric=speed, **where), "x"))
    return [*cells, text(find(records, metric="theoretical_speedup", **where), "x", 2)]


def timed(records: list[Record], *conditions: str) -> list[Record]:
    """The conditions under which a speed-up was measured, each once."""
    keys = ("phase", "batch", "tokens", "prompts", "gathered", *conditions)
    measured = [r for r in records if r["metric"] in ("speedup", "replay_speedup")]
    found = [{key: r.get(key) for key in keys} for r in measured]
    return [where for place, where in enumerate(found) if where not in found[:place]]


def size(where: Record) -> str:
    several = f"{where['prompts']} × " if where.get("prompts") else ""
    gathered = ", gathered" if where.get("gathered") else ""
    return f"{where['phase']} {several}{where.get('batch') or where['tokens']}{gathered}"


def of_the_line(records: list[Record], share: str, *conditions: str) -> list[str]:
    """A sentence on prefill in which a part of the tokens exits or narrows: the time that it saves, of that part of what all tokens
    save, if that is 5 % of their time at least. More than all of it is saved where the host keeps the GPU from what all tokens could
    save. `share` names the part in records."""
    found: dict[float, list[str]] = {}
    for where in timed(records, share, *conditions):
        part = where[share]
        some, every = (find(records, metric="speedup", **where | {share: rate}) for rate in (part, 1))
        if some and every and where["phase"] == "prefill" and 0 < part < 1 and every["value"] >= 1.05:
            kept = (1 - 1 / some["value"]) / (1 - 1 / every["value"]) / part
            found.setdefault(part, []).append(f"{kept:.0%} at {size(where).removeprefix('prefill ')}")
    return [
        f"Of the time that the line between nothing and everything saves at {part:.0%}, prefill saves {', '.join(sizes)}.\n"
        for part, sizes in found.items()
    ]


GRAPH_ALONE = (
    "A graph alone is vLLM's captured decode step, replayed by itself: all layers without LM head and sampling, and without the "
    "engine's Python, which takes longer than the GPU at large batches."
)


UNUSUAL = ("captured", "keep_last", "gathered", "levels_in")  # what records say of runs that are not the usual ones


def run_of(record: Record) -> tuple[Any, ...]:
    """The run of `bench gpu` that a record is of: the model, and what was unlike the usual."""
    return record["model"], *map(record.get, UNUSUAL)


def as_served(record: Record) -> bool:
    return not any(key in record for key in UNUSUAL)


def titled(records: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    """The records under each title, in the order in which it first comes."""
    found: dict[str, list[Record]] = {}
    for record in records:
        title = f"### {record['model']}, dummy weights"
        captured, keep_last = record.get("captured"), record.get("keep_last")
        if "checkpoint" in record:
            title += f", one checkpoint after layer {record['checkpoint']}"
        title += f", steps of up to {captured:,} tokens captured" if captured else ""
        if keep_last is not None:
            title += f", the last {keep_last} layers whole" if keep_last else ", to the last layer"
        title += ", levels in bits" if "levels_in" in record else ""
        found.setdefault(title, []).append(record)
    yield from found.items()


@section("gpu_h100*", "vLLM on an H100, inside CUDA graphs")
@section("gpu_h200*", "vLLM on an H200, inside CUDA graphs")
def gpu(records: list[Record]) -> list[str]:
    drawn = any(as_served(r) and r.get("phase") == "decode" for r in records) and len(set(map(run_of, records))) > 1
    lines = ["![speed-up by exit rate and batch size](gpu_h200.svg)", ""] if drawn else []
    for title, every in titled(records):
        rows = []
        for where in timed(every, "pattern", "exit_rate"):
            pattern = " (all or none)" if where["pattern"] == "all_or_none" else ""
            rows.append([size(where), f"{where['exit_rate']:.0%}{pattern}", *times(every, **where)])
        lines += [
            title,
            "",
            *table(["phase and size", "exits", *TIMES], rows),
            "",
            *of_the_line(every, "exit_rate", "pattern"),
        ]
    lines += [f"{GRAPH_ALONE} Ceilings count weight bytes in decode (an MLP's are read unless all rows have exited) and products of "
              "rows with weights in prefill, attention's own left out. Prefill of 512 tokens runs inside captured graphs."]  # fmt: skip
    return lines


@section("gpu_gates_h100*", "Gates in every layer, inside CUDA graphs on an H100")
@section("gpu_gates_h200*", "Gates in every layer, inside CUDA graphs on an H200")
def gpu_gates(records: list[Record]) -> list[str]:
    lines = []
    for title, every in titled(records):
        rows = []
        for where in timed(every, "narrowed", "width", "bits"):
            saved = find(every, metric="saved_bytes", **where)
            level = f"{where['bits']:g} bits" if where["bits"] else f"{where['width']:.0%}"
            narrowed = f"{where['narrowed']:.0%} to {level}"
            replayed = find(every, metric="replay_saved_bytes", **where)
            cells = [text(saved, "", 2), text(replayed, "", 2), *times(every, **where)]
            rows.append([size(where), narrowed, *cells])
        head = ["phase and size", "tokens narrowed, to which level", "MLP bytes saved", "by the graph alone", *TIMES]
        lines += [title, "", *table(head, rows), "", *of_the_line(every, "narrowed", "width", "bits")]
    return [
        *lines,
        f"{GRAPH_ALONE} It narrows what its own inputs narrow, the same in each replay. Bytes saved are those of each token by "
        "itself; a batch reads what any of its tokens needs.",
    ]


def draw(records: list[Record], path: Path) -> None:
    """Speed-up by exit rate at batch 1, and by batch size without exits and with all."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sedac"  # the same figure from the same records
    from matplotlib import pyplot

    random = [r for r in records if r.get("pattern") == "random" and as_served(r)]
    speeds = [r for r in random if r["metric"] == "speedup"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    for model in dict.fromkeys(r["model"] for r in random):
        one = [r for r in speeds if r["model"] == model and r.get("batch") == 1]
        if one:
            points(left, [r["exit_rate"] for r in one], one, model)
        replays = [r for r in random if r["model"] == model and r["metric"] == "replay_speedup"]
        engine = [r for r in speeds if r["model"] == model and r["phase"] == "decode" and r["batch"] <= 64]
        for rate, style in ((0, "--"), (1, "-")):
            few = sorted((r for r in replays or engine if r["exit_rate"] == rate), key=lambda r: r["batch"])
            points(right, [r["batch"] for r in few], few, f"{model}, {rate:.0%} exit", style)
    left.set(xlabel="share of tokens that exit", ylabel="decode speed-up against stock", title="batch 1")
    right.set(xlabel="batch size", title="no exits, all exit")
    right.set_xscale("log", base=2)
    for axes in (left, right):
        axes.axhline(1, color="grey", linewidth=0.8)
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if axes is right else {}
        axes.legend(fontsize=7, **beside)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def points(axes, x: list[float], records: list[Record], label: str, style: str = "-") -> None:
    middle = [r["value"] for r in records]
    below, above = [r["value"] - r["low"] for r in records], [r["high"] - r["value"] for r in records]
    axes.errorbar(x, middle, yerr=[below, above], label=label, linestyle=style, marker="o", markersize=3, capsize=2)
