"""The load benchmark: what it counts as growth and as a fault, and itself on a live server, in short."""

import itertools
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch

from sedac_core import (
    bench,
    bench_serving,
    checkpoint_kernels,
    checkpoint_parts,
    counting,
    gate_parts,
    kernels,
    norm_kernels,
    served_counts,
    soak,
    step_counters,
)
from sedac_core.adapter import AdapterBank
from sedac_core.cli import SedacError
from sedac_core.gates import Gate, GateShape
from sedac_core.load import ENDED, Answer, Tally, excess, tally_of
from sedac_core.probe import LREProbe

MINUTES = np.arange(0, 30, 1 / 30)  # a soak's: a look every two seconds


def growth(values: np.ndarray) -> dict:
    return soak.trend(MINUTES, values, "memory", "mib", "MiB")[-1]


def test_a_slow_leak_is_found_under_noise_and_a_warm_up_is_none():
    noise = np.random.default_rng(0).normal(0, 3, len(MINUTES))
    warm = 5000 + 800 * (1 - np.exp(-MINUTES / 2)) + noise
    flat, leak = growth(warm), growth(warm + 1.0 * MINUTES)
    assert abs(flat["value"]) < 0.5 and leak["value"] == pytest.approx(1.0 + flat["value"], abs=0.05)
    assert leak["low"] > 0.5, "half a MiB a minute is told from none"
    peak = warm + np.where((MINUTES > 20) & (MINUTES < 21), 500, 0)
    assert growth(peak)["value"] == pytest.approx(flat["value"], abs=0.1), "a peak that passes is no growth"
    first, last, _ = soak.trend(MINUTES, warm, "memory", "mib", "MiB")
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
        ({"load": "openai", "metric": "unlike_stock", "value": 2, "dtype": "bfloat16"}, None),
        ({"load": "openai", "metric": "failures", "value": 1, "system": "stock"}, None),
        ({"load": "openai", "metric": "gap_nats", "value": 0.1, "high": 2.5}, "by 2.5 nats: no rounding"),
        ({"load": "openai", "metric": "gap_nats", "value": 0.1, "high": 0.2}, None),
        ({"load": "openai", "metric": "figures_wrong", "value": 1}, "1 figures on /metrics"),
        ({"load": "settings change", "metric": "compiled_or_captured", "value": 3}, "3 lines of the log"),
    ],
)
def test_failures_other_answers_than_stocks_and_growth_are_faults(record, fault):
    found = bench_serving.faults([{"minutes": 30.0, **record}])
    assert (fault is None and not found) or fault in found[0]


def test_settings_that_do_not_save_as_they_should_and_choices_that_are_not_refused_are_faults():
    def saved(**shares: float) -> list[str]:
        order = {"off": 0, "less": 1, "more": 3}
        return bench_serving.faults(
            [
                {"minutes": 1.0, "metric": "saved_bytes", "setting": name, "saves": order[name], "value": value}
                for name, value in shares.items()
            ]
        )

    assert saved(off=-0.01, less=0.1, more=0.3) == []
    assert "'more' saves 0.100 of the MLP bytes, no more than 'less'" in saved(off=0, less=0.1, more=0.1)[0]
    told = [{"metric": "wrong_choices", "value": 3}, {"metric": "wrong_choices_refused", "value": 2}]
    assert bench_serving.faults([{"minutes": 1.0, **record} for record in told]) == [
        "2 of 3 wrong choices were refused"
    ]


def test_answers_are_compared_where_they_part():
    likeliest = [
        {"token_id:5": -0.1, "token_id:6": -2.5},
        {"token_id:7": -0.7, "token_id:8": -0.75, "token_id:9": -3.0},
    ]
    own = Answer("ab", [5, 7], 0, likeliest)
    assert own.gap([5, 7]) is None
    assert own.gap([5, 8]) == pytest.approx(0.05), "nearly as likely"
    assert own.gap([6, 7]) == pytest.approx(2.4), "only the first difference counts"
    assert own.gap([5, 1]) == pytest.approx(2.3), "at least: it is none of the likeliest"
    assert own.gap([5]) == ENDED
    drifted = [{"token_id:5": -0.2}, {"token_id:7": -0.9, "token_id:8": -0.6}]
    tally = tally_of([Answer("", [5, 8], 0, drifted), Answer("", [5, 7], 0, drifted)], [own, own])
    assert tally.unlike() == 1 and tally.gaps == [pytest.approx(0.05)]
    assert tally.drifts == pytest.approx([0.1, 0.1, 0.2]), "of tokens up to where they part"
    control, found = Tally(40), Tally(40)
    control.asked[:], found.asked[:] = 10, 10
    control.same[:], found.same[:] = [8, 10] * 20, [10, 8] * 20
    none = excess(found, control)
    assert none["low"] < 0 == none["value"] < none["high"] and none["repeats"] == 40
    found.same[:] = 6
    assert excess(found, control)["low"] > 0.2


def a_cascade() -> SimpleNamespace:
    """What is counted of a runtime of two checkpoints."""
    torch.manual_seed(0)
    rule = checkpoint_parts.Rule.make(torch.tensor([[0.7, 0.7], [0, 0]]), [1.0, 1.0], 0.0, 0.5, adaptive=False)
    return SimpleNamespace(probes=[checkpoint_parts.DeviceProbe.make(LREProbe(64, 16)) for _ in range(2)], rule=rule)


def some_gates() -> SimpleNamespace:
    """The same of two layers, each with a gate."""
    torch.manual_seed(0)
    shape = GateShape(64, 256, 2, (1.0, 0.5, 0.0), 64)
    bank, order = AdapterBank(64, 64, 2).requires_grad_(False), torch.arange(256)
    weights = kernels.Weights.narrowed(torch.randn(512, 64), torch.randn(64, 256), order, bank, shape.widths, 64)
    gates = {
        leader: gate_parts.DeviceGate.make(Gate(64, 2), gain, 1, leader == 0, weights.down)
        for leader, gain in shape.gains().items()
    }
    policy = SimpleNamespace(prices=torch.tensor([0.5, -torch.inf]))
    counters = step_counters.new_counters(3, torch.device("cpu"))
    norm = norm_kernels.Norm(torch.ones(64), 1e-6)
    return SimpleNamespace(
        gates=gates, weights=[weights, weights], policy=policy, by_kernels=counters, norm=lambda layer: norm
    )


@pytest.mark.parametrize("make", [a_cascade, some_gates])
def test_the_copy_that_does_not_count_decides_the_same(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    modules = {"counting": {"kernels": kernels, "checkpoint_kernels": checkpoint_kernels}}
    modules["silent"] = counting.uncounted(tmp_path)
    decided = {}
    for name, own in modules.items():
        runtime = make()
        calls = counting.counting_of(runtime, 5, torch.float32)(own)
        assert len(calls) == 2
        decided[name] = [call() for call in calls]
        for call in calls:
            given = call.args[-1] if make is some_gates else call.args[5].counters + call.args[5].risk_sums.sum()
            assert (float(given.sum()) != 0) == (name == "counting")
    for first, second in zip(decided["counting"], decided["silent"], strict=True):
        assert all(map(torch.equal, first, second))


def test_the_cost_of_counting_is_what_it_takes_more_and_how_well_that_is_known(monkeypatch):
    """All but vLLM's engine and the graphs, which want a GPU."""

    class Engine:
        OPTIONS: ClassVar[dict] = {}
        runtime = SimpleNamespace(lock=threading.Lock())
        llm = mock.MagicMock()

        def __init__(self, model, settings, engines):
            assert (str(model), settings["SEDAC_ENABLED"], self.OPTIONS["dtype"]) == ("model", "1", "bfloat16")

        def prompt(self, tokens, seed):
            return [0] * tokens

        def run(self, prompts, tokens):
            return None

        def replays(self, batch, recording, number):
            assert recording == "predicated" and number >= 20
            return 500e-6 if self.runtime.lock.locked() else 505e-6

    graphs = itertools.cycle([12.0, 11.9, 10.0])  # µs: counting, again, silent
    monkeypatch.setattr(counting, "Served", Engine)
    monkeypatch.setattr(counting, "uncounted", lambda folder: {})
    monkeypatch.setattr(counting, "counting_of", lambda *about: lambda modules: [lambda: None])
    monkeypatch.setattr(counting.graph_times, "captured", lambda once, calls, beside: next(graphs))
    monkeypatch.setattr(counting.graph_times, "replay_us", lambda graph, calls, in_a_row: graph)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name=counting.CALLED, daemon=True)
    thread.start()
    try:
        found = [record for part in counting.records("model", Path("probes"), "bfloat16") for record in part]
    finally:
        done.set()
    assert [record["value"] for record in found if record["metric"] == "counting_us"] == pytest.approx([2.0] * 3)
    first = {record["metric"]: record["value"] for record in found if record["batch"] == 1}
    wanted = {"step_us": 500, "counting_known_to_us": 0.1, "counting_share": 0.004, "polling_share": 0.01}
    assert {name: first[name] for name in wanted} == pytest.approx(wanted)


def test_a_server_without_its_workers_counters_is_not_compared_with_anything(tmp_path, monkeypatch):
    """Metrics without labels stand on /metrics of whatever has imported SEDAC."""
    (tmp_path / "log").write_text("metrics cannot be kept in /tmp/full")
    server = SimpleNamespace(url="", name="sedac", log=tmp_path / "log")
    monkeypatch.setattr(served_counts.serving, "counters", lambda url: {"sedac_tokens_total": 0.0})
    with pytest.raises(SedacError, match="(?s)none of its worker's counters.*metrics cannot be kept in /tmp/full"):
        served_counts.settled(server)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("patched vLLM")
@pytest.mark.parametrize(("artefact", "figures", "changes"), [("three_checkpoints", 15, 5), ("tiny_gates", 7, 6)])
def test_half_a_minute_of_mixed_load_fails_nowhere_and_opted_out_answers_are_stocks(
    artefact, figures, changes, tiny_model, request, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    out, picture = tmp_path / "serving.json", tmp_path / "dashboard.png"
    options = [
        "--model",
        tiny_model,
        "--probe-dir",
        request.getfixturevalue(artefact),
        "--log-dir",
        tmp_path,
        "--out",
        out,
    ]
    options += ["--minutes", 0.5, "--concurrency", 32, "--max-tokens", 16, "--prompts", 8]
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
    assert found("failures") == dict.fromkeys(loads | {"settings change"}, 0)
    assert found("requests").keys() == loads | {"settings change"}
    assert min(found("requests")[load] for load in loads) > 20
    compared = loads - {"vllm bench serve, as-it-stands"} | {"one at a time", "settings change"}
    assert found("unlike_stock") == dict.fromkeys(compared, 0)
    assert found("reused_from_the_same")["one at a time"] > found("reused_from_another_choice")["one at a time"] == 0
    assert found("wrong_choices_refused")["one at a time"] == 3
    assert found("tokens_counted") == found("tokens_sent") and found("figures_compared")["openai"] == figures
    saved = {record["setting"]: record["value"] for record in records if "saves" in record}
    assert saved["off"] <= 0 and saved["off"] < saved["less"] < saved["more"]
    assert found("changes_logged")["settings change"] == changes
    both = {"openai", "vllm bench serve"}
    assert found("memory_mib").keys() == found("memory_growth").keys() == both
    assert min(found("memory_mib").values()) > 100 and max(found("files_open").values()) < 1000
    assert 0 < max(found("metrics_folder_mib").values()) < 50
    assert options[-1] != picture or picture.stat().st_size > 10_000
