"""The policy `gates` as a server sets it up: which artefact, at which price, and what it counts."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from sedac_core import metrics
from sedac_core.artifacts import Manifest
from sedac_core.cli import SedacError
from sedac_core.gates import GateShape, adapters_path
from sedac_core.metrics import GateCounters
from sedac_core.policy import choices, load_policy
from sedac_core.policy_gates import GatedWidths, check_gates_supported
from sedac_core.settings import PRESETS, Settings


@pytest.fixture
def config(tiny_model):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(tiny_model)


@pytest.fixture
def folder(tiny_gates, tmp_path):
    return shutil.copytree(tiny_gates, tmp_path / "gates")


def load(folder, config, **environment):
    return load_policy(Settings.from_env({"SEDAC_PROBE_DIR": str(folder), **environment}), config)


def refused(folder, config, **environment) -> str:
    with pytest.raises(SedacError) as error:
        load(folder, config, **environment)
    return str(error.value)


def test_the_manifest_names_the_policy_and_the_variable_can_only_confirm_it(folder, tiny_artifact, config):
    assert isinstance(load(folder, config), GatedWidths)
    assert isinstance(load(folder, config, SEDAC_EXIT_MODE="gates"), GatedWidths)
    hard = {"SEDAC_KEEP_LAST": "1", "SEDAC_THRESHOLDS": "0,0"}
    assert load(tiny_artifact, config, **hard).graph_key()["policy"] == "hard"
    assert load(tiny_artifact, config, **hard, SEDAC_EXIT_MODE="hard").graph_key()["policy"] == "hard"

    said = refused(folder, config, SEDAC_EXIT_MODE="hard")
    assert said == (
        f"SEDAC_EXIT_MODE is hard, and {folder} holds an artefact of policy gates: "
        "unset SEDAC_EXIT_MODE, or set SEDAC_PROBE_DIR to a folder trained for hard"
    )
    said = refused(tiny_artifact, config, SEDAC_EXIT_MODE="gates")
    assert said.startswith(f"SEDAC_EXIT_MODE is gates, and {tiny_artifact} holds an artefact of policy hard: unset")


def test_a_policy_that_is_not_served_is_refused(folder, config):
    manifest = Manifest.load(folder)
    manifest.policy = "oracle"
    manifest.save(folder)
    assert "holds an artefact of policy oracle: this SEDAC serves hard, soft, gates" in refused(folder, config)


def test_an_empty_folder_is_refused_with_what_to_train(tmp_path, config):
    assert "--policy gates" in refused(tmp_path, config, SEDAC_EXIT_MODE="gates")
    assert "SEDAC probe missing for layer 7" in refused(tmp_path, config)


def test_missing_adapters_and_another_models_artefact_are_refused(folder, config):
    config.vocab_size += 8
    said = refused(folder, config)
    assert "this artefact was made for" in said and "not for a model with" in said
    config.vocab_size -= 8
    adapters_path(folder).unlink()
    assert refused(folder, config).startswith(f"SEDAC adapters are missing: {adapters_path(folder)}: train it")


@pytest.mark.parametrize("name", ["SEDAC_THRESHOLDS", "SEDAC_PROBE_LAYERS", "SEDAC_KEEP_LAST"])
def test_settings_of_the_other_policy_are_refused_not_ignored(folder, tiny_artifact, config, name):
    assert f"{name} is a plain cascade's, and {folder} holds adapters" in refused(folder, config, **{name: "1"})
    assert "SEDAC_LAMBDA is for gates" in refused(tiny_artifact, config, SEDAC_LAMBDA="-3")


def test_the_price_comes_from_the_variable_then_from_calibration_then_from_training(folder, config):
    manifest = Manifest.load(folder)
    budgets = {budget["saved_bytes"]: budget["log_lambda"] for budget in manifest.gates["budgets"]}
    policy = load(folder, config)
    assert (policy.source, policy.log_lambda.item()) == ("budget", pytest.approx(budgets[0.25]))
    assert "the price was never calibrated" in policy.warning

    manifest.calibration = {"log_lambda": -4.0, "certified": False}
    manifest.save(folder)
    policy = load(folder, config)
    assert (policy.source, policy.log_lambda.item(), policy.warning) == ("calibrated", -4.0, None)

    bound = {"loss": "a document's mean KL", "bound": 0.2, "confidence": 0.95}
    manifest.calibration = {"log_lambda": -5.0, "certified": True, "bounds": [bound]}
    manifest.save(folder)
    policy = load(folder, config)
    assert (policy.source, policy.log_lambda.item(), policy.bounds) == ("certified", -5.0, [bound])
    assert "certified with confidence 0.95: a document's mean KL is under 0.2" in policy.describe(Settings())

    policy = load(folder, config, SEDAC_LAMBDA="-6.5")
    assert (policy.source, policy.log_lambda.item(), policy.bounds) == ("SEDAC_LAMBDA", -6.5, [])
    assert "log λ -6.5 (SEDAC_LAMBDA)" in policy.describe(Settings())

    manifest.calibration, manifest.gates["budgets"] = {}, []
    manifest.save(folder)
    assert "holds no usable price λ" in refused(folder, config)


def test_presets_are_the_manifests_and_none_lies_beyond_the_certificate(folder, config):
    assert load(folder, config).choices == {"off": -math.inf}, "never calibrated"
    manifest = Manifest.load(folder)
    prices = {"conservative": -3.0, "balanced": -2.0, "aggressive": -1.0}
    manifest.gates["presets"] = {name: {"log_lambda": price, "saved_bytes": 0.2} for name, price in prices.items()}
    manifest.save(folder)
    settings = Settings(probe_dir=folder)
    policy = load(folder, config)
    assert policy.choices == {"off": -math.inf, **prices} and policy.prices.tolist()[1:] == [*policy.choices.values()]
    assert choices(settings, manifest) == ("off", *prices) and "not offered" not in policy.describe(settings)

    bound = {"loss": "a document's mean KL", "bound": 0.02, "confidence": 0.95}
    manifest.calibration = {"log_lambda": -2.0, "certified": True, "bounds": [bound]}
    manifest.save(folder)
    policy = load(folder, config)
    assert [*policy.choices] == ["off", "conservative", "balanced"] == list(choices(settings, manifest))
    assert policy.describe(settings).endswith("; beyond the certificate and not offered to requests: aggressive")
    free = load(folder, config, SEDAC_LAMBDA="-5")
    assert [*free.choices] == ["off", *prices] and free.certified is None, "started without a certificate"

    for broken in ({"balanced": {}}, {"balanced": {"log_lambda": "x"}}, {"balanced": {"log_lambda": math.nan}}, [1]):
        manifest.gates["presets"] = broken
        manifest.save(folder)
        if isinstance(broken, dict):
            assert "holds no usable presets" in refused(folder, config)


def test_a_cascades_certificate_is_in_force_where_its_rule_is(three_checkpoints, config, tmp_path):
    folder = shutil.copytree(three_checkpoints, tmp_path / "certified")
    manifest = Manifest.load(folder)
    manifest.thresholds = {1: 0.8, 2: 1.0, 3: 1.2}
    manifest.calibration = {
        "certified": True,
        "bounds": [{"loss": "a document's mean KL", "bound": 0.02, "confidence": 0.95}],
    }
    manifest.save(folder)
    adaptive = load(folder, config)
    assert adaptive.threshold_source == "adaptive" and adaptive.certified == pytest.approx((0.8, 1.0, 1.2))
    said = adaptive.describe(Settings())
    assert "at most [0.8, 1, 1.2]" in said and "is under 0.02; beyond the certificate" in said
    assert said.endswith("not offered to requests: aggressive")
    assert [*adaptive.choices] == ["off", "conservative", "balanced"], "balanced is just the certified one"
    fixed = load(folder, config, SEDAC_ADAPTIVE="0", SEDAC_LEVEL="0.5", SEDAC_KEEP_LAST="1")
    assert fixed.threshold_source == "certified" and fixed.certified == adaptive.certified
    for name, value in {
        "SEDAC_THRESHOLDS": "0.1,0.1,0.1",
        "SEDAC_GAMMA": "0.5",
        "SEDAC_LEVEL": "0.4",
        "SEDAC_KEEP_LAST": "0",
        "SEDAC_WEIGHTS": "1,2,3",
    }.items():
        other = load(folder, config, SEDAC_ADAPTIVE="0", **{name: value})
        assert other.certified is None and not other.bounds and "aggressive" in other.choices, name


def test_gates_decide_in_float32_also_where_a_server_has_made_bf16_the_default(folder, config):
    plain, x = load(folder, config), torch.randn(40, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        served = load(folder, config)
        assert torch.equal(served.level(3, x), plain.level(3, x))
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [*served.gates.parameters(), *served.gains.values(), served.log_lambda]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_presets_of_a_cascade_are_the_readmes_also_where_a_server_has_made_bf16_the_default(three_checkpoints, config):
    torch.set_default_dtype(torch.bfloat16)
    try:
        policy = load(three_checkpoints, config, SEDAC_ADAPTIVE="0")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(policy.table, torch.tensor([[1.0, 1.3, 1.7], [0.0] * 3, *PRESETS.values()]))


def test_gates_load_on_the_cpu_also_where_a_server_has_made_another_device_the_default(folder, config):
    plain, x = load(folder, config), torch.randn(40, 64)
    with torch.device("meta"):  # vLLM builds a model under `with torch.device("cuda")`
        served = load(folder, config)
    assert torch.equal(served.level(3, x), plain.level(3, x))


def refused_by_server(device="cuda", dtype=torch.bfloat16, quantised=False, parallel=1, lora=None) -> str:
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(dtype=dtype),
        quant_config=SimpleNamespace(get_name=lambda: "fp8") if quantised else None,
        parallel_config=SimpleNamespace(tensor_parallel_size=parallel),
        lora_config=lora,
    )
    try:
        check_gates_supported(config)
    except SedacError as error:
        return str(error)
    return ""


def test_what_gates_cannot_run_on_is_refused_at_the_start(monkeypatch):
    assert "gates are served on CPUs and NVIDIA GPUs only, not on tpu" in refused_by_server("tpu")
    assert refused_by_server("cpu", torch.float32) == ""
    for device in ("cpu", "cuda"):
        assert "gates need plain weights, found fp8" in refused_by_server(device, quantised=True)
        assert "gates do not support tensor parallelism yet" in refused_by_server(device, parallel=2)
        assert "gates do not support LoRA yet" in refused_by_server(device, lora=object())
    assert "gates on a GPU need bfloat16 or float16, found torch.float32" in refused_by_server(dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Hopper GPUs (compute capability 9.0), found no GPU" in refused_by_server()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, sentence in (((9, 0), ""), ((8, 0), "Hopper GPUs (compute capability 9.0), found 8.0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        said = refused_by_server()
        assert sentence in said and bool(said) == bool(sentence)


def test_the_compile_caches_key_follows_the_layers_that_decide_and_nothing_else(folder, config):
    first = load(folder, config).graph_key()
    assert first == load(folder, config, SEDAC_LAMBDA="-2").graph_key()
    assert first["leaders"] == [0, 1, 2, 3, 4, 5] and first["policy"] == "gates"


def test_counters_tell_levels_rows_and_bytes_apart():
    shape = GateShape(64, 128, 6, (1.0, 0.5, 0.25, 0.0), 4)
    counters = GateCounters(shape, 3 * 64 * 128 * 4)

    def value(metric, **labels):
        return (metric.labels(**labels) if labels else metric)._value.get()

    def now():
        parts = [value(metrics.MLP_BYTES, part=part) for part in ("stock", "read")]
        return [value(metrics.ROWS_SAVED), value(metrics.ROWS_COMPUTED), *parts]

    before = now()
    counters.add(10, [60, 0, 0, 0])  # nothing narrows: the gates still cost their weights
    counters.add(10, [30, 10, 0, 20])
    saved, computed, stock, read = (b - a for a, b in zip(before, now(), strict=True))
    assert saved == pytest.approx(10 * shape.saved[1] + 20 * shape.saved[3])
    assert saved + computed == pytest.approx(120) and stock == 120 * counters.mlp_bytes
    shares = torch.tensor([[90, 10, 0, 20]]) / 120
    assert 1 - read / stock == pytest.approx(shape.saved_share(shares).item(), abs=1e-6)
    assert (counters.steps, counters.tokens, counters.levels) == (2, 20, [90, 10, 0, 20])
    said = counters.summary(-3.5)
    assert "MLP rows 75.0% at width 128, 8.3% at width 64, 0.0% at width 32, 16.7% at width 0" in said
    assert f"MLP bytes saved {1 - read / stock:.1%}; log λ -3.5" in said
