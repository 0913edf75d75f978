"""Timing, spread, provenance, and the results file."""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sedac_core import bench, ceilings
from sedac_core.cli import SedacError
from sedac_core.gates import GateShape


def test_paired_runs_every_action_once_a_round_in_turning_order_and_leaves_the_warmup_out():
    calls, rounds = [], []
    actions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = bench.paired(actions, repeats=3, warmup=1, tick=lambda: rounds.append(1))
    assert "".join(calls) == "abbaabba"
    assert len(rounds) == 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_paired_measures_what_an_action_takes():
    seconds = bench.paired({"quick": lambda: None, "slow": lambda: time.sleep(0.02)}, repeats=3, warmup=0)
    assert min(seconds["slow"]) >= 0.02
    assert statistics.median(bench.ratios(seconds["slow"], seconds["quick"])) > 2


def test_spread_is_the_median_between_order_statistics():
    assert bench.spread([3.0, 1.0, 2.0]) == {"value": 2.0, "low": 1.0, "high": 3.0, "repeats": 3}
    assert bench.spread([float(i) for i in range(9)]) == {"value": 4.0, "low": 1.0, "high": 7.0, "repeats": 9}


@pytest.mark.parametrize("n", [6, 9, 20, 51])
def test_low_and_high_hold_the_true_median_in_at_least_95_percent_of_samples(n):
    draw = random.Random(n)
    trials = [bench.spread([draw.expovariate(1.0) for _ in range(n)]) for _ in range(2000)]
    assert statistics.mean(t["low"] <= 0.6931 <= t["high"] for t in trials) > 0.94


def test_spread_refuses_nothing_and_nan():
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError):
            bench.spread(bad)


def test_percentile_is_a_sample_that_so_many_reach():
    assert [bench.percentile([4, 1, 3, 2], share) for share in (0.01, 0.5, 0.75, 0.99)] == [1, 2, 3, 4]


def test_a_results_file_says_where_it_comes_from_and_can_be_read_back(tmp_path):
    path = tmp_path / "new" / "results.json"
    record = {"system": "sedac", "metric": "speedup", "value": 1.5, "unit": "x"}
    written = bench.results_file(path, [record], config={"model": "m"})
    assert bench.read_results(path) == json.loads(json.dumps(written))
    provenance = written["provenance"]
    assert {"command", "commit", "dirty", "hardware", "versions", "date"} <= provenance.keys()
    assert provenance["config"] == {"model": "m"}
    assert "cores" in provenance["hardware"] and provenance["versions"]["torch"]


def test_a_results_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    bench.results_file(path, [{"metric": "a", "value": 1}])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        bench.results_file(path, [{"metric": "a", "value": float("nan")}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"records": [{"value": 1}]}'])
def test_what_is_no_results_file_is_refused(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(SedacError, match="is no results file"):
        bench.read_results(path)


def test_outside_of_a_repository_there_is_no_commit(tmp_path):
    assert bench._commit(tmp_path) == {"commit": None, "dirty": None}


def test_the_command_line_names_its_benchmarks():
    done = subprocess.run([sys.executable, "-m", "sedac_core.bench", "cores"], capture_output=True, text=True)
    assert done.returncode == 2 and "'core'" in done.stderr


def test_records_of_gates_do_not_say_what_only_a_cascade_was_run_with():
    bench_gpu = pytest.importorskip("sedac_core.bench_gpu", reason="Triton is not installed")
    both = argparse.Namespace(captured=[512, 2048], keep_last=0, gather=True, bits=False)
    assert bench_gpu.unusual(both, "hard") == {"captured": 2048, "keep_last": 0, "gathered": True}
    assert bench_gpu.unusual(both, "gates") == {"captured": 2048}


def test_models_that_vllm_loads_otherwise_have_other_names_in_the_records():
    bench_gpu = pytest.importorskip("sedac_core.bench_gpu", reason="Triton is not installed")
    folder = Path("shapes/qwen2.5-3b")
    named = [
        bench_gpu.model_name(folder, argparse.Namespace(quantization=quantization, enable_lora=lora))
        for quantization, lora in ((None, False), ("fp8", False), (None, True), ("fp8", True))
    ]
    assert named == ["qwen2.5-3b", "qwen2.5-3b-fp8", "qwen2.5-3b-lora", "qwen2.5-3b-fp8-lora"]


def test_what_a_step_reads_by_the_bytes_of_a_weight():
    config = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"intermediate_size": 32, "vocab_size": 100}
    runtime = SimpleNamespace(window=range(2), skips=None)
    mlp, attention, head = 3 * 8 * 32, 2 * 8 * 8 + 2 * 8 * 4, 8 * 100
    for weight_bytes in (2, 1):
        shares = ceilings.Shares(config, runtime, 1e12, weight_bytes)
        read = [shares.bytes_read(2, rate, "random") for rate in (0, 0.5, 1)]
        expected = [weight_bytes * (mlps * mlp + 4 * attention) + 2 * head for mlps in (4, 3.5, 2)]
        assert read == expected, "half of the tokens exit: both of two do in a quarter of the steps"
        assert shares.ceiling("prefill", 9, 1, "random") == 4 * (mlp + attention) / (2 * mlp + 4 * attention)


def test_what_a_step_reads_under_gates():
    """Two tokens of which half narrow to no neurons: both do in a quarter of the steps, neither in another."""
    config = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100}
    shape = GateShape(128, 512, 4, levels=(1, 0.5, 0), adapter_rank=8)
    runtime = SimpleNamespace(policy=SimpleNamespace(shape=shape), skips=None)
    shares = ceilings.GatedShares(config, runtime, 1e12)
    mlp, attention, gates = 3 * 128 * 512, 2 * 128 * 128 + 2 * 128 * 64, shape.gate_cost * 3 * 128 * 512 * 4
    assert shares.mlp_bytes(2, None, 2) == 2 * 4 * mlp
    assert shares.mlp_bytes(2, 0.5, 2) == pytest.approx(2 * (4 * 3 * 128 * (0.75 * 512 + 0.75 * 8) + gates))
    other = 2 * (4 * attention + 128 * 100)
    assert shares.ceiling("decode", 2, 0.5, 2) == (2 * 4 * mlp + other) / (shares.mlp_bytes(2, 0.5, 2) + other)
    prefill = shares.ceiling("prefill", 9, 1, 2)
    assert prefill == (mlp + attention) / (mlp * (1 - shape.saved[2]) + attention)


@pytest.fixture
def cpu_records(tiny_model, tmp_path):
    """`cpu_records(folder)`: what `bench cpu` finds of the tiny model with this artefact."""
    pytest.importorskip("vllm", reason="vLLM is not installed")

    def run(folder, *more):
        out = tmp_path / "cpu.json"
        command = [sys.executable, "-m", "sedac_core.bench", "cpu", "--model", tiny_model, "--probe-dir", folder]
        command += ["--batches", 2, "--prefill", 32, "--repeats", 1, "--out", out, *more]
        longer = os.environ | {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # than the tiny model's
        done = subprocess.run([*map(str, command)], env=longer, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return bench.read_results(out)["records"]

    return run


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("patched vLLM")
@pytest.mark.usefixtures("patched_vllm")
def test_the_cpu_benchmark_times_both_engines_in_one_process(cpu_records, three_checkpoints):
    records = cpu_records(three_checkpoints)
    saved = {(r["phase"], r["case"]): r["value"] for r in records if r["metric"] == "mlp_rows_saved"}
    assert {phase for phase, _ in saved} == {"decode", "prefill"}
    assert all((value > 0.1) if case == "all exit" else value == 0 for (_, case), value in saved.items())
    assert all(r["value"] > 0 for r in records if r["metric"] in ("speedup", "time_ms"))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("patched vLLM")
@pytest.mark.usefixtures("patched_vllm")
def test_the_cpu_benchmark_times_gates_at_the_price_of_each_budget(cpu_records, tiny_gates):
    records = cpu_records(tiny_gates, "--name", "tiny")
    saved = {(r["phase"], r["case"]): r["value"] for r in records if r["metric"] == "saved_bytes"}
    cases = ["nothing narrows", "the price for 12.5%", "the price for 25.0%", "the price for 40.0%"]
    assert list(saved) == [(phase, case) for phase in ("decode", "prefill") for case in cases]
    for phase in ("decode", "prefill"):
        own = [saved[phase, case] for case in cases]
        assert own == sorted(own) and own[0] < 0 < own[-1], "gates count against what is saved"
    assert all(r["model"] == "tiny" for r in records)
