"""Step 3: the layout that the README shows, and figures that follow from the tokens."""

import re
import shutil

import pytest
import torch
from conftest import run_main

from sedac_core import bench
from sedac_core.artifacts import Manifest, held_out, load_collected, load_probe, probe_path
from sedac_core.cli import SedacError
from sedac_core.policy import load_policy
from sedac_core.settings import Settings

STEP3 = "test_v6_local.py"


@pytest.fixture
def folder(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "data")


def tokens(folder):
    """Risks and entropies `[checkpoints, tokens]` of the held-out tokens, worked out the plain way."""
    manifest = Manifest.load(folder)
    risks, entropies = [], []
    for layer in manifest.checkpoints:
        data = load_collected(folder, layer)
        test = held_out(data.documents, manifest.training["seed"], manifest.training["held_out_share"])
        risks.append(load_probe(folder, layer, 64)(data.hidden[test]))
        entropies.append(data.entropy[test])
    return torch.stack(risks), torch.stack(entropies)


def test_it_prints_the_layout_of_the_readme_with_true_figures(call, folder):
    risks, entropies = tokens(folder)
    thresholds = risks.median(1).values
    out, result = call(STEP3, "--data-dir", folder, "--thresholds", ",".join(map(str, thresholds.tolist())))

    first = risks[0] < thresholds[0]
    second = ~first & (risks[1] < thresholds[1])
    rates = [first.float().mean().item(), (first | second).float().mean().item()]
    assert result["exit_rates"] == pytest.approx(rates, abs=2 / risks.shape[1])
    assert f"Layer 1: thr={thresholds[0]:.3f}, exit_rate={rates[0]:.1%}" in out
    assert result["exit_entropy"][1] == pytest.approx(entropies[1][second].mean().item(), rel=1e-2)

    # 6 layers, the last 2 whole: an exit at 1 skips layers 2 and 3, an exit at 3 skips none.
    assert result["mlp_rows_saved"] == pytest.approx(rates[0] * 2 / 6, abs=1e-2)
    mlp, attention = 3 * 64 * 128, 2 * 64 * (2 + 1) * 32
    actual = 6 - mlp / (mlp + attention) * rates[0] * 2
    assert result["actual_cost"] == pytest.approx(actual, abs=1e-2)
    assert result["theoretical_speedup"] == pytest.approx(6 / actual, rel=1e-2)
    order = [
        "--- 阈值设置 --- (thresholds)",
        r"Layer 1: thr=\d+\.\d{3}, exit_rate=\d+\.\d%, avg_exit_entropy=\d+\.\d{3}",
        r"Layer 3: thr=",
        "--- 理论加速估算 --- (theoretical speed-up)",
        r"Baseline cost: 6 layers/token",
        r"Actual cost: \d+\.\d+ layers/token",
        r"Theoretical speedup: \d+\.\d+x",
        r"Compute savings: \d+\.\d%",
        r"MLP rows saved: ",
        r"Weight bytes saved: ",
    ]
    places = [re.search(line if "---" not in line else re.escape(line), out).start() for line in order]
    assert places == sorted(places) and "The MLP is 66.7% of a layer's weights" in out


def test_where_damage_was_collected_it_stands_beside_entropy(call, tiny_damage):
    out, result = call(STEP3, "--data-dir", tiny_damage, "--thresholds", "100,100")  # all exit at once
    manifest = Manifest.load(tiny_damage)
    data = load_collected(tiny_damage, 0, damage=True)
    test = held_out(data.documents, manifest.training["seed"], manifest.training["held_out_share"])
    damage, agreement = data.damage[test].mean().item(), data.agreement[test].float().mean().item()
    assert result["exit_damage"][0] == pytest.approx(damage, rel=1e-4) and result["exit_damage"][1] is None
    assert result["mean_exit_agreement"] == result["exit_agreement"][0] == pytest.approx(agreement, rel=1e-4)
    assert f"avg_exit_damage={damage:.3f}, exit_agreement={agreement:.1%}" in out


def test_probes_of_damage_have_no_default_thresholds(call, tiny_damage, tiny_model, tmp_path):
    from transformers import AutoConfig

    folder = shutil.copytree(tiny_damage, tmp_path / "data")
    manifest = Manifest.load(folder)
    assert call(STEP3, "--data-dir", folder)[1]["thresholds"] == [manifest.thresholds[0], manifest.thresholds[2]]
    manifest.thresholds = {}
    manifest.save(folder)
    with pytest.raises(SedacError, match="the default thresholds are not for damage: run sedac_calibrate.py"):
        call(STEP3, "--data-dir", folder)
    settings = Settings.from_env({"SEDAC_PROBE_DIR": str(folder), "SEDAC_ADAPTIVE": "0"})
    with pytest.raises(SedacError, match="no thresholds are set for probes that estimate damage"):
        load_policy(settings, AutoConfig.from_pretrained(tiny_model))


def test_gates_are_judged_on_unseen_text_beside_a_plain_cascade_at_the_same_bytes(
    call, gates_options, tiny_model, tmp_path
):
    text = ["--dataset", "pydoc"]
    options = gates_options(tmp_path / "gates", 25, *text)
    run_main("train_multilayer_probes.py", *options)
    plain = tmp_path / "plain"
    collect = (
        "--model",
        tiny_model,
        "--layers",
        "0,2",
        "--save-dir",
        plain,
        "--samples",
        24,
        "--max-length",
        96,
        *text,
    )
    run_main("collect_multilayer_data.py", *collect)
    run_main("train_multilayer_probes.py", "--data-dir", plain, "--layers", "0,2", "--rank", 4)
    judge = (STEP3, "--data-dir", tmp_path / "gates", "--against", plain, "--samples", 16, "--max-length", 64)
    with pytest.raises(SedacError, match="needs a plain cascade with calibrated thresholds"):
        call(*judge)
    run_main("sedac_calibrate.py", "--probe-dir", plain, "--exit-rates", "0.1,0.3")
    out, result = call(*judge)
    assert [row["budget"] for row in result["budgets"]] == [0.125, 0.25, 0.4] and result["tokens"] > 500
    for row in result["budgets"]:
        assert row["saved_bytes"] == pytest.approx(row["budget"], abs=0.06)
        assert row["cascade"]["saved_bytes"] == pytest.approx(row["saved_bytes"], abs=0.03)
        assert 0 < row["kl"] < row["cascade"]["kl"], "trained on damage, with adapters, gates do less damage"
        layers = torch.tensor([row["levels"][f"width {width}"] for width in (128, 64, 32, 0)]).T
        assert layers.shape == (6, 4) and torch.allclose(layers.sum(1), torch.ones(6))
    assert "--- levels by layer at log λ" in out and out.count("plain cascade: saves") == 3

    with pytest.raises(SedacError, match="--against compares gates"):
        call(STEP3, "--data-dir", plain, "--against", plain)


def test_targets_are_compared_at_the_same_exit_rates(tiny_damage, tmp_path):
    entropy, out = shutil.copytree(tiny_damage, tmp_path / "entropy"), tmp_path / "target.json"
    train = ("--data-dir", entropy, "--layers", "0,2", "--rank", 16, "--held-out", 0.3)
    run_main("train_multilayer_probes.py", *train, "--target", "entropy")

    def compare(*folders):
        rates = ["--exit-rates", "0.2,1", "--samples", "24", "--max-length", "64"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["bench", "target", "--probe-dir", *map(str, folders), "--out", str(out), *rates])
            bench.main()
        return bench.read_results(out)["records"]

    records = compare(entropy, tiny_damage)
    found = {(r["system"], r["exit_rate"]): r for r in records if r["metric"] == "kl"}
    assert {system for system, _ in found} == {"random", "entropy_plain", "sedac_plain"} and len(found) == 6
    few = {system: record for (system, rate), record in found.items() if rate == 0.2}
    probes = 2 * (64 * 16 + 16 + 2 * 16 + 16 + 1) / (6 * 3 * 64 * 128)
    saved = 0.1 * 4 / 6 + 0.1 * 2 / 6  # by 0.1 after layer 0, which skips four MLPs, and by 0.2 after layer 2
    assert few["random"]["saved_bytes"] == pytest.approx(saved, abs=0.02)
    assert few["sedac_plain"]["saved_bytes"] == pytest.approx(saved - probes, abs=0.03)
    every = [record["value"] for (_, rate), record in found.items() if rate == 1]
    assert len(every) == 3 and min(every) > max(record["value"] for record in few.values())
    with pytest.raises(SedacError, match="have the same target"):
        compare(entropy, entropy)


def test_v60_and_v61_are_compared_on_the_same_tokens_and_at_the_same_exit_rates(call, folder):
    risks, _ = tokens(folder)
    thresholds = ",".join(map(str, risks.quantile(0.3, dim=1).tolist()))
    _, result = call(STEP3, "--data-dir", folder, "--thresholds", thresholds, "--gamma", 0.7)
    assert result["gamma"] == result["v61_gamma"] == 0.7
    assert result["v61"]["exit_rates"] == result["exit_rates"] != result["v60"]["exit_rates"]
    assert result["v61_at_v60_rates"]["exit_rates"] == pytest.approx(
        result["v60"]["exit_rates"], abs=2 / risks.shape[1]
    )


def test_no_exits_are_said_in_words_and_cost_nothing(call, folder):
    out, result = call(STEP3, "--data-dir", folder, "--thresholds", "0,0")
    assert "No token exits under these thresholds: the smallest risk is" in out
    assert result["theoretical_speedup"] == 1 and result["exit_entropy"] == [None, None]


def test_thresholds_come_from_the_manifest_and_else_are_the_readmes_with_a_warning(call, folder):
    manifest = Manifest.load(folder)
    manifest.thresholds = {1: 0.25, 3: 1.5}
    manifest.save(folder)
    assert call(STEP3, "--data-dir", folder)[1]["thresholds"] == [0.25, 1.5]
    manifest.thresholds = {}
    manifest.save(folder)
    with pytest.raises(SedacError, match=r"thresholds has 3 values \(0.8,1.3,1.7\) for 2 checkpoints \(1,3\)"):
        call(STEP3, "--data-dir", folder)


def spoil(folder):
    state = load_probe(folder, 1, 64).state_dict()
    torch.save(state | {"head.bias": torch.tensor([float("nan")])}, probe_path(folder, 3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: probe_path(f, 3).unlink(), "SEDAC probe missing for layer 3: .*Train it"),
        (lambda f: probe_path(f, 3).write_bytes(probe_path(f, 3).read_bytes()[:500]), "truncated or no torch file"),
        (lambda f: torch.save({"proj.weight": torch.zeros(4)}, probe_path(f, 3)), "no two-dimensional proj.weight"),
        (spoil, "head.bias holds NaN"),
    ],
)
def test_a_probe_that_cannot_be_used_is_named(call, folder, damage, message):
    damage(folder)
    with pytest.raises(SedacError, match=message):
        call(STEP3, "--data-dir", folder, "--thresholds", "1,1")


def test_settings_out_of_range_are_refused_in_a_sentence(call, folder):
    for wrong in (["--level", 1.5], ["--gamma", -1], ["--weights", "1,-1"], ["--keep-last", -1]):
        with pytest.raises(SedacError):
            call(STEP3, "--data-dir", folder, "--thresholds", "1,1", *wrong)


def test_presets_need_as_many_checkpoints_as_they_have_thresholds(call, folder):
    with pytest.raises(SedacError, match="preset conservative has 3 values"):
        call(STEP3, "--data-dir", folder, "--thresholds", "1,1", "--presets")
