"""Prices of gates that are certified to bound the damage, or meet a share of bytes (step 8)."""

import math
import shutil

import pytest

from sedac_core.artifacts import Manifest
from sedac_core.cli import SedacError

STEP2, STEP8 = "train_multilayer_probes.py", "sedac_calibrate.py"


@pytest.fixture
def copy(tiny_gates, tmp_path):
    return shutil.copytree(tiny_gates, tmp_path / "copy")


def test_a_bound_on_damage_is_certified_on_unseen_documents(call, copy):
    calibrate = [STEP8, "--probe-dir", copy, "--samples", 160, "--max-length", 48]
    out, loose = call(*calibrate, "--max-damage", 0.2)
    assert "certified: a document's mean KL in nats, at most 2 is under 0.2 in expectation" in out
    (bound,) = loose["bounds"]
    assert bound["mean_loss"] < 0.2 and bound["p_value"] <= 0.05 and loose["documents"] == 160
    manifest = Manifest.load(copy)
    assert manifest.gates["log_lambda"] == loose["log_lambda"] and manifest.calibration["bounds"] == [bound]
    assert manifest.calibration["datasets"] == manifest.training["datasets"]
    _, tight = call(*calibrate, "--max-damage", 0.1)
    assert 0 < tight["saved_bytes"]["value"] < loose["saved_bytes"]["value"]
    _, both = call(*calibrate, "--max-damage", 0.2, "--min-agreement", 0.5)
    assert both["log_lambda"] <= loose["log_lambda"] and len(both["bounds"]) == 2
    assert both["top1_agreement"]["value"] > 0.5


def test_a_rise_of_perplexity_is_bounded_and_a_fall_does_not_make_up_for_it(call, copy):
    calibrate = [STEP8, "--probe-dir", copy, "--samples", 160, "--max-length", 48]
    _, result = call(*calibrate, "--max-ppl-increase", 0.05)
    (bound,) = result["bounds"]
    assert bound["bound"] == pytest.approx(0.04879, abs=1e-5) and 0 < bound["mean_loss"] < bound["bound"]
    ratio = result["ppl_ratio"]["value"]
    assert ratio < 1.05 and bound["mean_loss"] > math.log(ratio), "the mean of rises is over the rise of the mean"
    assert result["saved_bytes"]["value"] > 0


def test_a_share_of_bytes_is_met(call, copy):
    out, result = call(STEP8, "--probe-dir", copy, "--samples", 100, "--max-length", 64, "--saved", 0.3)
    assert result["saved_bytes"]["value"] == pytest.approx(0.3, abs=0.02) and not result["certified"]
    presets = Manifest.load(copy).gates["presets"]
    assert [preset["saved_bytes"] for preset in presets.values()] == pytest.approx([0.12, 0.25, 0.4], abs=0.03)
    prices = [preset["log_lambda"] for preset in presets.values()]
    assert prices == sorted(prices) and prices[1] < result["log_lambda"] < prices[2]
    assert list(presets) == ["conservative", "balanced", "aggressive"] and "preset balanced: log λ" in out


def test_bounds_that_cannot_be_certified_and_wrong_artefacts_are_refused(call, copy, tiny_artifact):
    calibrate = [STEP8, "--probe-dir", copy, "--max-length", 64]
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(SedacError, match="no price with savings can be certified on 8 documents"):
        call(*calibrate, "--samples", 8, "--max-damage", 0.1)
    with pytest.raises(
        SedacError, match="gates are calibrated by --max-damage, --min-agreement, --max-ppl-increase or --saved"
    ):
        call(*calibrate)
    with pytest.raises(SedacError, match="has policy hard and no adapters"):
        call(STEP8, "--probe-dir", tiny_artifact, "--saved", 0.2)
    with pytest.raises(SystemExit):
        call(*calibrate, "--saved", 0.2, "--max-damage", 0.1)
    assert (copy / "manifest.json").read_bytes() == before
