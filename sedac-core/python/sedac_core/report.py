"""One self-contained HTML page from a results file: plots as inline SVG, tables, provenance; nothing from a network.

`simulation`, where there is one, is the offline cascade on held-out tokens:

    risk        {checkpoint: [tokens]}      the probe's output
    entropy     {checkpoint: [tokens]}      what it should be, nats
    thresholds  [grid]                      one threshold, the same at every checkpoint
    exit_rate   {checkpoint: [grid]}        share of tokens exited by the checkpoint, 0 to 1
    saved_rows  [grid]                      share of MLP rows saved, 0 to 1
"""

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from .artifacts import replacing

COLOURS = ("#9aa5b1", "#2563eb", "#0f9d8a", "#d97706", "#9333ea", "#dc2626", "#0891b2", "#65a30d")
MAX_POINTS = 3000  # a scatter of more shows no more
LAST = ("metric", "value", "unit", "low", "high", "repeats", "reason")  # the columns after a record's conditions
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff }
body { margin: 2.5rem auto; max-width: 68rem; padding: 0 1.5rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.quiet { color: #66727f } .failed { color: #b42318 } figure { margin: 1rem 0 } svg { width: 100%; height: auto }
figcaption { color: #66727f; font-size: .9rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem } th { text-align: left; color: #52606d; font-weight: 600 }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e4e7eb; vertical-align: top; white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums }
"""
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef1f4",
    "legend.frameon": False,
}


def write_report(
    path: Path | str, title: str, results: Mapping[str, Any], simulation: Mapping[str, Any] | None = None
) -> None:
    """Write the page, atomically; sections without data are left out.

    `results` is what `bench.results_file` returns. A record's `case` names its bar, otherwise its `system`; `measured`
    tells the stock a case was paired with ("baseline") from the case, otherwise `system` does.
    """
    records = [
        {"case": r.get("system"), "measured": "baseline" if r.get("system") == "stock" else "case"} | r
        for r in results["records"]
    ]
    with matplotlib.rc_context(RC):
        parts = [
            _heading(title, results["provenance"]),
            _failures(records),
            _speed(records),
            _perplexity(records),
            *_quality(results["records"]),
            *(_simulated(simulation) if simulation else ()),
            _section("Every record", _table(results["records"])),
            _section("Provenance", _table([{"": key, " ": value} for key, value in _flat(results["provenance"])])),
        ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )
    with replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _heading(title: str, provenance: Mapping[str, Any]) -> str:
    commit = (provenance.get("commit") or "no commit")[:10] + (" (tree changed)" if provenance.get("dirty") else "")
    facts = " · ".join(str(fact) for fact in (provenance.get("hardware"), commit, provenance.get("date")) if fact)
    return f'<h1>{html.escape(title)}</h1><p class="quiet">{html.escape(facts)}</p>'


def _section(title: str, body: str, caption: str = "") -> str:
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<h2>{html.escape(title)}</h2><figure class="wide">{body}{note}</figure>'


def _failures(records: Sequence[Mapping[str, Any]]) -> str:
    failed = [record for record in records if record["metric"] == "failed"]
    items = "".join(f"<li><b>{html.escape(r['case'])}</b>: {html.escape(r['reason'])}</li>" for r in failed)
    return f'<h2 class="failed">Failed cases</h2><ul class="failed">{items}</ul>' if failed else ""


def _speed(records: Sequence[Mapping[str, Any]]) -> str:
    """Tokens a second, decode by batch and prefill by length, stock's bar first, then one for each case."""
    rates = [record for record in records if record["metric"] == "tokens_per_second"]
    panels = [
        (phase, key, [r for r in rates if r.get("phase") == phase and key in r])
        for phase, key in (("decode", "batch"), ("prefill", "tokens"))
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return ""
    speedups = {
        (r["case"], r["phase"], r.get("batch"), r.get("tokens")): r["value"]
        for r in records
        if r["metric"] == "speedup"
    }
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    for axes, (phase, key, rows) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        sizes = sorted({row[key] for row in rows})
        names = ["stock", *dict.fromkeys(row["case"] for row in rows)]
        width = min(0.25, 0.8 / len(names))
        for i, name in enumerate(names):
            for place, size in enumerate(sizes):
                chosen = [
                    r for r in rows if r[key] == size and (r["measured"] == "baseline" if i == 0 else
                    r["case"] == name and r["measured"] == "case")
                ]  # fmt: skip
                if not chosen:
                    continue
                value, low, high = (float(np.median([r[field] for r in chosen])) for field in ("value", "low", "high"))
                x = place + (i - (len(names) - 1) / 2) * width
                label = name if place == 0 else None
                axes.bar(x, value, width * 0.92, color=COLOURS[i % len(COLOURS)], label=label)
                axes.errorbar(x, value, [[value - low], [high - value]], color="#52606d", linewidth=0.8)
                ratio = speedups.get((name, phase, chosen[0].get("batch"), chosen[0].get("tokens")))
                if i and ratio is not None:
                    axes.annotate(f"{ratio:.2f}x", (x, high), ha="center", va="bottom", fontsize=7, xytext=(0, 2),
                                  textcoords="offset points")  # fmt: skip
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.6, len(sizes) - 0.4)
        axes.margins(y=0.12)
        axes.set_xlabel("batch" if key == "batch" else "prompt tokens")
        axes.set_title(f"{phase.capitalize()}, tokens/s", loc="left")
        axes.grid(axis="x", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(names)))
    caption = "Medians; lines span low to high. Above a bar: speed-up against stock, paired round by round."
    return _section("Tokens a second against stock", _svg(figure, "speed"), caption)


def _perplexity(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [r for r in records if r["metric"] == "ppl" and r["measured"] == "case" and "budget" not in r]
    stock = [record["value"] for record in records if record["metric"] == "ppl" and record["measured"] == "baseline"]
    if not rows:
        return ""
    figure = Figure(figsize=(9.6, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        axes.errorbar(row["value"], place, xerr=error, fmt="o", color=COLOURS[1], markersize=5, linewidth=1.2)
        axes.annotate(
            f"{row['value']:,.2f}", (row["value"], place), xytext=(0, 5), textcoords="offset points", ha="center"
        )
    axes.set_xmargin(0.12)
    axes.axvline(stock[0], color=COLOURS[0], linestyle="--", label=f"stock {stock[0]:.2f}")
    rates = (f", exit rate {row['exit_rate']:.0%}" if row.get("exit_rate") is not None else "" for row in rows)
    axes.set_yticks(range(len(rows)), [row["case"] + rate for row, rate in zip(rows, rates, strict=True)])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xscale("log" if max(r["value"] for r in rows) > 5 * stock[0] else "linear")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="best")
    caption = (
        f"On {rows[0]['text']}, where exits fire in prefill; lines span a 95 % bootstrap interval over its windows."
    )
    return _section("Perplexity against stock", _svg(figure, "perplexity"), caption)


# ---------------------------------------------------------------- ways to save the same bytes

SYSTEMS = {
    "sedac": "gates",
    "gates": "gates, whole or the last level",
    "cascade_soft": "cascade, soft, adapters",
    "cascade_hard": "cascade, hard, adapters",
    "random": "random tokens at the gates' levels",
    "static_width": "one level a layer",
    "static_drop": "whole or the last level, by layer",
    "entropy_plain": "exits on low entropy, plain skip",
    "random_plain": "random exits, plain skip",
    "uniform": "one level for all tokens and layers",
}  # in this order and by these names
LINES = (*COLOURS[1:], COLOURS[0], "#7c5c3e", "#111827")  # a colour for each
SHOWN = (0.125, 0.25, 0.4, 0.5, 0.6)  # budgets that a table shows of many


def pareto(records: Iterable[Mapping[str, Any]], metric: str) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The teacher-forced records of a metric by text and system, by rising share of saved bytes."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        if record["metric"] == metric and "budget" in record and "mode" not in record:
            found.setdefault(record["text"], {}).setdefault(record["system"], []).append(record)
    for systems in found.values():
        for rows in systems.values():
            rows.sort(key=lambda row: row["saved_bytes"])
    return found


def pareto_figure(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """KL by saved bytes, a panel a text and a line a system; None where no record has it."""
    texts = pareto(records, "kl")
    if not texts:
        return None
    figure = Figure(figsize=(max(7.2, 3.6 * len(texts)), 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(texts), sharey=True))
    for axes, (text, systems) in zip(panels, texts.items(), strict=True):
        for i, (system, name) in enumerate(SYSTEMS.items()):
            rows = systems.get(system, ())
            if not rows:
                continue
            value, low, high = (np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
            error = np.maximum(0, [value - low, high - value])
            x = [100 * row["saved_bytes"] for row in rows]
            axes.errorbar(x, value, error, label=name, color=LINES[i], marker="o", markersize=3,
                          linewidth=1.8 if system == "sedac" else 1, capsize=2)  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(text, loc="left")
        axes.set_xlabel("MLP bytes saved, %")
    panels[0].set_ylabel("KL to the full model, nats")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    return figure


Table = tuple[str, list[str], list[list[str]]]  # what it shows, its head, its rows


def quality_tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """KL, top-1 agreement and perplexity by system and budget for each text, free-running answers, certificates."""
    tables: list[Table] = []
    kl, top1, ppl = (pareto(records, metric) for metric in ("kl", "top1_agreement", "ppl_ratio"))
    for text, systems in kl.items():
        same = {row["budget"]: row for row in systems.get("uniform", ())}  # as many points as levels
        budgets = sorted({row["budget"] for rows in systems.values() for row in rows} - set(same))
        few = [budget for budget in budgets if budget in SHOWN] or budgets
        rows = []
        for system, name in SYSTEMS.items():
            by_budget = [{row["budget"]: row for row in found[text].get(system, ())} for found in (kl, top1, ppl)]
            if by_budget[0] and system != "uniform":
                rows.append([name, *(_quality_cell(*(found.get(budget) for found in by_budget)) for budget in few)])
        tables.append((f"{text}: KL in nats, top-1 agreement, perplexity over stock's",
                       ["MLP bytes saved", *(f"{budget:.1%}" for budget in few)], rows))  # fmt: skip
        if same:
            others = [{row["budget"]: row for row in found[text]["uniform"]} for found in (top1, ppl)]
            rows = [[row["level"], f"{row['saved_bytes']:.1%}", f"{row['value']:.4f}",
                     *(f"{other[budget]['value']:{digits}}" for other, digits in zip(others, (".1%", ".3f"), strict=True))]
                    for budget, row in same.items()]  # fmt: skip
            head = ["level", "MLP bytes saved", "KL, nats", "top-1 kept", "perplexity over stock's"]
            tables.append((f"{text}: one level for all tokens and layers", head, rows))
    tables += _realised(records)
    answers = [r for r in records if r.get("mode") == "free_running" and r["metric"] != "realised"]
    for text in dict.fromkeys(record["text"] for record in answers):
        own = [record for record in answers if record["text"] == text]
        conditions = ("system", "control", "skips", "budget")
        groups: dict[tuple, dict[str, Mapping[str, Any]]] = {}
        for record in own:
            groups.setdefault(tuple(record.get(key) for key in conditions), {})[record["metric"]] = record
        rows = []
        for (system, control, skips, _), found in groups.items():
            name = SYSTEMS.get(system, system) + (f", {control}" if control else "")
            shares = ("saved_bytes", "accuracy", "accuracy_change", "same_answer", "same_text")
            cells = [_share(found[metric]) if metric in found else "–" for metric in shares]
            rows.append([name, f"from the {skips}" if skips else "–", *cells, f"{found['answer_tokens']['value']:.0f}"])
        tables.append((f"{text}: {own[0]['repeats']} problems answered freely, {own[0]['shots']} worked examples",
                       ["", "skips", "bytes saved on generated tokens", "solved", "against stock", "same answer",
                        "same text", "tokens"],
                       [[cell.replace("from the generated", "from the first generated token") for cell in row]
                        for row in rows]))  # fmt: skip
    checked = [record for record in records if record["metric"] == "certificate_held"]
    if checked:
        rows = [[r["text"], r["loss"], f"{r['bound']:.4g}", str(r["documents"]), f"{r['certified']:.0%}",
                 f"{r['value']:.1%}" if r["certified"] else "–"] for r in checked]  # fmt: skip
        head = ["text", "loss", "bound", "documents", "certified by one half", "held on the other"]
        tables.append((f"Certificates at confidence {checked[0]['confidence']:g}, in 200 splits", head, rows))
    return tables


def _realised(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What one price for all text, found on the training's mixture, saves on each kind of it."""
    found: dict[str, dict[float, float]] = {}
    for record in records:
        if record["metric"] == "realised":
            kind = record["text"] + (", generated tokens" if record.get("mode") == "free_running" else "")
            found.setdefault(kind, {})[record["budget"]] = record["value"]
    budgets = sorted({budget for shares in found.values() for budget in shares})
    rows = [[kind, *(f"{shares[b]:.1%}" if b in shares else "–" for b in budgets)] for kind, shares in found.items()]
    title = "MLP bytes saved on each kind of text by the price that saves a share on the training's mixture"
    return [(title, ["on the mixture", *(f"{budget:.1%}" for budget in budgets)], rows)] if rows else []


def _quality_cell(kl: Mapping[str, Any] | None, top1: Mapping[str, Any] | None, ppl: Mapping[str, Any] | None) -> str:
    if kl is None or top1 is None or ppl is None:
        return "–"
    other = f" (at {kl['saved_bytes']:.1%})" if abs(kl["saved_bytes"] - kl["budget"]) > 0.01 else ""
    return f"{kl['value']:.4f}, {top1['value']:.1%}, {ppl['value']:.3f}{other}"


def _share(record: Mapping[str, Any]) -> str:
    return f"{record['value']:.1%} ({record['low']:.1%} to {record['high']:.1%})"


def _quality(records: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    figure = pareto_figure(records)
    if figure is not None:
        caption = "Held-out text, teacher-forced; lines span 95 % bootstrap intervals over documents."
        yield _section("What saved bytes cost", _svg(figure, "pareto"), caption)
    for title, head, rows in quality_tables(records):
        yield _section(title, _table([dict(zip(head, row, strict=True)) for row in rows]))


def _simulated(simulation: Mapping[str, Any]) -> Iterable[str]:
    """Risk against true entropy by checkpoint, and exit rate and saved rows by threshold."""
    risks, entropies = simulation["risk"], simulation["entropy"]
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(risks), sharey=True))
    for axes, layer in zip(panels, risks, strict=True):
        risk, entropy = np.asarray(risks[layer], float), np.asarray(entropies[layer], float)  # [tokens]
        shown = np.random.default_rng(0).permutation(len(risk))[:MAX_POINTS]
        axes.scatter(entropy[shown], risk[shown], s=3, alpha=0.3, color=COLOURS[1], linewidths=0, rasterized=True)
        top = float(max(risk[shown].max(), entropy[shown].max()))
        axes.plot([0, top], [0, top], color=COLOURS[0], linewidth=1, linestyle="--")
        axes.set_title(f"Layer {layer}: rank correlation {spearmanr(risk, entropy).statistic:.2f}", loc="left")
        axes.set_xlabel("true entropy, nats")
    panels[0].set_ylabel("risk, nats")
    caption = f"Held-out tokens, at most {MAX_POINTS} shown for each checkpoint; the dashed line is a perfect probe."
    yield _section("Risk against true entropy", _svg(figure, "risk"), caption)

    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.subplots()
    grid = np.asarray(simulation["thresholds"], float)
    for i, (layer, rate) in enumerate(simulation["exit_rate"].items()):
        axes.plot(grid, 100 * np.asarray(rate, float), color=COLOURS[1 + i % 7], label=f"exited by layer {layer}")
    saved = 100 * np.asarray(simulation["saved_rows"], float)
    axes.plot(grid, saved, color="#1f2933", linestyle="--", label="MLP rows saved")
    axes.set_xlabel("threshold, nats")
    axes.set_ylabel("%")
    axes.legend(loc="best")
    yield _section("Exit rate and saved rows by threshold", _svg(figure, "rates"), "One threshold at every checkpoint.")


def _svg(figure: Figure, name: str) -> str:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that differ between the figures of one page
        figure.savefig(text, format="svg", dpi=160, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    found = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in found if key not in LAST] + [key for key in LAST if key in found]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(column)) for column in columns) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return (
            f'<td class="number">{value:.4g}</td>' if isinstance(value, float) else f'<td class="number">{value}</td>'
        )
    return f"<td>{'' if value is None else html.escape(str(value))}</td>"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
