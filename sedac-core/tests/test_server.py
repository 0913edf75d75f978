"""A live server as its operator and its clients meet it. One pair of servers, SEDAC's and stock, for most of the file."""

import concurrent.futures
import contextlib
import json
import math
import random
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import openai
from conftest import ROOT, prompts
from live import EAGER, KEY, KEYED, TOOLS, client, complete, started, tokens

from sedac_core import bench_dashboard, serving
from sedac_core.cli import SedacError

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("patched vLLM")]
ODD = 260  # a token whose embedding is NaN
LONG = 300  # tokens: more than two blocks of the KV cache


@pytest.fixture(scope="session")
def odd_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a token whose embedding is NaN."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("odd") / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ODD] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sedac(odd_model, three_checkpoints, stock_vllm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sedac")
    with started(
        "sedac", odd_model, folder, ["--probe-dir", three_checkpoints, "--admin"], [*EAGER, *KEYED, *TOOLS]
    ) as server:
        yield server


@pytest.fixture(scope="module")
def stock(odd_model, tmp_path_factory):
    with started("stock", odd_model, tmp_path_factory.mktemp("stock"), ["--stock"], [*EAGER, *KEYED]) as server:
        yield server


def counted(server: serving.Server, before: dict | None = None) -> dict[str, float]:
    now = serving.counters(server.url)
    return {name: value - before.get(name, 0) for name, value in now.items()} if before is not None else now


def exits_of(server: serving.Server, prompt: list[int], choice: str | None) -> float:
    before = counted(server)
    complete(server, prompt, choice, max_tokens=1)
    seen = counted(server, before)
    return sum(value for name, value in seen.items() if name.startswith("sedac_exits_total"))


def test_requests_that_opt_out_are_stocks_in_one_batch_with_others(sedac, stock):
    batch = prompts(16, 40, seed=1)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        wanted = list(pool.map(lambda prompt: tokens(complete(stock, prompt)), batch))
        chosen = [("off", None, "aggressive", "off")[i % 4] for i in range(16)]
        found = list(pool.map(lambda pair: tokens(complete(sedac, *pair)), zip(batch, chosen, strict=True)))
    same = [a == b for a, b in zip(wanted, found, strict=True)]
    assert all(same[0::4]) and all(same[3::4]), "those that opted out"
    assert not all(same[1::4]) and not all(same[2::4]), "the others do exit"


def test_presets_exit_as_much_as_their_names_say_and_default_is_the_manifests(sedac):
    exits = {}
    for name in (None, "off", "conservative", "balanced", "aggressive"):
        exits[name] = sum(exits_of(sedac, prompt, name) for prompt in prompts(4, 60, seed=2))
    assert exits["off"] == 0 < exits["conservative"] < exits["balanced"] < exits["aggressive"] < 240
    assert exits[None] == exits["aggressive"], "its thresholds are this artefact's own"


def test_blocks_of_another_policy_are_never_reused(sedac, stock):
    (prompt,) = prompts(1, LONG, seed=3)
    hits = "vllm:prefix_cache_hits_total"

    def reused() -> float:
        page = serving.get(sedac.url, "/metrics").splitlines()
        return sum(float(line.split()[-1]) for line in page if line.startswith(hits))

    start = reused()
    ours = tokens(complete(sedac, prompt))
    assert tokens(complete(sedac, prompt)) == ours and reused() >= start + 128, "its own blocks are reused"
    start, wanted = reused(), complete(stock, prompt, logprobs=1)
    off = complete(sedac, prompt, "off", logprobs=1)
    assert reused() == start and tokens(off) == tokens(wanted) != ours
    assert off.choices[0].logprobs.token_logprobs == pytest.approx(wanted.choices[0].logprobs.token_logprobs, abs=1e-3)
    again = complete(sedac, prompt, "off", logprobs=1)
    assert reused() >= start + 128 and tokens(again) == tokens(wanted)
    start = reused()
    complete(sedac, prompt, "balanced")
    assert reused() == start


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", ["offf", "OFF", "", 0, ["off"]])
def test_wrong_values_answer_400_with_the_allowed_ones(sedac, stream, value):
    for kind in ("completions", "chat"):
        with pytest.raises(openai.BadRequestError) as error:
            if kind == "completions":
                complete(sedac, [5, 6, 7], value, stream=stream)
            else:
                client(sedac).chat.completions.create(
                    model=sedac.model, messages=[{"role": "user", "content": "Hi"}], stream=stream,
                    extra_body={"vllm_xargs": {"sedac": value}},
                )  # fmt: skip
        assert "must be one of off, conservative, balanced, aggressive, found" in str(error.value)


def test_what_would_drop_the_argument_or_forge_its_salt_is_refused(sedac):
    for extra in (
        {"use_beam_search": True, "n": 2, "vllm_xargs": {"sedac": "off"}},
        {"cache_salt": "sedac:off:"},
    ):
        with pytest.raises(openai.BadRequestError, match="sedac"):
            client(sedac).completions.create(model=sedac.model, prompt=[5, 6], max_tokens=2, extra_body=extra)


def test_streams_logprobs_several_choices_chat_and_guided_decoding_keep_working(sedac, stock):
    (prompt,) = prompts(1, 30, seed=4)
    streamed, whole = [], complete(stock, prompt)
    for piece in complete(sedac, prompt, "off", stream=True):
        streamed += piece.choices[0].token_ids
    assert streamed == tokens(whole)
    three = complete(sedac, prompt, "off", n=3, temperature=0.9, seed=7, logprobs=2)
    like = complete(stock, prompt, n=3, temperature=0.9, seed=7, logprobs=2)
    assert [choice.token_ids for choice in three.choices] == [choice.token_ids for choice in like.choices]
    assert three.choices[2].logprobs.token_logprobs == pytest.approx(like.choices[2].logprobs.token_logprobs, abs=1e-3)

    ask = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10, "temperature": 0}
    off = {"vllm_xargs": {"sedac": "off"}, "structured_outputs": {"regex": "(yes|no){3}"}}
    ours = client(sedac).chat.completions.create(model=sedac.model, **ask, extra_body=off)
    theirs = client(stock).chat.completions.create(
        model=stock.model, **ask, extra_body={"structured_outputs": off["structured_outputs"]}
    )
    assert ours.choices[0].message.content == theirs.choices[0].message.content
    assert len(ours.choices[0].message.content) >= 6
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    called = client(sedac).chat.completions.create(
        model=sedac.model, **ask | {"max_tokens": 60}, tools=[tool],
        tool_choice={"type": "function", "function": {"name": "f"}}, extra_body={"vllm_xargs": {"sedac": "balanced"}},
    )  # fmt: skip
    assert called.choices[0].message.tool_calls[0].function.name == "f"


# ---------------------------------------------------------------- metrics


def test_metrics_add_up(sedac):
    before = counted(sedac)
    (prompt,) = prompts(1, 60, seed=5)
    complete(sedac, prompt, max_tokens=1)
    complete(sedac, prompt, "off", max_tokens=1)
    seen = counted(sedac, before)
    assert seen["sedac_tokens_total"] == 120 and seen["sedac_forward_steps_total"] == 2
    reached = 120
    for layer in (1, 2, 3):
        decided = {
            name: seen.get(f'sedac_decisions_total{{checkpoint="{layer}",decision="{name}"}}', 0)
            for name in ("exit", "run", "not_finite")
        }
        assert sum(decided.values()) == reached and not decided["not_finite"]
        assert decided["exit"] == seen[f'sedac_exits_total{{checkpoint="{layer}"}}'] > 0
        assert seen[f'sedac_risk_bucket{{checkpoint="{layer}",le="+Inf"}}'] == reached
        assert 0 < seen[f'sedac_risk_bucket{{checkpoint="{layer}",le="1.0"}}'] < reached
        reached -= decided["exit"]
    computed, saved = seen["sedac_mlp_rows_computed_total"], seen["sedac_mlp_rows_saved_total"]
    assert computed + saved == 6 * 120 and saved > 0
    one = 3 * 64 * 128 * 4  # bytes of an MLP
    assert seen['sedac_mlp_bytes_total{part="stock"}'] == 6 * 120 * one
    assert seen['sedac_mlp_bytes_total{part="read"}'] == computed * one
    assert seen['sedac_steps_by_path_total{path="gather"}'] == seen['sedac_steps_by_path_total{path="dense"}'] == 1
    assert seen['sedac_fallback_tokens_total{reason="request"}'] == 60
    assert counted(sedac)['sedac_calibration{state="manifest"}'] == 1
    assert counted(sedac)['sedac_threshold{checkpoint="3"}'] == pytest.approx(1.7)


def test_a_token_that_is_not_finite_never_exits_and_is_counted(sedac):
    (prompt,) = prompts(1, 30, seed=6)
    alone = complete(sedac, prompt)
    before = counted(sedac)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        sick = pool.submit(complete, sedac, [*prompt[:10], ODD, *prompt[10:20]], max_tokens=1)
        assert tokens(complete(sedac, prompt)) == tokens(alone), "others in the batch are as they were"
        sick.result()
    seen = counted(sedac, before)
    odd = [seen[f'sedac_decisions_total{{checkpoint="{layer}",decision="not_finite"}}'] for layer in (1, 2, 3)]
    assert 11 <= odd[0] <= 21, (
        "the odd token and the ten that attend to it; on CPUs 0 x NaN reaches those before it as well"
    )
    assert odd[0] == odd[1] == odd[2], "none has exited before the last checkpoint"


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus on PATH (Debian: apt install prometheus)")
def test_every_panel_of_the_dashboard_has_data_in_a_real_prometheus(sedac, tmp_path):
    panels = json.loads((ROOT / "docs/grafana.json").read_text())["panels"]
    start, scraped = time.time(), 0
    with bench_dashboard.Prometheus(sedac.url, tmp_path, interval="1s") as prometheus:

        def query(expression: str) -> list:
            return bench_dashboard.ask(prometheus.url, "query", query=expression.replace("$__rate_interval", "10s"))

        while scraped < 4 and time.time() < start + 60:  # rates need a few scrapes of a server at work
            for choice, prompt in zip((None, "off"), prompts(2, 30, seed=14), strict=True):
                complete(sedac, prompt, choice)
            found = query("count_over_time(sedac_tokens_total[1m])")
            scraped = int(found[0]["value"][1]) if found else 0
            time.sleep(0.5)
        for panel in panels:
            for target in panel["targets"]:
                values = [float(found["value"][1]) for found in query(target["expr"])]
                if panel["description"].startswith("Gates only"):
                    assert not values
                else:
                    assert values and not any(map(math.isnan, values)), target["expr"]
        picture, dashboard = tmp_path / "dashboard.png", ROOT / "docs/grafana.json"
        lines = bench_dashboard.draw(prometheus.url, start, time.time(), picture, dashboard)
    assert lines >= 20 and picture.read_bytes().startswith(b"\x89PNG")


def test_the_dashboard_asks_for_metrics_that_exist():
    from prometheus_client import Counter, Gauge, Histogram

    from sedac_core import metrics

    ours = [metric for metric in vars(metrics).values() if isinstance(metric, (Counter, Gauge, Histogram))]
    known = {family.name for metric in ours for family in metric.describe()}
    text = (ROOT / "docs/grafana.json").read_text()
    asked = {re.sub("_(total|bucket)$", "", name) for name in re.findall(r"\bsedac_\w+", text)}
    assert len(asked) >= 12 and asked <= known


# ---------------------------------------------------------------- the admin call


def admin(server: serving.Server, **change) -> dict:
    return serving.post(server.url, "/sedac", change, api_key=KEY)


def asked(server: serving.Server, method: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"{server.url}/sedac", data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_admin_call_needs_the_servers_key(sedac, stock):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        assert asked(sedac, "POST", b'{"enabled": false}', **headers)[0] == 401
        assert asked(sedac, "GET", **headers)[0] == 401
    key = {"Authorization": f"Bearer {KEY}"}
    status, told = asked(sedac, "GET", **key)
    assert status == 200 and json.loads(told)["now"]["enabled"] and json.loads(told)["workers"] == 1
    assert asked(sedac, "DELETE", **key)[0] == 405
    assert asked(stock, "GET", **key)[0] == 404, "off by default"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "no JSON"),
        (b"{}", "give a JSON object with one or more of enabled, adaptive, thresholds"),
        (b'{"threshold": [1, 2, 3]}', "give a JSON object"),
        (b'{"thresholds": [1, 2]}', "thresholds has 2 values"),
        (b'{"thresholds": [1, 2, NaN]}', "thresholds are numbers"),
        (b'{"exit_rates": [0.5, 0.2, 0.9]}', "do not fall"),
        (b'{"exit_rates": [0.5, 0.6, 0.9], "thresholds": [1, 1, 1]}', "give one or the other"),
        (b'{"log_lambda": -3}', "log_lambda is for gates"),
        (b'{"enabled": 1}', "enabled is true or false"),
        (b"[" * 30_000, "no JSON"),
        (b" " * 70_000, "more than 65536 bytes"),
    ],
)
def test_a_wrong_change_answers_400_and_changes_nothing(sedac, body, sentence):
    key = {"Authorization": f"Bearer {KEY}"}
    before = asked(sedac, "GET", **key)
    status, told = asked(sedac, "POST", body, **key)
    assert status == 400 and sentence in told
    assert asked(sedac, "GET", **key) == before


@contextlib.contextmanager
def put_back(server: serving.Server):
    """Afterwards the manifest's thresholds are in force again."""
    try:
        yield
    finally:
        admin(server, enabled=True, thresholds=[1.0, 1.3, 1.7])


def test_sedac_switches_off_and_on_without_a_block_of_the_old_policy_left(sedac, stock):
    (prompt,) = prompts(1, LONG, seed=7)
    ours, theirs = tokens(complete(sedac, prompt)), tokens(complete(stock, prompt))
    assert ours != theirs
    with put_back(sedac):
        told = admin(sedac, enabled=False)
        assert told["before"]["enabled"] and not told["now"]["enabled"] and told["workers"] == 1
        assert tokens(complete(sedac, prompt)) == theirs
        assert exits_of(sedac, prompts(1, 40, seed=8)[0], "aggressive") == 0, "presets are off, too"
        now = counted(sedac)
        assert now['sedac_threshold{checkpoint="1"}'] == 0 and now['sedac_calibration{state="switched off"}'] == 1
        assert now['sedac_fallback_tokens_total{reason="switched off"}'] > LONG
    assert tokens(complete(sedac, prompt)) == ours
    log = sedac.log.read_text()
    assert "SEDAC changed by an admin call: enabled was True, is False" in log


def test_thresholds_change_while_requests_run(sedac, script):
    (prompt,) = prompts(1, 60, seed=9)
    with put_back(sedac), concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(complete, sedac, own, max_tokens=150) for own in prompts(8, 20, seed=10)]
        time.sleep(1)
        assert admin(sedac, thresholds=["inf", 0, 0])["now"]["thresholds"] == ["inf", 0.0, 0.0]
        assert all(len(tokens(request.result())) == 150 for request in running)
        assert exits_of(sedac, prompt, None) == 60
        done = script("sedac_calibrate.py", "--server", sedac.url, "--api-key", KEY, "--thresholds", "0,0,0")
        assert done.returncode == 0, done.stderr
        assert "thresholds: was ['inf', 0.0, 0.0], is [0.0, 0.0, 0.0]" in done.stdout
        assert exits_of(sedac, prompt, None) == 0


def test_target_rates_are_followed_from_the_call_on(sedac, script):
    with put_back(sedac):
        done = script("sedac_calibrate.py", "--server", sedac.url, "--api-key", KEY, "--exit-rates", "0.2,0.4,0.6")
        assert done.returncode == 0, done.stderr
        assert "exit_rates: was None, is [0.2, 0.4, 0.6]" in done.stdout
        for prompt in prompts(40, 200, seed=11):
            complete(sedac, prompt, max_tokens=1)
        before = counted(sedac)
        for prompt in prompts(20, 200, seed=12):
            complete(sedac, prompt, max_tokens=1)
        seen = counted(sedac, before)
        exited = [seen[f'sedac_exits_total{{checkpoint="{layer}"}}'] for layer in (1, 2, 3)]
        rates = [sum(exited[: i + 1]) / seen["sedac_tokens_total"] for i in range(3)]
        assert rates == pytest.approx([0.2, 0.4, 0.6], abs=0.05)
        frozen = admin(sedac, adaptive=False)
        assert frozen["now"]["thresholds"] == pytest.approx(frozen["before"]["thresholds"])
        assert "exit_rates" not in frozen["now"]


def test_without_a_key_the_admin_call_stays_shut(call, odd_model, three_checkpoints, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(SedacError, match="--admin needs an API key"):
        call("sedac_start_server.py", "--model", odd_model, "--probe-dir", three_checkpoints, "--admin", "--dry-run")


# ---------------------------------------------------------------- malformed requests


def test_a_thousand_malformed_requests_leave_the_server_as_it_was(sedac):
    prompt = prompts(1, 30, seed=13)[0]
    before = tokens(complete(sedac, prompt)), tokens(complete(sedac, prompt, "off"))
    description = json.loads(serving.get(sedac.url, "/openapi.json"))
    paths = [path for path, methods in description["paths"].items() if "post" in methods and "{" not in path]
    paths = [path for path in paths if path.startswith(("/v1", "/tokenize", "/detokenize"))]
    assert "/v1/completions" in paths
    draw, statuses = random.Random(0), {}
    junk = [
        None,
        True,
        -1,
        0,
        1e400,
        2**63,
        "",
        "off",
        "\ud800",
        [],
        {},
        [[]],
        {"sedac": "off"},
        {"sedac": {}},
        "x" * 3000,
    ]

    def value(depth: int = 0):
        if depth < 3 and draw.random() < 0.3:
            names = ("sedac", "role", "content", "type", "json", "cache_salt", "")
            return {draw.choice(names): value(depth + 1) for _ in range(draw.randrange(4))}
        return draw.choice(junk)

    fields = ["prompt", "messages", "max_tokens", "n", "temperature", "vllm_xargs", "cache_salt", "logprobs", "stop", "stream",
              "model", "structured_outputs", "seed", "logit_bias", "tools", "response_format", "input", "min_tokens"]  # fmt: skip

    def send(_: int) -> int:
        body = {"model": sedac.model, "prompt": [5, 6], "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        for name in draw.sample(fields, draw.randrange(1, 5)):
            body[name] = value()
        data = json.dumps(body).encode()
        if draw.random() < 0.2:
            cut = draw.randrange(len(data))
            data = (
                data[:cut]
                + bytes(draw.randrange(256) for _ in range(draw.randrange(8)))
                + data[cut + draw.randrange(8) :]
            )
        path = draw.choice([*paths, "/v1/completions", "/v1/chat/completions", "/sedac"])
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(sedac.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
                return path, response.status
        except urllib.error.HTTPError as error:
            error.read()
            return path, error.code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for path, status in pool.map(send, range(1000)):
            statuses[path, status] = statuses.get((path, status), 0) + 1
    assert sum(statuses.values()) == 1000
    assert {status for path, status in statuses if path == "/sedac"} == {400}
    failed = {key: count for key, count in statuses.items() if key[1] >= 500}
    assert not [key for key in failed if key[0] == "/sedac"]
    print("server errors, vLLM's own:", failed)
    assert (tokens(complete(sedac, prompt)), tokens(complete(sedac, prompt, "off"))) == before
