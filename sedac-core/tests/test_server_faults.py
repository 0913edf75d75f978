"""What goes wrong around live servers, and what comes of it. Two servers side by side: one compiled, one whose metrics
lie on a small disk. The tests that end a server come last."""

import concurrent.futures
import contextlib
import os
import re
import signal
import subprocess
import threading
import time

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import openai
from conftest import prompts
from live import EAGER, KEY, KEYED, complete, started, tokens

from sedac_core import serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("patched vLLM")]


@pytest.fixture(scope="module")
def compiled(tiny_model, three_checkpoints, stock_vllm, tmp_path_factory):
    options = ["--probe-dir", three_checkpoints]
    drains = [*KEYED, "--shutdown-timeout", 90]
    with started("compiled", tiny_model, tmp_path_factory.mktemp("compiled"), options, drains) as server:
        yield server


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A folder on a disk of its own of 40 MiB, where this process may mount one; else an ordinary folder."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True).returncode == 0
    )
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def cramped(tiny_model, three_checkpoints, stock_vllm, small_disk, tmp_path_factory):
    """A server whose metrics lie on the small disk."""
    options = ["--probe-dir", three_checkpoints, "--exit-rates", "0.3,0.5,0.7"]
    server = started("cramped", tiny_model, tmp_path_factory.mktemp("cramped"), options, [*EAGER, *KEYED])
    server.command = ["env", f"PROMETHEUS_MULTIPROC_DIR={small_disk[0]}", *server.command]
    server.environment["SEDAC_CALIBRATION_STEPS"] = "4"
    with server:
        yield server


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_workers_change_together_and_count_once(tiny_model, three_checkpoints, stock_vllm, tmp_path):
    options, (first, second, *_) = ["--probe-dir", three_checkpoints, "--admin"], sorted(os.sched_getaffinity(0))
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    with started("parallel", tiny_model, tmp_path, options, [*EAGER, *KEYED, "-tp", 2], binding) as server:
        (prompt,) = prompts(1, 40, seed=7)
        before = serving.counters(server.url)
        off = tokens(complete(server, prompt, "off"))
        assert serving.counters(server.url)["sedac_tokens_total"] - before["sedac_tokens_total"] == 51
        assert tokens(complete(server, prompt)) != off
        told = serving.post(server.url, "/sedac", {"enabled": False}, api_key=KEY)
        assert told["workers"] == 2 and tokens(complete(server, prompt)) == off
    assert server.log.read_text().count("SEDAC changed by an admin call: enabled was True, is False") == 2


def test_two_servers_share_a_machine_and_each_counts_its_own(compiled, cramped):
    (prompt,) = prompts(1, 40, seed=1)
    before = serving.counters(compiled.url)["sedac_tokens_total"]
    complete(cramped, prompt, max_tokens=1)
    complete(compiled, prompt, max_tokens=1)
    assert serving.counters(compiled.url)["sedac_tokens_total"] == before + 40
    with pytest.raises(serving.SedacError, match="another port"):
        serving.check_port("127.0.0.1", compiled.port)


def test_a_compiled_model_patched_in_memory_lets_requests_choose(compiled):
    batch = prompts(8, 40, seed=2)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        off = list(pool.map(lambda prompt: tokens(complete(compiled, prompt, "off")), batch))
        mixed = [
            pool.submit(complete, compiled, prompt, ("off", "aggressive")[i % 2]) for i, prompt in enumerate(batch)
        ]
        mixed = [tokens(request.result()) for request in mixed]
    assert mixed[0::2] == off[0::2] and mixed[1::2] != off[1::2]


def test_a_disk_that_fills_up_under_the_metrics_costs_no_request(cramped, small_disk):
    folder, mounted = small_disk
    if not mounted:
        pytest.skip("this process may not mount a small disk")
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    assert os.statvfs(folder).f_bavail == 0
    for prompt in prompts(20, 40, seed=5):
        assert len(tokens(complete(cramped, prompt, logprobs=1))) == 12
    assert serving.counters(cramped.url)["sedac_tokens_total"] >= 20 * 51, "what was there before goes on"


def test_adaptive_thresholds_observe_first_and_then_follow(cramped):
    for prompt in prompts(40, 200, seed=6):
        complete(cramped, prompt, max_tokens=1)
    now = serving.counters(cramped.url)
    assert now['sedac_calibration{state="adaptive"}'] == 1 and now['sedac_calibration{state="observing"}'] == 0
    assert now['sedac_fallback_tokens_total{reason="observing"}'] > 0


def test_a_worker_that_is_killed_ends_its_requests_and_the_server(cramped):
    log = cramped.log.read_text()
    worker = int(re.findall(r"\(Worker pid=(\d+)\)", log)[-1])
    group, begun = cramped.process.pid, threading.Barrier(5)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, cramped, own, begun) for own in prompts(4, 20, seed=3)]
        begun.wait(60)
        os.kill(worker, signal.SIGKILL)
        for request in running:
            with pytest.raises(openai.APIError):
                request.result(timeout=120)
    assert ended(cramped, group, 120) not in (0, None)


def test_sigterm_lets_what_runs_finish(compiled):
    group, begun = compiled.process.pid, threading.Barrier(5)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, compiled, own, begun) for own in prompts(4, 20, seed=4)]
        begun.wait(60)
        os.kill(group, signal.SIGTERM)
        assert [request.result(timeout=120) for request in running] == [450] * 4
    assert ended(compiled, group, 120) == 0


def stream(server: serving.Server, prompt: list[int], begun: threading.Barrier) -> int:
    """How many tokens a stream of 450 had; it waits at ``begun`` once the first of them is there."""
    pieces = iter(complete(server, prompt, stream=True, max_tokens=450))
    count = len(next(pieces).choices[0].token_ids)
    begun.wait(60)
    return count + sum(len(piece.choices[0].token_ids) for piece in pieces)


def ended(server: serving.Server, group: int, seconds: float) -> int | None:
    """The server's exit code once no process of its group is left; None if one still is after so many seconds."""
    give_up = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < give_up:
            server.process.poll()  # reaps the leader, which would count as a member of its group otherwise
            os.killpg(group, 0)
            time.sleep(0.1)
        return None
    return server.process.poll()
