"""Step 7: the matrix is checked by names, servers leave no process, a failing case stops no other."""

import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sedac_core import serving
from sedac_core.cli import SedacError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("sedac_test_suite", ROOT / "sedac_test_suite.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(suite, tmp_path):
    def run(config):
        path = tmp_path / "matrix.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return suite.read_config(path)

    return run


CASES = [{"name": "all exit", "thresholds": "inf", "probe_layers": [1, 3]}]


# ---------------------------------------------------------------- the matrix


def test_the_shipped_matrices_are_valid(suite):
    paths = sorted((ROOT / "configs").glob("test_matrix_*.json"))
    assert {"test_matrix_quality", "test_matrix_smoke", "test_matrix_speed"} <= {path.stem for path in paths}
    for path in paths:
        config = suite.read_config(path)
        if "quality" in config:
            assert len(config["quality"]["saved"]) == 10
            continue
        for case in config["cases"]:
            assert suite.case_settings(case | {"probe_layers": [7, 14, 21]}, config)["SEDAC_ENABLED"] == "1"


def test_keys_that_are_left_out_have_defaults(read, suite):
    config = read({"cases": CASES, "ppl": {"tokens": 64}})
    assert config["ppl"] == {"tokens": 64, "window": 512}
    assert config["decode"] == suite.CONFIG["decode"] and config["model"] == "default"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"cases": CASES, "repeat": 3}, "unknown key 'repeat': valid keys are model, probe_dir, text"),
        (
            {"cases": CASES, "decode": {"batch": [1]}},
            "decode has an unknown key 'batch': valid keys are batches, tokens",
        ),
        (
            {"cases": [{"name": "a", "treshold": 1}]},
            "case a has an unknown key 'treshold': valid keys are name, preset",
        ),
        ({"cases": CASES, "repeats": "3"}, 'repeats must look like 5, found "3"'),
        ({"cases": CASES, "repeats": 1}, "repeats must be at least 2"),
        ({"cases": CASES, "decode": {"batches": [0]}}, "batches must look like [1, 4, 16], found [0]"),
        ({"cases": CASES, "prefill": [512]}, "prefill must be an object with the keys tokens"),
        ({"cases": CASES, "ppl": {"window": 1}}, "ppl.window must be at least 2"),
        ({"cases": []}, "has no cases"),
        ({}, "has no cases"),
        ({"cases": [{"thresholds": 0}]}, "each case needs a name of its own"),
        ({"cases": [{"name": "stock"}]}, "each case needs a name of its own"),
        ({"cases": CASES * 2}, "each case needs a name of its own"),
        ("{", "cannot be read as JSON"),
        ({"quality": {"probe_dir": "x"}, "cases": CASES}, "has an unknown key 'cases': valid keys are quality"),
        ({"quality": {}}, "quality must be an object with at least a probe_dir"),
        ({"quality": {"probe_dir": "x", "sample": 3}}, "quality has an unknown key 'sample'"),
        ({"quality": {"probe_dir": "x", "saved": 0.3}}, "saved must look like [0.25], found 0.3"),
    ],
)
def test_a_mistake_in_a_config_is_named(read, config, sentence):
    with pytest.raises(SedacError) as error:
        read(config)
    assert sentence in str(error.value)


def test_a_case_becomes_the_environment_that_the_server_reads(suite, tmp_path):
    config = {"probe_dir": str(tmp_path)}

    def settings(**case):
        return suite.case_settings({"name": "c", "probe_layers": [7, 14, 21], **case}, config)

    assert settings(thresholds="inf")["SEDAC_THRESHOLDS"] == "inf,inf,inf"
    assert settings(thresholds=[1, 2, 3])["SEDAC_THRESHOLDS"] == "1,2,3"
    assert settings(preset="aggressive")["SEDAC_THRESHOLDS"] == "1.0,1.3,1.7"
    assert settings()["SEDAC_ADAPTIVE"] == "0" and "SEDAC_THRESHOLDS" not in settings()
    adaptive = settings(exit_rates=[0.1, 0.2, 0.3], gamma=0.5)
    assert adaptive["SEDAC_ADAPTIVE"] == "1" and adaptive["SEDAC_GAMMA"] == "0.5"
    assert adaptive["SEDAC_PROBE_DIR"] == str(tmp_path)
    assert settings(enabled=0) == {"SEDAC_ENABLED": "0"}


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ({"preset": "bold"}, "preset must be one of conservative, balanced, aggressive, found 'bold'"),
        ({"preset": "balanced", "thresholds": 0}, "has both preset and thresholds"),
        ({"thresholds": [-1, 0, 1]}, "case c: SEDAC_THRESHOLDS must be"),
        ({"exit_rates": [0.9, 0.1]}, "case c: SEDAC_EXIT_RATES must be"),
    ],
)
def test_a_case_that_no_server_would_take_is_refused_before_any_starts(suite, case, sentence):
    with pytest.raises(SedacError) as error:
        suite.case_settings({"name": "c", "probe_layers": [7, 14, 21], **case}, {"probe_dir": "sedac_data"})
    assert sentence in str(error.value)


def test_a_config_typo_ends_the_script_with_one_sentence(tmp_path, script):
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps({"cases": CASES, "modell": "default"}))
    done = script("sedac_test_suite.py", "--config", path, "--out-dir", tmp_path / "reports")
    assert done.returncode == 2 and "unknown key 'modell'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "reports").exists()


def test_text_that_was_trained_on_is_left_out(suite, tiny_artifact):
    from sedac_core.artifacts import Manifest
    from sedac_core.collection import read_documents

    trained = [int(index) for index in Manifest.load(tiny_artifact).training["trained_documents"].split(",")]
    text = suite.held_out_text({"text": "pydoc", "probe_dir": str(tiny_artifact)})
    documents = read_documents("pydoc")
    assert trained and not any(documents[index] in text for index in trained if len(documents[index]) > 200)
    assert len(text) > 10_000


def test_windows_for_perplexity_cover_the_text_once(suite):
    config = {"ppl": {"tokens": 10, "window": 4}}
    assert suite.ppl_windows(list(range(20)), config) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert suite.ppl_windows(list(range(20)), {"ppl": {"tokens": 9, "window": 4}})[-1] == [4, 5, 6, 7]
    assert suite.ppl_windows(list(range(20)), {"ppl": {"tokens": 0, "window": 4}}) == []


def test_changes_since_older_results_are_found_by_their_conditions(suite, capsys):
    old = {
        "system": "sedac",
        "case": "c",
        "phase": "decode",
        "batch": 1,
        "metric": "speedup",
        "value": 1.0,
        "unit": "x",
    }
    suite.print_changes([old], [old | {"value": 1.5, "exit_rate": 0.2}, old | {"batch": 4}])
    out = capsys.readouterr().out
    assert out.count("was") == 1 and "was 1, now 1.500x" in out


# ---------------------------------------------------------------- servers

# A server of two processes, as vLLM's is; the child ignores SIGTERM, and the parent may do so or die early.
STAND_IN = """
import http.server, os, signal, subprocess, sys, time
mode, port, note = sys.argv[1], int(sys.argv[2]), sys.argv[3]
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child])
open(note, "w").write(str(process.pid))
if mode == "dies":
    print("(EngineCore pid=1) ERROR 11-24 [core.py:1] ValueError: no such model", flush=True)
    sys.exit("RuntimeError: Engine core initialization failed.")
if mode == "hangs":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        page = b'# TYPE sedac_exits_total counter\\nsedac_exits_total{checkpoint="7"} 5\\nother_total 1\\n'
        self.send_response(200); self.end_headers(); self.wfile.write(page)
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """`stand_in(mode)` is a Server that runs real processes other than vLLM; `.note` names its child's pid."""

    def make(mode, **options):
        note = tmp_path / "child.pid"
        monkeypatch.setattr(
            serving,
            "server_command",
            lambda model, port, host, args: [sys.executable, "-c", STAND_IN, mode, str(port), str(note)],
        )
        monkeypatch.setattr(serving, "STOP_SECONDS", 1.0)
        server = serving.Server("model", tmp_path / "server.log", **options)
        server.note = note
        return server

    return make


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds=10):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_a_server_is_ready_inside_its_block_and_wholly_gone_after_it(stand_in):
    with stand_in("serves") as server:
        parent, child = server.process.pid, int(server.note.read_text())
        assert serving.counters(server.url) == {'sedac_exits_total{checkpoint="7"}': 5.0}
        folder = server._metrics.name
        assert alive(parent) and alive(child) and Path(folder).is_dir()
    assert gone(parent) and gone(child) and not Path(folder).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SedacError])
def test_whatever_ends_the_block_ends_the_server(stand_in, error):
    server = stand_in("serves")
    with pytest.raises(error), server:
        child = int(server.note.read_text())
        raise error("stop")
    assert gone(child)


def test_a_server_that_dies_at_its_start_is_told_with_its_first_error_and_leaves_nothing(stand_in):
    server = stand_in("dies")
    with pytest.raises(SedacError) as error, server:
        pass
    said = str(error.value)
    assert "ended with code 1 before it was ready" in said and "first error: ValueError: no such model" in said
    assert said.splitlines()[-1].strip() == "RuntimeError: Engine core initialization failed."
    assert gone(int(server.note.read_text()))


def test_a_server_that_never_gets_ready_is_given_up_on(stand_in):
    server = stand_in("hangs", start_seconds=1.0)
    with pytest.raises(SedacError, match="was not ready after 1 s"), server:
        pass
    assert gone(int(server.note.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
@pytest.mark.parametrize("meanwhile", ["contextlib.nullcontext()", "server.paused()"], ids=["running", "paused"])
def test_no_server_is_left_when_this_program_is_killed(tmp_path, meanwhile):
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    program = f"""
import contextlib, sys, time
from pathlib import Path
from sedac_core import serving
serving.server_command = lambda model, port, host, args: [
    sys.executable, {str(stand_in)!r}, "serves", str(port), {str(tmp_path / "child.pid")!r}]
with serving.Server("model", Path({str(tmp_path / "server.log")!r})) as server, {meanwhile}:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    server = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert gone(server)
    os.kill(int((tmp_path / "child.pid").read_text()), signal.SIGKILL)  # vLLM's own children watch their parent


def test_a_port_in_use_is_one_sentence(stand_in):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SedacError, match=f"port {port} on 127.0.0.1 cannot be used .* choose another port"):
            stand_in("serves", port=port).__enter__()


def test_the_environment_has_defaults_that_a_user_can_override(tmp_path):
    plain = serving.server_environment("some/model", base={})
    assert "HF_HUB_OFFLINE" not in plain and plain["VLLM_NO_USAGE_STATS"] == "1"
    mine = serving.server_environment(
        str(tmp_path), {"SEDAC_ENABLED": "1"}, base={"VLLM_NO_USAGE_STATS": "0", "A": "b"}
    )
    assert mine["HF_HUB_OFFLINE"] == "1" and mine["VLLM_NO_USAGE_STATS"] == "0"
    assert mine["A"] == "b" and mine["SEDAC_ENABLED"] == "1"


# ---------------------------------------------------------------- the real thing

EAGER = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "256"]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("patched vLLM")
@pytest.mark.usefixtures("patched_vllm")
def test_a_matrix_runs_on_real_servers_and_one_failing_case_stops_no_other(tiny_model, tiny_artifact, tmp_path, script):
    config = {
        "repeats": 2,
        "warmup": 1,
        "server_args": [*EAGER, "--max-num-seqs", "4"],
        "decode": {"batches": [2], "tokens": 96},  # so long that a busy machine cannot hide it
        "prefill": {"tokens": [64]},
        "ppl": {"tokens": 256, "window": 64},
        "cases": [
            {"name": "broken", "keep_last": 1, "probe_rank": 999},
            {"name": "all exit", "keep_last": 1, "thresholds": "inf"},
        ],
    }
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(config))
    out = tmp_path / "reports"
    done = script(
        "sedac_test_suite.py", "--config", path, "--out-dir", out, "--model", tiny_model, "--probe-dir", tiny_artifact,
        "--verbose", timeout=800, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "SEDAC_THRESHOLDS": "0,0"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result["failed"]) == ["broken"] and "rank" in result["failed"]["broken"], result["failed"]
    good = result["cases"]["all exit"]
    assert good["exits_total"] > 0 and good["decode_speedup"]["2"] > 0 and good["prefill_speedup"]["64"] > 0
    assert good["ppl"] != good["ppl_stock"]

    records = json.loads((out / "matrix.json").read_text())["records"]
    rates = {r["checkpoint"]: r["value"] for r in records if r["metric"] == "exit_rate" and r["phase"] == "decode"}
    assert rates == {1: 1.0, 3: 1.0}  # the user's own SEDAC_THRESHOLDS did not get in
    saved = [r["value"] for r in records if r["metric"] == "mlp_rows_saved"]
    assert all(value == pytest.approx(3 / 6) for value in saved)  # layers 2 to 4 of 6: the last stays whole
    with open(out / "matrix.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(records)
    page = (out / "matrix.html").read_text()
    assert "Failed cases" in page and "Perplexity against stock" in page


def test_a_matrix_of_quality_judges_gates_and_needs_no_server(call, tiny_gates, tmp_path):
    path = tmp_path / "matrix.json"
    options = {"probe_dir": "nowhere", "saved": [0.2, 0.3], "samples": 16, "max_length": 48, "no_controls": True}
    path.write_text(json.dumps({"quality": options}))
    arguments = ["sedac_test_suite.py", "--config", path, "--out-dir", tmp_path / "out", "--probe-dir", tiny_gates]
    _, result = call(*arguments)
    assert result["quality"]["paragraphs"]["kl"].keys() == {"0.2", "0.3"}
    written = {kind: (tmp_path / "out" / f"matrix.{kind}").read_text() for kind in ("json", "csv", "html")}
    records = json.loads(written["json"])["records"]
    assert len(list(csv.DictReader(written["csv"].splitlines()))) == len(records) > 8
    assert "What saved bytes cost" in written["html"]
    assert json.loads(written["json"])["provenance"]["config"]["quality"]["probe_dir"] == str(tiny_gates)
    out, again = call(*arguments, "--compare", tmp_path / "out" / "matrix.json")
    assert again == result and out.count("now 1.000x") >= 8
    with pytest.raises(SedacError, match=r"no manifest.json in nowhere"):
        call(*arguments[:-2])
