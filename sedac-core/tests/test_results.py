"""The results page says what the results files say."""

import json
from fnmatch import fnmatch

from conftest import ROOT
from test_report import quality_records

from sedac_core import bench_results, results_gpu


def test_the_page_is_made_from_the_files_as_they_are():
    assert (ROOT / "docs/RESULTS.md").read_text() == bench_results.page(ROOT / "docs/results")


RUN = {
    "command": "python x",
    "commit": None,
    "dirty": None,
    "hardware": "one",
    "versions": {},
    "date": "2026-01-02T00",
}


def test_every_results_file_has_a_place_on_the_page_and_its_provenance():
    for path in (ROOT / "docs/results").glob("*.json"):
        assert any(fnmatch(path.stem, name) for name in bench_results.SECTIONS), f"{path.name} is shown nowhere"
        provenance = json.loads(path.read_text())["provenance"]
        assert provenance["command"] and provenance["hardware"] and provenance["date"] and provenance["versions"]


def test_a_figure_is_shown_with_its_interval(tmp_path):
    records = [
        {"case": "all exit", "phase": "decode", "batch": 4, "metric": "speedup", "value": 1.5, "low": 1.25, "high": 2}
    ]
    (tmp_path / "cpu.json").write_text(json.dumps({"provenance": RUN, "records": records}))
    page = bench_results.page(tmp_path)
    assert "| all exit | decode 4 | 1.500x (1.250–2.000) | – | – |" in page
    assert "`python x`, 2026-01-02, one; commit unknown" in page
    results_gpu.draw(
        [{**records[0], "model": "m", "pattern": "random", "exit_rate": rate, "batch": 1} for rate in (0, 1)],
        tmp_path / "figure.svg",
    )
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_a_quality_file_has_a_section_and_a_figure_of_its_own(tmp_path):
    results = tmp_path / "results" / "quality_tiny.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"provenance": RUN, "records": quality_records()}))
    page = bench_results.page(results.parent)
    assert "## What saved bytes cost, tiny" in page and "(quality_tiny.svg)" in page
    assert "| gates | 0.1000, 90.0%, 1.010 | 0.1000, 90.0%, 1.010 |" in page
    bench_results.draw_quality(quality_records(), tmp_path)
    first = (tmp_path / "quality_tiny.svg").read_bytes()
    bench_results.draw_quality(quality_records(), tmp_path)
    assert first == (tmp_path / "quality_tiny.svg").read_bytes() and b"<svg" in first


def test_gpu_pages_show_the_engines_step_and_its_graph_alone(tmp_path):
    where = {"model": "m", "phase": "decode", "batch": 256}
    figures = [("time_ms", "stock", 8.0, "ms"), ("time_ms", "sedac", 9.0, "ms"), ("speedup", "sedac", 0.9, "x")]
    figures += [
        ("replay_ms", "stock", 4.0, "ms"),
        ("replay_ms", "sedac", 2.0, "ms"),
        ("replay_speedup", "sedac", 2, "x"),
    ]
    hard = {**where, "pattern": "random", "exit_rate": 1.0, "checkpoint": 5}
    gates = {**where, "narrowed": 0.4, "width": 0.5}
    for name, known in (("gpu_h200", hard), ("gpu_gates_h200", gates)):
        records = [
            {**known, "metric": metric, "system": system, "value": value, "unit": unit, "low": value, "high": value}
            for metric, system, value, unit in figures
        ]
        records.append({**known, "metric": "saved_bytes", "value": 0.2, "unit": "share"})
        records.append({**known, "metric": "replay_saved_bytes", "value": 0.3, "unit": "share"})
        (tmp_path / f"{name}.json").write_text(json.dumps({"provenance": RUN, "records": records}))
    page = bench_results.page(tmp_path)
    engine = "8.00 ms (8.00–8.00) | 9.00 ms (9.00–9.00) | 0.900x (0.900–0.900)"
    alone = "4.00 ms (4.00–4.00) | 2.00 ms (2.00–2.00) | 2.000x (2.000–2.000)"
    assert f"| decode 256 | 100% | {engine} | {alone} | – |" in page
    assert f"| decode 256 | 40% to 50% | 0.20 | 0.30 | {engine} | {alone} | – |" in page
    results_gpu.draw(json.loads((tmp_path / "gpu_h200.json").read_text())["records"], tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_gpu_pages_tell_prompts_at_once_from_one_and_unusual_runs_from_those_as_served(tmp_path):
    one = {"model": "m", "phase": "prefill", "tokens": 2048, "pattern": "random", "exit_rate": 1.0, "checkpoint": 5}
    several = {**one, "prompts": 4}
    figures = [(one, 1.5), (several, 1.75), ({**several, "keep_last": 0}, 2.25), ({**one, "captured": 2048}, 1.25)]
    records = [
        {**where, "metric": "speedup", "system": "sedac", "value": value, "unit": "x"} for where, value in figures
    ]
    (tmp_path / "gpu_h200.json").write_text(json.dumps({"provenance": RUN, "records": records}))
    narrow = {**one, "narrowed": 0.5, "width": 0.0, "metric": "speedup", "system": "sedac", "unit": "x"}
    records = [{**narrow, "value": 1.0}, {**narrow, "gathered": True, "value": 0.5}]
    assert len(set(map(results_gpu.run_of, records))) == 2, "neither run replaces the other's records"
    (tmp_path / "gpu_gates_h200.json").write_text(json.dumps({"provenance": RUN, "records": records}))
    page = bench_results.page(tmp_path)
    assert "| prefill 2048 | 50% to 0% | – | – | – | – | 1.000x |" in page
    assert "| prefill 2048, gathered | 50% to 0% | – | – | – | – | 0.500x |" in page
    usual, last, captured = page.split("## Gates")[0].split("### m, ")[1:]
    assert (
        "| prefill 2048 | 100% | – | – | 1.500x |" in usual and "| prefill 4 × 2048 | 100% | – | – | 1.750x |" in usual
    )
    assert ", to the last layer\n" in last and "2.250x" in last and "1.750x" not in last
    assert ", steps of up to 2,048 tokens captured\n" in captured and "1.250x" in captured


def test_a_gpu_servers_page_shows_loads_settings_and_the_cost_of_counting(tmp_path):
    known = {
        "model": "m",
        "dtype": "bfloat16",
        "policy": "gates",
        "phase": "serving",
        "concurrency": 64,
        "max_tokens": 32,
    }
    stock = {**known, "system": "stock", "load": "all at once, stock", "choice": "as it stands"}
    records = [
        {**stock, "metric": "answers", "value": 24},
        {**stock, "metric": "unlike", "value": 12},
        {**stock, "metric": "other_gap_nats", "value": 0.0, "low": 0.0, "high": 0.125},
    ]
    written = tmp_path / "serving_gpu.json"
    written.write_text(json.dumps({"provenance": RUN, "records": records}))
    row = "| all at once, stock | – | – | 24 | 12 | 0.00 nats (0.00–0.12) | – | – |"
    page = bench_results.page(tmp_path)
    assert row in page and "SEDAC's were not reached" in page and "counting costs" not in page
    sedac = {**known, "system": "sedac"}
    one = {**sedac, "load": "one at a time"}
    records += [
        {**one, "metric": "answers", "value": 24, "choice": "as it stands"},
        {**one, "metric": "opted_out", "value": 24},
        {**one, "metric": "unlike_stock", "value": 3},
        {**sedac, "load": "settings change", "setting": "more", "saves": 3, "metric": "saved_bytes", "value": 0.4},
        {**sedac, "phase": "decode", "batch": 16, "metric": "step_us", "value": 800.0, "low": 799.0, "high": 801.0},
        {
            **sedac,
            "phase": "decode",
            "batch": 16,
            "metric": "counting_share",
            "value": 0.003,
            "low": 0.002,
            "high": 0.004,
        },
    ]
    written.write_text(json.dumps({"provenance": RUN, "records": records}))
    page = bench_results.page(tmp_path)
    assert row in page and "### Gates in every layer" in page
    assert "| one at a time | – | – | 24 | 3 | – | – | – |" in page
    assert "| more | 0.400 | – | – | – |" in page
    assert "| gates, 16 | 800.0 µs (799.0–801.0) | – | – | 0.30 % (0.20–0.40) | – | – |" in page
