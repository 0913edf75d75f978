"""A live server as its operator and its clients meet it. One pair of servers, SEDAC's and stock, for most of the file."""

import concurrent.futures
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import openai
from conftest import ROOT, prompts

from sedac_core import serving, vllm_patch
from sedac_core.artifacts import Fingerprint, Manifest, probe_path, save_tensor
from sedac_core.probe import LREProbe

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("patched vLLM")]
KEY = "sedac-test-key"
VLLM = ["--enforce-eager", "--dtype", "float32", "--max-model-len", 512, "--max-num-batched-tokens", 512]
KEYED = ["--api-key", KEY]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "SEDAC_LOG_EVERY": "0"}
LONG = 300  # tokens: more than two blocks of the KV cache


@pytest.fixture(scope="session")
def artefact(tiny_model, tmp_path_factory) -> Path:
    """Three checkpoints, whose random probes see risks on both sides of every preset's thresholds."""
    from transformers import AutoConfig

    folder = tmp_path_factory.mktemp("three_checkpoints")
    with torch.random.fork_rng():
        for layer in (1, 2, 3):
            torch.manual_seed(layer)
            probe = LREProbe(64, 16)
            torch.nn.init.normal_(probe.head.weight, std=0.35)
            torch.nn.init.constant_(probe.head.bias, 0.8)
            save_tensor(probe.state_dict(), probe_path(folder, layer))
    fingerprint = Fingerprint.of(AutoConfig.from_pretrained(tiny_model))
    manifest = Manifest(str(tiny_model), fingerprint, (1, 2, 3), rank=16, keep_last=1)
    manifest.thresholds = {1: 1.0, 2: 1.3, 3: 1.7}
    manifest.save(folder)
    return folder


def started(name: str, model: Path, folder: Path, options: list, vllm: list = (), settings=None) -> serving.Server:
    port = serving.free_port()
    launcher = [sys.executable, ROOT / "sedac_start_server.py", "--model", model, "--port", port]
    command = [*launcher, *options, "--", *VLLM, *vllm]
    log, environment = folder / f"{name}.log", SETTINGS | (settings or {})
    return serving.Server(str(model), log, environment, port=port, command=[str(part) for part in command], name=name)


@pytest.fixture(scope="module")
def stock_file():
    """vLLM's file is stock during these tests: the servers here are patched in memory, by the plugin."""
    target = vllm_patch.find_target()
    was = vllm_patch.Target.read(target).state()
    vllm_patch.revert(target)
    yield
    if was == "patched":
        vllm_patch.patch(target)


@pytest.fixture(scope="module")
def sedac(tiny_model, artefact, stock_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sedac")
    with started("sedac", tiny_model, folder, ["--probe-dir", artefact], [*KEYED, *TOOLS]) as server:
        yield server


@pytest.fixture(scope="module")
def stock(tiny_model, tmp_path_factory):
    with started("stock", tiny_model, tmp_path_factory.mktemp("stock"), ["--stock"], KEYED) as server:
        yield server


def client(server: serving.Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def complete(server: serving.Server, prompt: list[int], choice: str | None = None, **options):
    extra = {"ignore_eos": True, "return_token_ids": True}
    if choice is not None:
        extra["vllm_xargs"] = {"sedac": choice}
    options = {"max_tokens": 12, "temperature": 0} | options
    return client(server).completions.create(model=server.model, prompt=prompt, extra_body=extra, **options)


def tokens(answer) -> list[int]:
    return answer.choices[0].token_ids


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
