"""Step 6 against a real HTTP server that speaks OpenAI's stream protocol, well or badly."""

import asyncio
import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

ROOT = Path(__file__).resolve().parents[2]
GAP = 0.01  # seconds between tokens


class FakeServer:
    """An asyncio server in a thread. `faults[i]` says how the i-th completion goes wrong; `bundle` tokens a piece."""

    def __init__(self, gap=GAP, bundle=1, faults=None, always=None, usage=True):
        self.gap, self.bundle, self.faults, self.always, self.usage = gap, bundle, faults or {}, always, usage
        self.bodies = []
        self.in_flight = self.most_in_flight = 0

    def __enter__(self):
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *error):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def _run(self, ready):
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.add_routes([web.get("/v1/models", self.models), web.post("/v1/completions", self.completions)])
        runner = web.AppRunner(app)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    async def models(self, request):
        return web.json_response({"data": [{"id": "tiny"}]})

    async def completions(self, request):
        body = await request.json()
        fault = self.always or self.faults.get(len(self.bodies))
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.answer(request, body, fault)
        finally:
            self.in_flight -= 1

    async def answer(self, request, body, fault):
        total = body["max_tokens"]
        if fault == "refuse":
            return web.json_response({"error": {"message": "too long"}}, status=400)
        if not body["stream"]:
            await asyncio.sleep(self.gap * total)
            return web.json_response({"choices": [{"text": "x" * total}], "usage": {"completion_tokens": total}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(piece):
            await response.write(f"data: {piece if isinstance(piece, str) else json.dumps(piece)}\n\n".encode())

        for sent in range(self.bundle, total + 1, self.bundle):
            await asyncio.sleep(self.gap * self.bundle)
            if fault == "hang" and sent > total // 2:
                await asyncio.sleep(30)
            if fault == "drop" and sent > total // 2:
                request.transport.close()
                return response
            if fault == "cut" and sent > total // 2:
                return response
            if fault == "error" and sent > total // 2:
                await send({"error": {"message": "out of memory"}})
                return response
            if fault == "garbage":
                await send("{not json")
            piece = {"choices": [{"text": "é"}]}
            if self.usage and body["stream_options"].get("continuous_usage_stats"):
                piece["usage"] = {"completion_tokens": sent}
            await send(piece)
        if self.usage:
            await send({"choices": [], "usage": {"completion_tokens": total}})
        await send("[DONE]")
        return response


def bench(*arguments, timeout=120):
    command = [sys.executable, str(ROOT / "qwen7b_vllm_bench.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1:] or ["null"]
    return done, json.loads(last[0]) if done.returncode in (0, 1) else None


def small(server, *more, timeout=120):
    sizes = ("--requests", 8, "--concurrency", 2, "--max-tokens", 10, "--warmup", 1)
    return bench("--url", server.url, *sizes, *more, timeout=timeout)


def test_it_measures_first_token_gaps_and_throughput(tmp_path):
    with FakeServer() as server:
        done, result = small(server, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    found = result["server"]
    assert found["requests"] == 8 and found["failures"] == {} and found["tokens"] == 80
    assert 10 <= found["ttft_ms"]["p50"] < 100
    assert 9 <= found["itl_ms"]["p50"] < 40
    assert found["itl_ms"]["p50"] <= found["itl_ms"]["p95"] <= found["itl_ms"]["p99"]
    assert 20 < found["tokens_per_second"]["value"] < 2 / GAP
    assert server.most_in_flight == 2 and len(server.bodies) == 9  # one of them warm-up
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    metrics = {record["metric"]: record["value"] for record in records}
    assert metrics["requests"] == 8 and metrics["failures"] == 0
    assert {"p99_itl_ms", "p50_ttft_ms", "tokens_per_second", "requests_per_second"} <= metrics.keys()
    assert "first token, p50" in done.stdout


def test_tokens_that_arrive_together_are_counted_one_by_one():
    with FakeServer(bundle=5) as server:
        _, result = small(server)
    assert result["server"]["tokens"] == 80
    assert 8 <= result["server"]["itl_ms"]["p99"] < 40  # 50 ms for five tokens


def test_without_streaming_there_is_no_time_to_first_token():
    with FakeServer() as server:
        done, result = small(server, "--no-stream")
    assert done.returncode == 0
    assert result["server"]["ttft_ms"] is None and result["server"]["tokens"] == 80
    assert not any(body["stream"] for body in server.bodies)


def test_two_servers_get_the_same_requests_in_turn_and_their_ratio_is_paired():
    with FakeServer(gap=0.005) as server, FakeServer(gap=0.02) as baseline:
        done, result = small(server, "--baseline-url", baseline.url, "--ignore-eos", "--seed", 3)
    assert done.returncode == 0
    assert 1.5 < result["server"]["speedup"]["value"] < 4.5
    prompts = [Counter((body["prompt"], body["seed"]) for body in s.bodies) for s in (server, baseline)]
    assert prompts[0] == prompts[1]
    assert all(body["ignore_eos"] for body in server.bodies)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refuse", "HTTP 400: {"),
        ("drop", "Client"),
        ("cut", "the stream ended before [DONE]"),
        ("error", "error in the stream: {'message': 'out of memory'}"),
        ("garbage", "the answer is not what OpenAI's protocol says"),
    ],
)
def test_a_request_that_fails_is_counted_with_its_reason_and_stops_no_other(fault, reason):
    with FakeServer(faults={4: fault}) as server:
        done, result = small(server)
    assert done.returncode == 0, done.stderr
    assert result["server"]["requests"] == 7 and result["server"]["tokens"] == 70
    assert [text.startswith(reason) or reason in text for text in result["server"]["failures"]] == [True]
    assert "1 failed on server" in done.stdout


def test_a_server_that_hangs_is_given_up_on():
    with FakeServer(faults={1: "hang"}) as server:
        done, result = small(server, "--timeout", 1)
    assert done.returncode == 0
    assert result["server"]["failures"] == {"no whole answer in 1 s": 1}


def test_without_usage_tokens_are_not_guessed():
    with FakeServer(usage=False) as server:
        done, result = small(server)
    assert done.returncode == 1
    assert result["server"]["failures"] == {"the server reported no usage, so its tokens cannot be counted": 8}


def test_when_every_request_fails_the_exit_code_says_so():
    with FakeServer(always="refuse") as server:
        done, result = small(server)
    assert done.returncode == 1 and result["server"]["requests"] == 0
    assert result["server"]["tokens_per_second"] is None


def test_a_server_that_is_not_there_is_one_sentence():
    done, _ = bench("--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: http://127.0.0.1:9/v1/models cannot be reached")
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_served_is_refused_with_those_that_are():
    with FakeServer() as server:
        done, _ = small(server, "--model", "other")
    assert done.returncode == 2 and "serves tiny, not other" in done.stderr


def test_prompts_come_from_a_file(tmp_path):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("first\n\nsecond\n")
    lines.write_text('{"prompt": "third"}\n{"prompt": "fourth\u2028"}\n', encoding="utf-8")
    with FakeServer(gap=0) as server:
        assert small(server, "--prompts", plain)[0].returncode == 0
        assert small(server, "--prompts", lines)[0].returncode == 0
    assert {body["prompt"] for body in server.bodies} == {"first", "second", "third", "fourth\u2028"}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("empty.txt", " \n", "holds no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 of"),
        ("missing.txt", None, "cannot be read as UTF-8 text"),
    ],
)
def test_a_bad_prompt_file_is_one_sentence(tmp_path, name, text, sentence):
    if text is not None:
        (tmp_path / name).write_text(text)
    done, _ = bench("--prompts", tmp_path / name)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
