"""The load benchmark: what it counts as growth and as a fault, and itself on a live server, in short."""

import json
import shutil

import numpy as np
import pytest

from sedac_core import bench, bench_serving

MINUTES = np.arange(0, 30, 1 / 30)  # a soak's: a look every two seconds


def growth(values: np.ndarray) -> dict:
    return bench_serving.trend(MINUTES, values, "memory", "mib", "MiB")[-1]


def test_a_slow_leak_is_found_under_noise_and_a_warm_up_is_none():
    noise = np.random.default_rng(0).normal(0, 3, len(MINUTES))
    warm = 5000 + 800 * (1 - np.exp(-MINUTES / 2)) + noise
    flat, leak = growth(warm), growth(warm + 1.0 * MINUTES)
    assert abs(flat["value"]) < 0.5 and leak["value"] == pytest.approx(1.0 + flat["value"], abs=0.05)
    assert leak["low"] > 0.5, "half a MiB a minute is told from none"
    peak = warm + np.where((MINUTES > 20) & (MINUTES < 21), 500, 0)
    assert growth(peak)["value"] == pytest.approx(flat["value"], abs=0.1), "a peak that passes is no growth"
    first, last, _ = bench_serving.trend(MINUTES, warm, "memory", "mib", "MiB")
    assert first["value"] < last["value"] == pytest.approx(5800, abs=5)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"load": "openai", "metric": "failures", "value": 1}, "1 failures under the load of openai"),
        ({"load": "openai", "metric": "unlike_stock", "value": 2}, "2 unlike stock"),
        ({"load": "openai", "metric": "memory_growth", "value": 0.6, "unit": "MiB/min"}, "0.6 MiB/min under openai"),
        ({"metric": "files_growth", "value": 1.0, "unit": "1/min"}, "files grows by 1"),
        ({"load": "openai", "metric": "failures", "value": 0}, None),
        ({"metric": "memory_growth", "value": 0.4, "unit": "MiB/min"}, None),
        ({"metric": "memory_growth", "value": 9.0, "unit": "MiB/min", "minutes": 1.0}, None),
    ],
)
def test_failures_other_answers_than_stocks_and_growth_are_faults(record, fault):
    found = bench_serving.faults([{"minutes": 30.0, **record}])
    assert (fault is None and not found) or fault in found[0]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("patched vLLM")
def test_a_minute_of_mixed_load_fails_nowhere_and_opted_out_answers_are_stocks(
    tiny_model, three_checkpoints, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    out, picture = tmp_path / "serving.json", tmp_path / "dashboard.png"
    options = ["--model", tiny_model, "--probe-dir", three_checkpoints, "--log-dir", tmp_path, "--out", out]
    options += ["--minutes", 1, "--concurrency", 32, "--max-tokens", 16, "--prompts", 8]
    if shutil.which("prometheus"):
        options += ["--dashboard", picture]
    monkeypatch.setattr("sys.argv", ["bench", "serving", *map(str, options)])
    assert bench.main() == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["faults"] == []
    records = bench.read_results(out)["records"]

    def found(metric: str) -> dict:
        own = [record for record in records if record["metric"] == metric and record.get("third") != "first"]
        return {record["load"]: record["value"] for record in own}

    loads = {"openai", "vllm bench serve, opted-out", "vllm bench serve, as-it-stands"}
    assert found("failures") == dict.fromkeys(loads, 0)
    assert found("requests").keys() == loads and min(found("requests").values()) > 50
    assert found("unlike_stock") == dict.fromkeys(loads - {"vllm bench serve, as-it-stands"}, 0)
    both = {"openai", "vllm bench serve"}
    assert found("memory_mib").keys() == found("memory_growth").keys() == both
    assert min(found("memory_mib").values()) > 100 and max(found("files_open").values()) < 1000
    assert 0 < max(found("metrics_folder_mib").values()) < 50
    assert options[-1] != picture or picture.stat().st_size > 10_000
