"""The real vLLM under gates: it decides and computes as the torch twin does."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from conftest import prompts

from sedac_core import collection
from sedac_core.artifacts import Fingerprint, Manifest
from sedac_core.gated_model import gated
from sedac_core.gates import Gates, GateShape

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("one worker")]
PREFILL = {"max_tokens": 1, "prompt_logprobs": 0}


def under(folder: Path, log_lambda: float) -> dict[str, str]:
    return {
        "SEDAC_ENABLED": "1",
        "SEDAC_PROBE_DIR": str(folder),
        "SEDAC_LAMBDA": str(log_lambda),
        "SEDAC_LOG_EVERY": "0",
    }


@pytest.fixture(scope="session")
def grouped(tiny_model, tmp_path_factory) -> Path:
    """Gates that decide at random for groups of two layers, with adapters that are anything but small."""
    shape = GateShape(64, 128, 6, (1.0, 0.5, 0.0), 4, gate_every=2)
    return random_artefact(tiny_model, tmp_path_factory.mktemp("grouped"), shape, "gates")


@pytest.fixture(scope="session")
def latched(tiny_model, tmp_path_factory) -> Path:
    """A soft cascade with such adapters: two gates, a latch, and whole layers at both ends."""
    shape = GateShape(64, 128, 6, (1.0, 0.5, 0.0), 4, checkpoints=(0, 2), keep_last=1)
    return random_artefact(tiny_model, tmp_path_factory.mktemp("latched"), shape, "soft")


@pytest.fixture(scope="session")
def in_bits(tiny_model, tmp_path_factory) -> Path:
    """Gates that decide at random about bits."""
    shape = GateShape(64, 128, 6, (16.0, 8.0, 6.0, 4.0), 0)
    return random_artefact(tiny_model, tmp_path_factory.mktemp("in_bits"), shape, "gates")


def random_artefact(tiny_model: Path, folder: Path, shape: GateShape, policy: str) -> Path:
    from transformers import AutoConfig

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        gates = Gates(shape)
        for parameter in gates.banks.parameters():
            parameter.normal_(std=0.1)
        for gate in gates.gates.values():
            gate.head.weight.normal_()
        gates.order.copy_(torch.rand(6, 128).argsort(1))
    fingerprint = Fingerprint.of(AutoConfig.from_pretrained(tiny_model))
    manifest = Manifest(str(tiny_model), fingerprint, shape.checkpoints, policy)
    manifest.gates = shape.as_json() | {"budgets": [{"saved_bytes": 0.25, "log_lambda": 0.0}]}
    gates.save(folder)
    manifest.save(folder)
    return folder


@pytest.fixture(params=["each layer", "groups", "cascade", "bits"])
def artefact(request, tiny_gates, grouped, latched, in_bits):
    """A folder of gates and a log λ at which all levels occur."""
    if request.param != "each layer":
        return {"groups": grouped, "cascade": latched, "bits": in_bits}[request.param], 0.0
    return tiny_gates, Manifest.load(tiny_gates).gates["budgets"][-1]["log_lambda"]


def text_prompts(model: Path, count: int, length: int) -> list[list[int]]:
    ids = collection.load_model(str(model))[1]("\n".join(collection.read_documents("pydoc")), verbose=False)[
        "input_ids"
    ]
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def test_vllm_and_the_torch_twin_choose_the_same_levels_and_compute_the_same_logits(vllm, tiny_model, artefact):
    folder, price = artefact
    batch = text_prompts(tiny_model, 40, 128)
    model, gates = collection.load_model(str(tiny_model))[0], Gates.load(folder, Manifest.load(folder))
    small = (
        {"max_num_batched_tokens": 16, "max_num_seqs": 16} if gates.shape.bits else {}
    )  # larger steps run whole then
    answer = vllm(tiny_model, *([prompt] for prompt in batch), sampling=PREFILL, llm=small, **under(folder, price))
    leaders, count = gates.shape.leaders, len(gates.shape.levels)
    rows, theirs, agree, worst = torch.zeros(count), torch.zeros(count), 0, []
    with torch.inference_mode(), gated(model, gates, price) as levels:
        for prompt, found in zip(batch, answer["batches"], strict=True):
            ids = torch.tensor([prompt])
            logits = model(ids).logits[0]
            twin = torch.cat(levels)  # [layers, tokens]
            served = torch.tensor(found["levels"])  # [steps · leaders, tokens of a step]
            served = served.unflatten(0, (-1, len(leaders))).transpose(0, 1).flatten(1)
            served = gates.shape.by_layer(dict(zip(leaders, served, strict=True)))
            agree += int((twin == served).sum())
            rows += torch.bincount(served.flatten(), minlength=count)
            theirs += torch.bincount(twin.flatten(), minlength=count)
            if torch.equal(twin, served):  # one token that decides otherwise changes what the later ones attend to
                wanted = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                worst.append((wanted - torch.tensor(found["prompt_logprobs"][0])).abs().max().item())
    total = 6 * sum(map(len, batch))
    assert total >= 30_000 and (rows / total).min() > 0.01, "all levels occur"
    assert agree / total >= 0.999
    assert len(worst) >= 30 and max(worst) < 1e-3
    assert answer["counters"] == {"steps": 320 if small else 40, "tokens": total // 6, "levels": rows.tolist()}
    assert (rows - theirs).abs().max() <= 0.001 * total


def test_levels_in_bits_leave_large_steps_to_stock_and_say_so(vllm, tiny_model, in_bits):
    batch = prompts(4, 24)
    stock = vllm(tiny_model, batch, patched=False)
    ours = vllm(tiny_model, batch, **under(in_bits, 0.0))
    tokens = [found["batches"][0]["tokens"] for found in (stock, ours)]
    assert [row[0] for row in tokens[0]] == [row[0] for row in tokens[1]], "prompts are one step of 96 tokens"
    assert tokens[0] != tokens[1] and min(ours["counters"]["levels"]) > 0
    assert ours["counters"]["levels"][0] >= 6 * 96
    assert "levels in bits are not faster than whole MLPs on CPUs" in ours["log"]


def test_at_no_price_greedy_tokens_are_those_of_stock(vllm, tiny_model, tiny_gates):
    batch = prompts(20, 24)
    stock = vllm(tiny_model, batch, patched=False)
    never = vllm(tiny_model, batch, **under(tiny_gates, -100))
    some = vllm(tiny_model, batch, **under(tiny_gates, -1))
    assert never["batches"][0]["tokens"] == stock["batches"][0]["tokens"] != some["batches"][0]["tokens"]
    counters = never["counters"]
    assert counters["levels"] == [6 * counters["tokens"], 0, 0, 0] and counters["tokens"] == 20 * (24 + 15)
    assert some["counters"]["tokens"] == counters["tokens"] and min(some["counters"]["levels"]) > 0


def test_requests_that_opt_out_run_every_mlp_whole(vllm, tiny_model, tiny_gates):
    batch, sampling = prompts(8, 24), {"max_tokens": 16, "ignore_eos": True, "extra_args": {"sedac": "off"}}
    stock = vllm(tiny_model, batch, patched=False)
    off = vllm(tiny_model, batch, sampling=sampling, **under(tiny_gates, -1))
    assert off["batches"][0]["tokens"] == stock["batches"][0]["tokens"]
    assert off["counters"]["levels"] == [6 * off["counters"]["tokens"], 0, 0, 0]


PRESETS = {"conservative": -3.0, "balanced": -1.0, "aggressive": 0.5}
BOUND = {"loss": "a document's mean KL", "bound": 0.02, "confidence": 0.95}
TOLD = 'sedac_certified_bound{confidence="0.95",loss="a document\'s mean KL"}'


@pytest.fixture
def with_presets(tiny_gates, tmp_path):
    """`with_presets(-1.0)`: the tiny model's gates with presets, and certified up to this log λ."""

    def make(certified: float | None = None) -> Path:
        folder = shutil.copytree(tiny_gates, tmp_path / f"presets {certified}")
        manifest = Manifest.load(folder)
        manifest.gates["presets"] = {name: {"log_lambda": price, "saved_bytes": 0.2} for name, price in PRESETS.items()}
        if certified is not None:
            manifest.calibration = {"log_lambda": certified, "certified": True, "bounds": [BOUND]}
        manifest.save(folder)
        return folder

    return make


def test_requests_choose_presets_in_one_batch_with_others(vllm, tiny_model, with_presets):
    folder, batch = with_presets(), prompts(8, 24)
    alone = {name: vllm(tiny_model, batch, **under(folder, price)) for name, price in PRESETS.items()}
    tokens = {name: answer["batches"][0]["tokens"] for name, answer in alone.items()}
    assert len({str(found) for found in tokens.values()}) == 3
    names = [*PRESETS, None]
    sampling = [{"max_tokens": 16, "ignore_eos": True, "extra_args": name and {"sedac": name}} for name in 2 * names]
    tokens[None] = tokens["balanced"]
    mixed = vllm(tiny_model, batch, sampling=sampling, **under(folder, PRESETS["balanced"]))
    assert mixed["batches"][0]["tokens"] == [tokens[name][i] for i, name in enumerate(2 * names)]


@pytest.mark.parametrize("how", [True, "skipping"], ids=["recorded once", "the recording that skips"])
def test_a_gpus_runtime_gives_each_request_what_a_cpus_does_and_counts_alike(vllm, tiny_model, with_presets, how):
    """Its kernels interpreted, steps small, larger, and so large that they are not captured."""
    folder, batch = with_presets(), prompts(6, 90)
    batch = [prompt[: 12 + 14 * i] for i, prompt in enumerate(batch)]
    sampling = [
        {"max_tokens": 4, "ignore_eos": True, "extra_args": name and {"sedac": name}}
        for name in ("off", "conservative", None, "aggressive", "off", "balanced")
    ]
    options = {"sampling": sampling, "llm": {"max_num_batched_tokens": 96}, **under(folder, -2.0)}
    cpu, gpu = (vllm(tiny_model, batch, gpu=gpu, **options) for gpu in (False, how))
    assert gpu["batches"][0]["tokens"] == cpu["batches"][0]["tokens"]
    assert gpu["counters"] == cpu["counters"] and min(gpu["counters"]["levels"]) > 0
    reason = 'sedac_fallback_tokens_total{reason="request"}'
    assert gpu["metrics"][reason] == cpu["metrics"][reason] == 12 + 68 + 2 * 3
    taken = 'sedac_steps_by_path_total{path="%s"}'
    assert gpu["metrics"][taken % "predicated"] == gpu["counters"]["steps"]
    assert gpu["shares"][0] < 1 and sum(gpu["shares"]) == pytest.approx(1), "what the host picks recordings by"


def test_a_gpus_runtime_reads_as_many_bits_for_each_token_as_a_cpus_does(vllm, tiny_model, in_bits):
    """In steps of one token: in larger ones a GPU gives all tokens the most that one needs."""
    batches, few = [[prompt[:1]] for prompt in prompts(3, 24)], {"max_tokens": 5, "ignore_eos": True}
    cpu, gpu = (vllm(tiny_model, *batches, gpu=gpu, sampling=few, **under(in_bits, 0.0)) for gpu in (False, True))
    assert [found["tokens"] for found in gpu["batches"]] == [found["tokens"] for found in cpu["batches"]]
    assert gpu["counters"] == cpu["counters"] and min(gpu["counters"]["levels"]) > 0
    assert gpu["metrics"]['sedac_steps_by_path_total{path="predicated"}'] == gpu["counters"]["steps"]


def test_where_nobody_timed_levels_in_bits_a_gpu_runs_whole_and_says_so(vllm, tiny_model, in_bits):
    batch = prompts(3, 24)
    stock, ours = vllm(tiny_model, batch, patched=False), vllm(tiny_model, batch, gpu="untimed", **under(in_bits, 0.0))
    assert ours["batches"][0]["tokens"] == stock["batches"][0]["tokens"]
    assert ours["counters"]["levels"] == [6 * ours["counters"]["tokens"], 0, 0, 0]
    assert "no kernel of levels in bits is known to be faster" in ours["log"]


def test_a_gpus_large_steps_run_by_the_kernels_only_while_that_saves_something(vllm, tiny_model, tiny_gates):
    batch, prefill = [[prompt] for prompt in prompts(5, 90)], {"max_tokens": 1}
    taken = 'sedac_steps_by_path_total{path="%s"}'

    def paths(*batches, price):
        metrics = vllm(tiny_model, *batches, gpu="sparing", sampling=prefill, **under(tiny_gates, price))["metrics"]
        return [metrics.get(taken % path, 0) for path in ("predicated", "dense")]

    assert paths(*batch, price=-100) == [1, 4], "a look, and nothing narrowed"
    assert paths(*batch, price=20) == [5, 0]
    assert paths(*batch[:3], {"log_lambda": 20.0}, *batch[3:], price=-100) == [3, 2], (
        "another price is a reason to look"
    )
    assert paths(*batch[:3], {"enabled": False}, *batch[3:], price=20) == [3, 2], (
        "and there is nothing to see without one"
    )


@pytest.mark.parametrize(("how", "whole"), [("plain, dense", "plain_mlp"), ("sparing", "dense")])
def test_a_gpus_large_steps_run_whole_on_views_of_the_narrowed_weights(vllm, tiny_model, tiny_gates, how, whole):
    batches, prefill = [[prompt] for prompt in prompts(2, 90)], {"max_tokens": 1}
    stock = vllm(tiny_model, *batches, patched=False, sampling=prefill)
    ours = vllm(tiny_model, *batches, gpu=how, sampling=prefill, **under(tiny_gates, -100))
    assert [batch["tokens"] for batch in ours["batches"]] == [batch["tokens"] for batch in stock["batches"]]
    assert ours["whole"] == [whole] and ours["counters"]["levels"][1:] == [0, 0, 0]


def test_a_gpus_large_steps_are_compiled_with_stocks_mlps_in_the_graph(vllm, tiny_model, tiny_gates, tmp_path):
    batch = [prompt[: 20 + 6 * i] for i, prompt in enumerate(prompts(9, 70, seed=1))]
    options = {"sampling": {"max_tokens": 6, "ignore_eos": True}, **under(tiny_gates, -1)}
    eager = vllm(tiny_model, batch, gpu="plain, dense", llm={"max_num_batched_tokens": 96}, **options)
    compiled = {"max_num_batched_tokens": 96, "enforce_eager": False}
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    graph = vllm(tiny_model, batch, gpu="compiled", llm=compiled, **options, **cache)
    assert graph["batches"][0]["tokens"] == eager["batches"][0]["tokens"]
    assert graph["counters"] == eager["counters"] and min(graph["counters"]["levels"]) > 0, "vLLM's own runs apart"
    stored = [artifact.name.split("_subgraph_")[0] for artifact in tmp_path.glob("cache/**/artifact_compile_range_*")]
    assert {name: stored.count(name) for name in stored} == {
        "artifact_compile_range_1_64": 4,
        "artifact_compile_range_65_96": 4,
    }, "7 pieces of 4 kinds: layers alike are compiled once"
    assert (graph["layers_whole"], eager["layers_whole"]) == (1, 6), "the first leader counts, and runs its MLP itself"


def test_a_gpus_runtime_holds_tokens_to_a_cascades_latch_as_a_cpus_does(vllm, tiny_model, latched):
    batch = [prompt[: 12 + 14 * i] for i, prompt in enumerate(prompts(6, 90))]
    options = {
        "sampling": {"max_tokens": 4, "ignore_eos": True},
        "llm": {"max_num_batched_tokens": 96},
        **under(latched, 0),
    }
    cpu, gpu = (vllm(tiny_model, batch, gpu=gpu, **options) for gpu in (False, True))
    assert gpu["batches"][0]["tokens"] == cpu["batches"][0]["tokens"]
    assert gpu["counters"] == cpu["counters"] and min(gpu["counters"]["levels"]) > 0
    assert sum(gpu["counters"]["levels"]) == 6 * gpu["counters"]["tokens"], "layers outside the window count as whole"


def test_a_gpus_whole_recording_gives_what_stock_gives_and_counts_whole_rows(vllm, tiny_model, tiny_gates):
    batch, on = prompts(6, 9), under(tiny_gates, -1)
    stock, whole = vllm(tiny_model, batch, patched=False), vllm(tiny_model, batch, gpu="whole", **on)
    assert whole["batches"][0]["tokens"] == stock["batches"][0]["tokens"]
    counters = whole["counters"]
    assert counters["levels"] == [6 * counters["tokens"], 0, 0, 0] and counters["tokens"] == 6 * (9 + 15)
    assert whole["metrics"]['sedac_steps_by_path_total{path="dense"}'] == counters["steps"]
    assert whole["shares"] == [1, 0, 0, 0], "no gate has run"


def test_a_certificate_bounds_presets_and_admin_calls(vllm, tiny_model, with_presets):
    environment = under(with_presets(-1.0), 0)
    del environment["SEDAC_LAMBDA"]
    changes = [
        {"log_lambda": -0.5},
        {"log_lambda": -1.0},
        {"log_lambda": -0.5, "beyond_certificate": True},
        {"log_lambda": -4.0},
    ]
    answer = vllm(tiny_model, prompts(1, 8), *changes, **environment)
    refused, same, beyond, back = answer["batches"][1:]
    assert refused["error"] == (
        "log_lambda -0.5 lies above the certified -1: stay within the certificate, or give it up with "
        '"beyond_certificate": true'
    )
    assert [told["log_lambda"] for told in (same, beyond, back)] == [-1.0, -0.5, -4.0]
    assert [told["metrics"][TOLD] for told in (same, beyond, back)] == [0.02, "nan", 0.02]

    anything = vllm(tiny_model, prompts(1, 8), {"log_lambda": 3.0}, **under(with_presets(-2.0), 1.0))
    assert anything["batches"][1]["log_lambda"] == 3.0, "started without a certificate"


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no bf16 instructions")
def test_a_bf16_model_is_served_by_float32_gates(vllm, tiny_model, tiny_gates):
    batch, bf16 = text_prompts(tiny_model, 8, 128), {"dtype": "bfloat16"}
    stock = vllm(tiny_model, batch, llm=bf16, patched=False)
    never = vllm(tiny_model, batch, llm=bf16, **under(tiny_gates, -100))
    assert never["batches"][0]["tokens"] == stock["batches"][0]["tokens"]
    shares = []
    for dtype in ("bfloat16", "float32"):
        counters = vllm(tiny_model, batch, llm={"dtype": dtype}, sampling=PREFILL, **under(tiny_gates, -1))["counters"]
        shares.append(torch.tensor(counters["levels"]) / sum(counters["levels"]))
    assert (shares[0] - shares[1]).abs().max() < 0.02 and shares[0].min() > 0.01


@pytest.mark.parametrize("artefact", ["each layer", "groups", "cascade"], indirect=True)
def test_each_token_decides_in_a_batch_as_it_does_alone(vllm, tiny_model, artefact):
    batch = [prompt[:length] for prompt, length in zip(prompts(8, 40), range(5, 45, 5), strict=True)]
    answer = vllm(tiny_model, *([prompt] for prompt in batch), batch, **under(*artefact))
    *alone, together = answer["batches"]
    assert [run["tokens"][0] for run in alone] == together["tokens"]
    gates = len(Gates.load(artefact[0], Manifest.load(artefact[0])).gates)
    for gate in range(gates):
        prefill = together["levels"][gate]
        assert prefill == [level for run in alone for level in run["levels"][gate]]
    decoded = [level for run in alone for step in run["levels"][gates:] for level in step]
    assert sorted(decoded) == sorted(level for step in together["levels"][gates:] for level in step)
    assert len(set(decoded)) > 1


def test_a_compiled_model_follows_the_price_and_the_groups_from_one_start_to_the_next(
    vllm, tiny_model, tiny_gates, grouped, latched, tmp_path
):
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    batch = prompts(4, 16)

    def start(folder, price):
        return vllm(tiny_model, batch, llm={"enforce_eager": False}, **cache, **under(folder, price))

    for folder, price in ((tiny_gates, -1.0), (grouped, 0.0), (latched, 0.0)):
        eager, compiled = vllm(tiny_model, batch, **under(folder, price)), start(folder, price)
        assert compiled["batches"][0]["tokens"] == eager["batches"][0]["tokens"]
        assert compiled["counters"] == eager["counters"]
    whole, *narrowed = start(tiny_gates, -100.0)["counters"]["levels"]
    assert whole > 0 and not any(narrowed)


def test_a_price_that_was_never_calibrated_is_said_in_the_log(vllm, tiny_model, tiny_gates):
    environment = under(tiny_gates, 0)
    del environment["SEDAC_LAMBDA"]
    answer = vllm(tiny_model, prompts(1, 8), **environment)
    assert "SEDAC: the price was never calibrated" in answer["log"] and sum(answer["counters"]["levels"]) > 0
