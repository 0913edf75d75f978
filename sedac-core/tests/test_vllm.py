"""The real vLLM with SEDAC inside: what an exit changes, and what it does not."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="vLLM is not installed")

from conftest import prompts

from sedac_core.artifacts import Manifest, load_probe
from sedac_core.collection import cascade_hooks

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("one worker")]
ON = {"SEDAC_ENABLED": "1", "SEDAC_ADAPTIVE": "0", "SEDAC_LOG_EVERY": "0"}


def sedac(folder: Path, thresholds: str, **more: str) -> dict[str, str]:
    return {**ON, "SEDAC_PROBE_DIR": str(folder), "SEDAC_THRESHOLDS": thresholds, "SEDAC_KEEP_LAST": "1", **more}


def text_prompts(model: Path, count: int, length: int) -> list[list[int]]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)("\n".join(topics.values()))["input_ids"]
    return [ids[i * length : (i + 1) * length] for i in range(count)]


@pytest.fixture(scope="session")
def shipped() -> Path:
    return Path(__file__).resolve().parents[2] / "sedac_data"


def test_without_exits_greedy_tokens_are_those_of_stock(vllm, demo_model, shipped):
    batch = text_prompts(demo_model, 50, 24)
    stock = vllm(demo_model, batch, patched=False)
    off = vllm(demo_model, batch, SEDAC_ENABLED="0")
    never = vllm(demo_model, batch, **sedac(shipped, "0,0,0"))
    assert stock["batches"][0]["tokens"] == off["batches"][0]["tokens"] == never["batches"][0]["tokens"]
    assert never["counters"]["exits"] == [0, 0, 0] and never["counters"]["tokens"] > 50 * 24


def test_a_stock_qwen2_that_was_imported_before_is_refused(vllm, tiny_model, three_checkpoints):
    with pytest.raises(AssertionError, match="was imported before SEDAC could patch it"):
        vllm(tiny_model, prompts(1, 8), patched=False, **sedac(three_checkpoints, "0,0,0"))


def test_a_model_of_other_layers_is_not_served_as_if_sedac_ran_in_it(vllm, tiny_model, three_checkpoints, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

    config = Qwen2Config.from_pretrained(tiny_model).to_dict()
    config.pop("model_type")
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path)
    options = {"skip_tokenizer_init": True}
    with pytest.raises(
        AssertionError, match="SEDAC is on, but vLLM loaded LlamaForCausalLM without it: choose a Qwen2"
    ):
        vllm(tmp_path, prompts(1, 8), llm=options, **sedac(three_checkpoints, "0,0,0"))
    found = vllm(tmp_path, prompts(1, 8), llm=options, **sedac(three_checkpoints, "0,0,0") | {"SEDAC_ENABLED": "0"})
    assert len(found["batches"][0]["tokens"][0]) == 16


def test_vllm_and_the_torch_twin_decide_alike_on_ten_thousand_tokens(vllm, demo_model, shipped):
    from transformers import AutoModelForCausalLM

    batch = text_prompts(demo_model, 40, 256)
    manifest = Manifest.load(shipped)
    layers, thresholds, gamma, weights = manifest.checkpoints, (0.8, 0.7, 0.6), 0.5, (1.0, 0.5, 2.0)
    answer = vllm(
        demo_model,
        *([prompt] for prompt in batch),
        sampling={"max_tokens": 1, "prompt_logprobs": 0},
        **sedac(shipped, "0.8,0.7,0.6", SEDAC_GAMMA="0.5", SEDAC_WEIGHTS="1,0.5,2"),
    )
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    probes = [load_probe(shipped, layer, model.config.hidden_size) for layer in layers]
    agree = exited = 0
    worst = []
    with torch.inference_mode(), cascade_hooks(model, probes, layers, thresholds, gamma, weights, 0.5, 1) as decided:
        for prompt, found in zip(batch, answer["batches"], strict=True):
            ids = torch.tensor([prompt])
            logits = model(ids).logits[0]
            gone = torch.tensor([[m == "exit" for m in step] for step in found["margins"]])  # [checkpoints, tokens]
            exits = torch.where(gone.any(0), gone.int().argmax(0), len(layers))
            same = exits == decided.exit_checkpoint[0]
            agree += int(same.sum())
            exited += int(gone[-1].sum())
            if same.all():  # one token that decides otherwise changes what the later ones attend to
                wanted = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                worst.append((wanted - torch.tensor(found["prompt_logprobs"][0])).abs().max().item())
    total = sum(map(len, batch))
    assert total >= 10_000 and 0.1 < exited / total < 0.9
    assert agree / total >= 0.999
    assert len(worst) >= 30 and max(worst) < 1e-3


def test_each_token_decides_in_a_batch_as_it_does_alone(vllm, tiny_model, tiny_artifact):
    batch = [prompt[:length] for prompt, length in zip(prompts(8, 40), range(5, 45, 5), strict=True)]
    thresholds = middle_thresholds(tiny_artifact)
    answer = vllm(tiny_model, *([prompt] for prompt in batch), batch, **sedac(tiny_artifact, thresholds))
    *alone, together = answer["batches"]
    assert [run["tokens"][0] for run in alone] == together["tokens"]
    prefill = together["margins"][0]
    expected = [m for run in alone for m in run["margins"][0]]
    assert 0 < prefill.count("exit") < len(prefill)
    assert sorted(m == "exit" for m in prefill) == sorted(m == "exit" for m in expected)


def middle_thresholds(folder: Path) -> str:
    """Thresholds at which some tokens exit and some do not: the median risk of the collected data at each checkpoint."""
    from sedac_core.artifacts import load_collected

    manifest = Manifest.load(folder)
    medians = []
    for layer in manifest.checkpoints:
        data = load_collected(folder, layer)
        probe = load_probe(folder, layer, data.hidden.shape[1])
        medians.append(probe(data.hidden[:2000]).median().item())
    return ",".join(f"{value:.4f}" for value in medians)


@pytest.fixture
def adapter(demo_model, tmp_path) -> str:
    """A LoRA adapter of all MLPs that changes what the model says."""
    config = json.loads((demo_model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer, (name, (inputs, outputs)) in itertools.product(range(config["num_hidden_layers"]), sizes.items()):
        module = f"base_model.model.model.layers.{layer}.mlp.{name}"
        weights[f"{module}.lora_A.weight"] = 0.1 * torch.randn(8, inputs, generator=generator)
        weights[f"{module}.lora_B.weight"] = 0.1 * torch.randn(outputs, 8, generator=generator)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(sizes), "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(known))
    return str(tmp_path)


def test_requests_with_lora_adapters_run_whole_and_others_exit(vllm, demo_model, shipped, adapter):
    """Steps of up to 64 tokens run as captured ones do on a GPU, prompts of 80 as large ones."""
    batch, exits = text_prompts(demo_model, 3, 80), sedac(shipped, "1e9,1e9,1e9")
    stock = vllm(demo_model, batch, lora=[adapter] * 3, patched=False)["batches"][0]["tokens"]
    for gpu in (False, "plain"):
        alone = vllm(demo_model, batch, gpu=gpu, **exits)["batches"][0]["tokens"]
        others = vllm(demo_model, batch, lora=[None] * 3, gpu=gpu, **exits)
        assert others["batches"][0]["tokens"] == alone != stock
        assert others["counters"]["exits"][0] == others["counters"]["tokens"] > 0
        whole = vllm(demo_model, batch, lora=[adapter] * 3, gpu=gpu, **exits)
        assert whole["batches"][0]["tokens"] == stock and whole["counters"]["exits"][0] == 0
        mixed = vllm(demo_model, batch, lora=[adapter, None, adapter], gpu=gpu, **exits)
        assert mixed["batches"][0]["tokens"][::2] == stock[::2]
        assert 0 < mixed["counters"]["exits"][0] < mixed["counters"]["tokens"]
        if not gpu:  # with an adapter in the step nothing is gathered
            assert {run["counters"]["rows_computed"] / run["counters"]["tokens"] for run in (mixed, whole)} == {30}


FOLLOWING = """if True:
    import inspect, sys
    from types import SimpleNamespace as Any
    import numpy as np
    import vllm.v1.worker.cpu_worker
    import vllm.v1.worker.gpu.model_runner as second
    import vllm.v1.worker.gpu_model_runner as first
    from vllm import SamplingParams
    from sedac_core import vllm_requests
    from sedac_core.cli import SedacError

    class Runtime(vllm_requests.PerRequest):
        choices = ("off", "balanced")

    def arguments(method):
        return list(inspect.signature(method).parameters)[1:3]

    v1, v2 = first.GPUModelRunner, second.GPUModelRunner
    print(arguments(v1._update_states), arguments(v1._prepare_inputs), arguments(v2.add_requests),
          arguments(v2.prepare_inputs), second.BatchReqState._fields[:2])
    v1._update_states = v2.add_requests = lambda self, output: "took up"
    v1._prepare_inputs = lambda self, output, tokens: "wrote"
    v2.prepare_inputs = lambda self, output, batch, *rest: "wrote"
    for _ in range(2):
        vllm_requests.follow_batches(Any(use_v2_model_runner=True))

    def request(name, choice):
        params = SamplingParams(extra_args=choice and {"sedac": choice})
        return Any(req_id=name, sampling_params=params, lora_request=None)

    for kind in (v1, v2):
        runtime, runner = Runtime(), object.__new__(kind)
        runtime.make_room(8, "cpu")
        runner.vllm_config = Any(compilation_config=Any(static_forward_context={"a": object(), "b": runtime}))

        def step(finished, new, names, tokens):
            output = Any(finished_req_ids=finished, scheduled_new_reqs=new)
            took = (runner._update_states if kind is v1 else runner.add_requests)(output)
            runner.input_batch = Any(req_ids=names)
            tokens = np.array(tokens, dtype=np.int32)
            if kind is v1:
                wrote = runner._prepare_inputs(output, tokens)
            else:
                wrote = runner.prepare_inputs(output, Any(req_ids=names, num_scheduled_tokens=tokens), None, 0)
            rows = runtime.rows_chosen(int(tokens.sum()))
            print(took, wrote, rows if rows is None else rows.tolist(), runtime.token_rows.tolist(), sorted(runtime.chosen))

        step(set(), [request("a", None)], ["a"], [2])
        step(set(), [request("b", "off"), request("c", "balanced")], ["c", "a", "b"], [3, 1, 2])
        step({"c"}, [], ["a", "b"], [1, 1])
        step(set(), [], ["a"], [1])
        step({"b"}, [], ["a"], [1])

    del second.BatchReqState
    try:
        vllm_requests.follow_batches(Any(use_v2_model_runner=True))
    except SedacError as error:
        print(error)
"""


def test_both_of_vllms_model_runners_tell_which_tokens_are_whose():
    done = subprocess.run([sys.executable, "-c", FOLLOWING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("[", "took", "SEDAC"))]
    assert said[0] == (
        "['scheduler_output'] ['scheduler_output', 'num_scheduled_tokens'] ['scheduler_output'] "
        "['scheduler_output', 'batch_req_state'] ('req_ids', 'num_scheduled_tokens')"
    )
    steps = [
        "took up wrote None [0, 0, 0, 0, 0, 0, 0, 0] []",
        "took up wrote [2, 2, 2, 0, 1, 1] [2, 2, 2, 0, 1, 1, 0, 0] ['b', 'c']",
        "took up wrote [0, 1] [0, 1, 2, 0, 1, 1, 0, 0] ['b']",
        "took up wrote None [0, 0, 0, 0, 0, 0, 0, 0] ['b']",
        "took up wrote None [0, 0, 0, 0, 0, 0, 0, 0] []",
    ]
    assert said[1:-1] == 2 * steps
    assert "second model runner: set VLLM_USE_V2_MODEL_RUNNER=0" in said[-1]


def mixed(length: int, *choices: str | None) -> list[dict]:
    """Sampling of requests that choose in turn, and end at different times."""
    return [
        {
            "max_tokens": length + 3 * i,
            "ignore_eos": True,
            "extra_args": None if choices[i % len(choices)] is None else {"sedac": choices[i % len(choices)]},
        }
        for i in range(9)
    ]


def test_each_request_gets_what_it_chose_in_one_batch_with_others(vllm, tiny_model, three_checkpoints):
    """Chunked prefill and decoding in one step, and requests that come and go."""
    batch = [prompt[: 20 + 4 * i] for i, prompt in enumerate(prompts(9, 60, seed=1))]
    on = {**ON, "SEDAC_PROBE_DIR": str(three_checkpoints)}
    llm = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    names = ("off", None, "conservative")

    def run(*choices):
        return vllm(tiny_model, batch, batch, sampling=mixed(6, *choices), llm=llm, **on)

    alone = {name: run(name) for name in names}
    stock = vllm(tiny_model, batch, sampling=mixed(6, None), llm=llm, patched=False)
    tokens = {name: answer["batches"][0]["tokens"] for name, answer in alone.items()}
    assert tokens["off"] == stock["batches"][0]["tokens"] and alone["off"]["counters"]["exits"] == [0, 0, 0]
    assert tokens["off"] != tokens[None] != tokens["conservative"] != tokens["off"]
    together = run(*names)
    wanted = [tokens[names[i % 3]][i] for i in range(9)]
    assert together["batches"][0]["tokens"] == wanted == together["batches"][1]["tokens"]
    exits = [sum(answer["counters"]["exits"]) for answer in (*alone.values(), together)]
    assert exits[0] == 0 < exits[2] < exits[1] and 0 < exits[3] < exits[1]


@pytest.mark.parametrize("how", [True, "zeros tried", "zeros apart", "plain", "plain, dense"], ids=str)
def test_a_gpus_runtime_gives_each_request_what_a_cpus_does_and_counts_alike(vllm, tiny_model, three_checkpoints, how):
    """Its kernels interpreted, steps small and large: choices, chunked prefill, risks, paths and fallbacks."""
    batch = [prompt[: 20 + 6 * i] for i, prompt in enumerate(prompts(9, 70, seed=1))]
    on = {**ON, "SEDAC_PROBE_DIR": str(three_checkpoints)}
    options = {"sampling": mixed(3, "off", None, "conservative"), "llm": {"max_num_batched_tokens": 96}}
    cpu, gpu = (vllm(tiny_model, batch, gpu=gpu, **options, **on) for gpu in (False, how))
    assert gpu["batches"][0]["tokens"] == cpu["batches"][0]["tokens"]
    assert gpu["counters"]["exits"] == cpu["counters"]["exits"] and gpu["counters"]["exits"][2] > 0
    assert [gpu["counters"][name] for name in ("steps", "tokens")] == [
        cpu["counters"][name] for name in ("steps", "tokens")
    ]
    risks = [
        name for name in cpu["metrics"] if name.startswith(("sedac_risk_bucket", "sedac_risk_sum", "sedac_decisions"))
    ]
    assert len(risks) > 40
    assert {name: gpu["metrics"].get(name) for name in risks} == pytest.approx(
        {name: cpu["metrics"][name] for name in risks}
    )
    reason = 'sedac_fallback_tokens_total{reason="%s"}'
    assert gpu["metrics"][reason % "request"] == cpu["metrics"][reason % "request"] > 0
    assert gpu["metrics"][reason % "the model runs in torch.float32"] > 0
    taken = 'sedac_steps_by_path_total{path="%s"}'
    paths = [gpu["metrics"].get(taken % path, 0) for path in ("dense", "gather")]
    assert (paths[1] == 0 if how == "plain, dense" else min(paths) > 0) and sum(paths) == gpu["counters"]["steps"]
    assert gpu["tried"] == {"zeros tried": [True], "zeros apart": [False]}.get(how, [])
    assert gpu["whole"] == ["plain_mlp" if how in ("plain", "plain, dense") else "dense"]


def test_steps_that_run_whole_have_their_mlps_in_the_compiled_graph_and_still_nothing_of_exited_tokens(
    vllm, tiny_model, three_checkpoints, tmp_path
):
    """vLLM compiles steps of up to 64 tokens, which skip by kernels, apart from larger ones."""
    batch = [prompt[: 20 + 6 * i] for i, prompt in enumerate(prompts(9, 70, seed=1))]
    on = {**ON, "SEDAC_PROBE_DIR": str(three_checkpoints), "SEDAC_KEEP_LAST": "0"}
    options = {"sampling": mixed(3, "off", None, "conservative"), "llm": {"max_num_batched_tokens": 96}}
    cpu = vllm(tiny_model, batch, **options, **on)
    options["llm"] |= {"enforce_eager": False}
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    gpu = vllm(tiny_model, batch, gpu="compiled", **options, **on, **cache)
    assert gpu["batches"][0]["tokens"] == cpu["batches"][0]["tokens"]
    for name in ("steps", "tokens", "exits"):
        assert gpu["counters"][name] == cpu["counters"][name], "vLLM's own runs count apart"
    taken = 'sedac_steps_by_path_total{path="%s"}'
    paths = [gpu["metrics"].get(taken % path, 0) for path in ("dense", "predicated")]
    assert gpu["counters"]["exits"][2] > 0 and min(paths) > 0 and sum(paths) == gpu["counters"]["steps"]
    assert gpu["whole"] == [], "no operator has run an MLP of a large step"
    plain, *others = sorted(set(gpu["results"][1:-1]))
    assert others == [plain + 3, plain + 4], "pieces return what a checkpoint decided, the last one no margin"


BOUND = {"loss": "a document's mean KL", "bound": 0.02, "confidence": 0.95}
TOLD = 'sedac_certified_bound{confidence="0.95",loss="a document\'s mean KL"}'


def test_adaptive_thresholds_and_admin_calls_stay_within_the_certificate(vllm, tiny_model, three_checkpoints, tmp_path):
    folder = shutil.copytree(three_checkpoints, tmp_path / "certified")
    manifest = Manifest.load(folder)
    manifest.thresholds, manifest.calibration = {1: 0.8, 2: 1.0, 3: 1.2}, {"certified": True, "bounds": [BOUND]}
    manifest.save(folder)
    on = {"SEDAC_ENABLED": "1", "SEDAC_LOG_EVERY": "0", "SEDAC_PROBE_DIR": str(folder), "SEDAC_CALIBRATION_STEPS": "1"}
    greedy = {"SEDAC_ADAPTIVE": "1", "SEDAC_EXIT_RATES": "0.9,0.95,1"}
    limits = pytest.approx([0.8, 1.0, 1.2])
    batches = [prompts(8, 60, seed=seed) for seed in range(4)]
    free = vllm(tiny_model, *batches, **on | greedy | {"SEDAC_THRESHOLDS": "0,0,0"})
    assert sum(free["counters"]["exits"]) > 0.7 * free["counters"]["tokens"]
    changes = [
        {"thresholds": [0.8, 1.0, 1.3]},
        {"thresholds": [0.5, 1.0, 1.2]},
        {"thresholds": [0.5, 2.0, "inf"], "beyond_certificate": True},
        {"exit_rates": [0.9, 0.95, 1.0]},
    ]
    bound = vllm(tiny_model, *batches, *changes, batches[0], {"enabled": True}, **on | greedy)
    refused, within, beyond, adaptive, _, after = bound["batches"][4:]
    assert "thresholds exceed the certified" in refused["error"] and "beyond_certificate" in refused["error"]
    assert within["thresholds"] == pytest.approx([0.5, 1.0, 1.2]) and not within["adaptive"]
    assert beyond["thresholds"][1:] == [2.0, "inf"]
    for told in (adaptive, after):
        assert told["adaptive"] and all(a <= b + 1e-6 for a, b in zip(told["thresholds"], (0.8, 1.0, 1.2), strict=True))
    assert after["thresholds"] == limits, "the rates ask for more"
    assert [told["metrics"][TOLD] for told in (within, beyond, adaptive)] == [0.02, "nan", 0.02]
    shares = [sum(run["counters"]["exits"]) / run["counters"]["tokens"] for run in (bound, free)]
    assert 0 < shares[0] < shares[1]


def test_settings_change_a_compiled_model_from_one_start_to_the_next(vllm, tiny_model, tiny_artifact, tmp_path):
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}

    def start(**more):
        return vllm(tiny_model, prompts(2, 16), llm={"enforce_eager": False}, **cache, **more)

    none = start(**sedac(tiny_artifact, "0,0"))
    every = start(**sedac(tiny_artifact, "inf,inf"))
    one = start(**{**sedac(tiny_artifact, "inf", SEDAC_PROBE_LAYERS="1"), "SEDAC_KEEP_LAST": "2"})
    off = start(SEDAC_ENABLED="0")

    def rows(answer):  # MLP rows computed for each token, of 6 layers
        return answer["counters"]["rows_computed"] / answer["counters"]["tokens"]

    assert [rows(none), rows(every), rows(one)] == [6, 3, 4]
    assert "counters" not in off and off["batches"][0]["tokens"] == none["batches"][0]["tokens"]
    assert every["batches"][0]["tokens"] != none["batches"][0]["tokens"]


def test_a_compiled_model_decides_and_counts_as_an_eager_one_does(vllm, tiny_model, tiny_artifact, tmp_path):
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    compiled = {**cache, "llm": {"enforce_eager": False}}
    batches = [prompts(4, 40), prompts(1, 5, seed=1)]  # decoding alone, steps of which all, none or some tokens exit
    some = sedac(tiny_artifact, middle_thresholds(tiny_artifact))
    eager, graph = vllm(tiny_model, *batches, **some), vllm(tiny_model, *batches, **compiled, **some)
    assert [batch["tokens"] for batch in graph["batches"]] == [batch["tokens"] for batch in eager["batches"]]
    assert graph["counters"] == eager["counters"] and 0 < eager["counters"]["exits"][0] < eager["counters"]["tokens"]

    observing = {**some, "SEDAC_ADAPTIVE": "1", "SEDAC_EXIT_RATES": "0.3,0.6", "SEDAC_CALIBRATION_STEPS": "1000"}
    watched, off = vllm(tiny_model, *batches, **compiled, **observing), vllm(tiny_model, *batches, SEDAC_ENABLED="0")
    assert [batch["tokens"] for batch in watched["batches"]] == [batch["tokens"] for batch in off["batches"]]
    assert watched["counters"]["exits"] == [0, 0]
    assert watched["counters"]["rows_computed"] == 6 * watched["counters"]["tokens"]


def test_adaptive_thresholds_only_observe_first_and_then_follow_the_target(vllm, tiny_model, tiny_artifact):
    environment = {**sedac(tiny_artifact, ""), "SEDAC_ADAPTIVE": "1", "SEDAC_EXIT_RATES": "0.3,0.6"}
    batches = [prompts(8, 100, seed=seed) for seed in range(12)]
    first, rest = batches[0], batches[1:]
    sampling = {"max_tokens": 1}
    watching = vllm(tiny_model, first, sampling=sampling, **environment, SEDAC_CALIBRATION_STEPS="50")
    assert watching["counters"]["exits"] == [0, 0]
    assert watching["counters"]["rows_computed"] == 6 * watching["counters"]["tokens"]
    steered = vllm(tiny_model, first, *rest, sampling=sampling, **environment, SEDAC_CALIBRATION_STEPS="1")
    exits, tokens = steered["counters"]["exits"], steered["counters"]["tokens"]
    seen = tokens - len(first) * len(first[0])  # the first batch only observed
    assert exits[0] / seen == pytest.approx(0.3, abs=0.08)
    assert sum(exits) / seen == pytest.approx(0.6, abs=0.08)


REFUSED = """if True:
    from types import SimpleNamespace
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import JSONResponse
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from sedac_core.vllm_requests import Refused

    def those_of_0_20(app):
        app.exception_handler(HTTPException)(lambda _, error: JSONResponse(str(error), error.status_code))
        app.exception_handler(Exception)(lambda _, error: JSONResponse(str(error), 400))

    def refuse():
        raise Refused("'sedac' must be one of off, found 'offf'", "vllm_xargs")

    for register in (init_exception_handler, those_of_0_20):
        app = FastAPI()
        app.state.args = SimpleNamespace(log_error_stack=False)
        register(app)
        app.get("/")(refuse)
        answer = TestClient(app).get("/")  # raises what would close the connection
        print(answer.status_code, "must be one of off, found 'offf' (parameter=vllm_xargs)" in answer.text)
"""


def test_a_wrong_value_is_answered_and_the_connection_kept_by_either_vllms_handlers():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["400 True"] * 2


@pytest.mark.parametrize("gpu", [None, "interpreted", "real"])
def test_two_workers_that_share_each_layer_exit_and_answer_as_one_does(tiny_model, tiny_artifact, tmp_path, gpu):
    """Workers are processes of their own, which find SEDAC by its plugin; the longer prompts' steps gather rows."""
    if gpu == "real" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    plugin = tmp_path / "a_gpu-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: a-gpu\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\na_gpu = vllm_parallel:as_a_gpu\n")
    here = Path(__file__).parent
    paths = [str(here), str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = (
        os.environ | sedac(tiny_artifact, middle_thresholds(tiny_artifact)) | {"PYTHONPATH": os.pathsep.join(paths)}
    )
    environment |= {"AS_A_GPU": gpu} if gpu else {}
    environment |= {"TRITON_INTERPRET": "1"} if gpu == "interpreted" else {}
    asked = json.dumps([*prompts(2, 20), *prompts(2, 100, seed=1)])

    def answered(workers, **more):
        command = [sys.executable, here / "vllm_parallel.py", tiny_model, str(workers)]
        own = environment | more
        done = subprocess.run(command, env=own, input=asked, capture_output=True, text=True, timeout=300)
        answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        assert answers, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(answers[0].removeprefix("ANSWER "))

    one, two = answered(1), answered(2)
    assert two["counted"] == one["counted"] * 2, "each worker decides for itself, and alike"
    _, tokens, saved, first, second = one["counted"][0]
    assert first > 0 and second > 0 and first + second < tokens and saved > 0
    most = 1e-4
    if gpu == "real":  # where stock's two workers are further from its one: 9e-4 were seen on two H200s
        alone, shared = (answered(workers, SEDAC_ENABLED="0")["log_probs"] for workers in (1, 2))
        own = max(abs(a - b) for a, b in zip(alone, shared, strict=True))
        apart = max(abs(a - b) for a, b in zip(one["log_probs"], two["log_probs"], strict=True))
        print(f"two workers from one, at most: stock {own:.2g}, SEDAC {apart:.2g}")
        most = min(2e-3, max(most, 2 * own))
    assert two["tokens"] == one["tokens"] and two["log_probs"] == pytest.approx(one["log_probs"], abs=most)
