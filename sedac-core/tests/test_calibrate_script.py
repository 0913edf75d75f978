"""Step 8: thresholds that meet their target on text they were not made from."""

import shutil

import pytest
from transformers import AutoConfig

from sedac_core.artifacts import Manifest, hidden_path, probe_path
from sedac_core.cli import SedacError
from sedac_core.policy import load_policy
from sedac_core.settings import Settings

STEP8 = "sedac_calibrate.py"


@pytest.fixture
def folder(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "data")


def test_one_probe_is_calibrated_as_the_only_checkpoint(call, folder):
    out, result = call(STEP8, "--probe-path", probe_path(folder, 3), "--target-exit-rate", 0.3)
    assert result["checkpoints"] == [3] and result["target_exit_rates"] == [0.3]
    manifest = Manifest.load(folder)
    assert manifest.thresholds == {3: pytest.approx(result["thresholds"][0])}
    how = manifest.calibration
    assert how["dataset"] == "held-out tokens of pydoc" and not how["cascade"]
    assert how["3"]["low"] <= how["3"]["achieved"] <= how["3"]["high"]
    assert "target exit_rate=30.0%" in out and "95 % interval" in out


def test_a_cascade_meets_its_rates_on_unseen_text_whatever_the_rule(call, folder):
    hidden_path(folder, 1).unlink()  # as in a clone: no collected data, so the model runs on text
    options = ["--probe-dir", folder, "--exit-rates", "0.2,0.6", "--dataset", "pydoc", "--samples", 64]
    _, plain = call(STEP8, *options, "--max-length", 64)
    assert plain["exit_rates"] == pytest.approx([0.2, 0.6], abs=0.08)
    rule = ["--gamma", 0.5, "--weights", "1,2", "--level", 0.4]
    _, gathered = call(STEP8, *options, "--max-length", 64, *rule)
    assert gathered["exit_rates"] == pytest.approx([0.2, 0.6], abs=0.08)
    assert gathered["thresholds"] != plain["thresholds"]
    manifest = Manifest.load(folder)
    assert (manifest.gamma, manifest.weights, manifest.level) == (0.5, (1.0, 2.0), 0.4)
    assert list(manifest.thresholds.values()) == pytest.approx(gathered["thresholds"])


def test_quality_is_stock_s_without_exits_and_worse_with_all(call, folder):
    options = ["--probe-dir", folder, "--samples", 12, "--max-length", 48, "--quality"]
    _, none = call(STEP8, *options, "--exit-rates", "0,0")
    assert none["quality"]["kl"] == pytest.approx(0, abs=1e-6) and none["quality"]["top1_agreement"] == 1
    assert none["quality"]["ppl_sedac"] == pytest.approx(none["quality"]["ppl_stock"])
    _, every = call(STEP8, *options, "--exit-rates", "1,1")
    assert every["quality"]["exit_rate"] == 1 and every["quality"]["kl"] > 0.01


def test_documents_that_the_probes_saw_are_left_out(call, folder):
    manifest = Manifest.load(folder)
    trained = set(map(int, manifest.training["trained_documents"].split(",")))
    from sedac_core import collection

    total = len(collection.read_documents("pydoc"))
    call(STEP8, "--probe-dir", folder, "--exit-rates", "0.1,0.2", "--dataset", "pydoc", "--samples", 60,
         "--max-length", 8)  # fmt: skip
    assert Manifest.load(folder).calibration["documents"] <= total - len(trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit-rates", "0.2,0.6,0.9"], r"exit_rates has 3 values .* for 2 checkpoints"),
        (["--exit-rates", "0.2,0.6", "--level", "2"], "cannot be calibrated"),
        (["--exit-rates", "0.2,0.6", "--weights", "1"], "weights has 1 values"),
    ],
)
def test_lists_and_settings_that_do_not_fit_are_refused(call, folder, arguments, message):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(SedacError, match=message):
        call(STEP8, "--probe-dir", folder, *arguments)
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("rates", ["0.6,0.2", "1.5", "-0.1", "x"])
def test_rates_that_fall_or_are_no_shares_are_refused(call, folder, rates):
    with pytest.raises(SystemExit):
        call(STEP8, "--probe-dir", folder, f"--exit-rates={rates}")


def test_a_probe_path_of_another_name_is_refused(call, folder):
    with pytest.raises(SedacError, match=r"--probe-path must name a sedac_probe_layer<number>.pth"):
        call(STEP8, "--probe-path", folder / "probe.pth", "--target-exit-rate", 0.3)


def test_another_model_is_refused_with_both_fingerprints(call, folder):
    manifest = Manifest.load(folder)
    manifest.fingerprint = type(manifest.fingerprint)(64, 8, 128, 264)
    manifest.save(folder)
    with pytest.raises(SedacError, match=r"num_hidden_layers 8.* not for a model with .*num_hidden_layers 6"):
        call(STEP8, "--probe-dir", folder, "--exit-rates", "0.2,0.6", "--dataset", "pydoc", "--samples", 4)


def test_a_cascade_is_certified_on_documents_that_did_not_set_its_thresholds(call, folder, tiny_model, gates_text):
    options = ["--probe-dir", folder, "--exit-rates", "0.3,0.6", "--dataset", gates_text, "--samples", 200]
    manifest = Manifest.load(folder)
    manifest.keep_last = 1
    manifest.save(folder)
    out, result = call(STEP8, *options, "--max-damage", 0.9, "--min-agreement", 0.2)
    manifest = Manifest.load(folder)
    assert manifest.calibration["certified"] and manifest.thresholds == dict(
        zip((1, 3), result["thresholds"], strict=True)
    )
    kl, agreement = manifest.calibration["bounds"]
    assert kl["mean_loss"] < kl["bound"] == 0.9 and agreement["mean_loss"] < agreement["bound"] == 0.8
    assert max(kl["p_value"], agreement["p_value"]) <= 0.05 and "in nats, at most 9 is under 0.9" in out
    assert result["documents"] == 90 and result["saved_bytes"]["value"] > 0
    policy = load_policy(Settings(probe_dir=folder, adaptive=False), AutoConfig.from_pretrained(tiny_model))
    assert policy.threshold_source == "certified" and policy.bounds == manifest.calibration["bounds"]

    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(SedacError, match="no thresholds with savings can be certified on 90 documents"):
        call(STEP8, *options, "--max-damage", 1e-6)
    with pytest.raises(SedacError, match="a bound is certified for a whole cascade"):
        call(STEP8, "--probe-path", probe_path(folder, 3), "--target-exit-rate", 0.3, "--max-damage", 0.1)
    assert (folder / "manifest.json").read_bytes() == before
    call(STEP8, "--probe-dir", folder, "--exit-rates", "0.3,0.6")
    policy = load_policy(Settings(probe_dir=folder, adaptive=False), AutoConfig.from_pretrained(tiny_model))
    assert policy.certified is None and policy.threshold_source == "manifest", "calibrated anew, without a bound"
