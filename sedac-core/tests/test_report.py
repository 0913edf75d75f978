"""The HTML report: whole in one file, with its plots, for whatever results there are."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from sedac_core.report import pareto_figure, quality_tables, write_report

PROVENANCE = {
    "command": "python x.py",
    "commit": "a" * 40,
    "dirty": True,
    "hardware": "2 cores",
    "versions": {"torch": "2"},
}


def record(metric, value, measured="case", **known):
    base = {"system": "stock" if measured == "baseline" else "sedac", "case": "all <exit>", "measured": measured}
    spread = {"low": value * 0.9, "high": value * 1.1, "repeats": 5}
    return {**base, "metric": metric, "value": value, **spread, "unit": "", **known}


def results(*records):
    return {"provenance": PROVENANCE, "records": list(records)}


MEASURED = results(
    *(
        record("tokens_per_second", value, measured, phase="decode", batch=batch)
        for batch, stock, ours in ((1, 20.0, 25.0), (16, 200.0, 260.0))
        for value, measured in ((stock, "baseline"), (ours, "case"))
    ),
    record("speedup", 1.25, phase="decode", batch=1),
    record("ppl", 13.9, "baseline", phase="prefill", text="pydoc"),
    record("ppl", 18.5, phase="prefill", text="pydoc", exit_rate=0.4),
)


def simulation(seed=0, tokens=5000):
    draw = np.random.default_rng(seed)
    entropy = {layer: draw.gamma(2.0, 1.0, tokens) for layer in (7, 14, 21)}
    risk = {layer: np.maximum(0, entropy[layer] + draw.normal(0, 0.5, tokens)) for layer in entropy}
    grid = np.linspace(0, 6, 40)
    rate = {layer: [(risk[layer] < threshold).mean() for threshold in grid] for layer in risk}
    return {
        "risk": risk,
        "entropy": entropy,
        "thresholds": grid,
        "exit_rate": rate,
        "saved_rows": np.array(rate[7]) * 0.7,
    }


@pytest.fixture
def page(tmp_path):
    def make(found, simulated=None):
        write_report(tmp_path / "report.html", "SEDAC <against> stock", found, simulated)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return make


def test_the_page_needs_nothing_from_a_network(page):
    text = page(MEASURED, simulation())
    assert not re.search(r"<(script|link|img|iframe)\b", text)
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert attribute.startswith(("#", "data:")), attribute


def test_it_has_every_plot_that_the_data_allow(page):
    text = page(MEASURED, simulation())
    for title in ("Tokens a second", "Perplexity against", "Risk against true entropy", "Exit rate and saved rows"):
        assert f"<h2>{title}" in text
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4
    for svg in svgs:
        ElementTree.fromstring(svg)
    assert "1.25x" in text and "13.90" in text and "exit rate 40%" in text


def test_it_holds_every_record_and_the_provenance(page):
    text = page(MEASURED)
    assert text.count("<tr>") == 1 + len(MEASURED["records"]) + 1 + 5
    assert "python x.py" in text and "versions.torch" in text and "tree changed" in text


def test_names_from_a_config_cannot_break_the_page(page):
    text = page(MEASURED)
    assert "all &lt;exit&gt;" in text and "SEDAC &lt;against&gt; stock" in text and "<exit>" not in text


def test_failed_cases_stand_at_the_top_with_their_reason(page):
    failed = {"system": "sedac", "case": "broken", "metric": "failed", "value": 1, "unit": "", "reason": "no <probe>"}
    text = page(results(failed))
    assert "<b>broken</b>: no &lt;probe&gt;" in text and "<h2>Tokens a second" not in text


def test_results_of_other_benchmarks_need_no_case(page):
    rows = [
        {"system": system, "phase": "decode", "batch": 1, "metric": "tokens_per_second", "value": value, "low": value,
         "high": value} for system, value in (("stock", 10.0), ("sedac", 12.0))
    ]  # fmt: skip
    assert "Tokens a second" in page(results(*rows))


def test_a_second_report_replaces_the_first_and_is_the_same(page):
    assert page(MEASURED, simulation()) == page(MEASURED, simulation())


def quality_records(systems=("stock", "sedac", "entropy_plain"), texts=("gsm8k", "wikitext2")):
    """What `sedac_core.bench quality` writes: two systems at three budgets of two texts, answers, a certificate."""
    base = {"model": "tiny", "low": 0.01, "high": 0.9, "repeats": 40}
    rows = []
    for text in texts:
        rows.append(
            {**base, "system": "stock", "text": text, "saved_bytes": 0.0, "metric": "ppl", "value": 5.0, "unit": ""}
        )
        for place, system in enumerate(systems[1:]):
            for budget in (0.125, 0.25, 0.3):
                where = {**base, "system": system, "text": text, "budget": budget, "saved_bytes": budget + 0.02 * place}
                for metric, value in (
                    ("kl", 0.1 * (place + 1)),
                    ("top1_agreement", 0.9),
                    ("ppl_ratio", 1.01),
                    ("ppl", 5),
                ):
                    rows.append({**where, "metric": metric, "value": value, "unit": "x"})
    free = {**base, "text": "gsm8k", "mode": "free_running", "shots": 4, "saved_bytes": 0.24, "unit": "share"}
    for who in ({"system": "stock"}, {"system": "sedac", "skips": "generated", "budget": 0.25}):
        rows += [
            {**free, **who, "metric": metric, "value": 0.5} for metric in ("accuracy", "same_answer", "answer_tokens")
        ]
    realised = {"system": "sedac", "metric": "realised", "budget": 0.25, "value": 0.231, "unit": "share", "repeats": 1}
    rows += [{**base, "text": "wikitext2", **realised}, {**free, **realised}]
    rows.append({**base, "system": "sedac", "text": "gsm8k", "metric": "certificate_held", "value": 0.995, "loss": "kl",
                 "bound": 0.02, "documents": 40, "confidence": 0.95, "certified": 0.6, "unit": "share"})  # fmt: skip
    return rows


def test_what_saved_bytes_cost_is_one_plot_and_a_table_a_text(page):
    records = quality_records()
    text = page(results(*records))
    assert "<h2>What saved bytes cost" in text and text.count("<svg") == 1 and "Perplexity against stock" not in text
    assert ">gates<" in text and "exits on low entropy, plain skip" in text
    (first, head, rows), *_, realised, answers, certificates = quality_tables(records)
    assert realised[1:] == (["on the mixture", "25.0%"], [["wikitext2", "23.1%"], ["gsm8k, generated tokens", "23.1%"]])
    assert first.startswith("gsm8k") and head == ["MLP bytes saved", "12.5%", "25.0%"], (
        "of many budgets, the usual ones"
    )
    assert rows[0] == ["gates", "0.1000, 90.0%, 1.010", "0.1000, 90.0%, 1.010"]
    assert rows[1][1] == "0.2000, 90.0%, 1.010 (at 14.5%)", "bytes that differ from the budget are said"
    assert answers[0] == "gsm8k: 40 problems answered freely, 4 worked examples"
    assert answers[2][1][:3] == ["gates", "from the first generated token", "–"]
    assert certificates[2] == [["gsm8k", "kl", "0.02", "40", "60%", "99.5%"]]
    panels = pareto_figure(records).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["gsm8k", "wikitext2"]
    assert len(panels[0].containers) == 2 and pareto_figure(MEASURED["records"]) is None
