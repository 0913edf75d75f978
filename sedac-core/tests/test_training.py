"""Step 2: probes learn what is there to learn, keep their best state, and refuse data that cannot be trusted."""

import json
import shutil

import pytest
import torch

from sedac_core.artifacts import (
    Fingerprint,
    Manifest,
    documents_path,
    entropy_path,
    hidden_path,
    load_collected,
    load_probe,
    probe_path,
)
from sedac_core.cli import SedacError

STEP2 = "train_multilayer_probes.py"


def write(folder, layers=(1, 3), tokens=4000, hidden=32, scale=1.0):
    """Collected data whose entropy is a known function of the hidden state, so that a probe can learn it."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    for layer in layers:
        states = torch.randn(tokens, hidden, generator=generator)
        entropy = (states[:, 0] + 0.5 * states[:, 1] + 2).clamp_min(0.01)
        torch.save(states * scale + 3 * scale, hidden_path(folder, layer))
        torch.save(entropy, entropy_path(folder, layer))
    torch.save(torch.arange(20, dtype=torch.int32).repeat_interleave(tokens // 20), documents_path(folder))
    shape = Fingerprint(hidden, 6, 64, 100)
    collection = {"layers": list(layers), "attention_heads": 2, "key_value_heads": 1, "head_dim": 16, "dataset": "made"}
    Manifest("made", shape, layers, collection=collection).save(folder)
    return folder


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_probes_learn_whatever_the_scale_of_the_hidden_states(call, tmp_path, scale):
    folder = write(tmp_path / "data", scale=scale)
    out, summary = call(STEP2, "--data-dir", folder, "--layers", "1,3", "--rank", 8, "--epochs", 20, "--lr", 1e-2)
    for layer in (1, 3):
        assert f"Layer {layer}: held-out loss=" in out
        score = summary["held_out"][str(layer)]
        assert score["r2"] > 0.8 and score["rank_correlation"] > 0.9 and score["tokens"] == 400
        # The saved module is an LREProbe that reads raw hidden states, and gives the recorded figures.
        data, probe = load_collected(folder, layer), load_probe(folder, layer, 32, 8)
        assert torch.corrcoef(torch.stack([probe(data.hidden), data.entropy]))[0, 1] > 0.9
    manifest = Manifest.load(folder)
    assert manifest.rank == 8 and manifest.checkpoints == (1, 3)
    assert manifest.training["layers"]["3"] == summary["held_out"]["3"]
    trained = set(map(int, manifest.training["trained_documents"].split(",")))
    assert len(trained) == 18 and trained < set(range(20))


def test_the_same_seed_gives_the_same_probe_and_another_seed_another_split(call, tmp_path):
    options = ("--layers", "1", "--rank", 4, "--epochs", 2)
    states, splits = [], []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = write(tmp_path / name)
        call(STEP2, "--data-dir", folder, *options, "--seed", seed)
        states.append(load_probe(folder, 1, 32).proj.weight)
        splits.append(Manifest.load(folder).training["trained_documents"])
    assert torch.equal(states[0], states[1]) and splits[0] == splits[1]
    assert not torch.equal(states[0], states[2]) and splits[0] != splits[2]


def test_training_stops_early_and_keeps_the_best_weights(call, tmp_path, capsys):
    folder = write(tmp_path / "data", layers=(1,), tokens=400)
    noise = torch.rand(400, generator=torch.Generator().manual_seed(5))
    torch.save(noise, entropy_path(folder, 1))  # nothing to learn: more epochs only overfit
    options = ("--data-dir", folder, "--layers", "1", "--rank", 16, "--lr", 1e-2)
    _, patient = call(STEP2, *options, "--epochs", 60, "--patience", 60)
    _, early = call(STEP2, *options, "--epochs", 60, "--patience", 3)
    assert abs(early["held_out"]["1"]["loss"] - noise.var().item() / 2) < 0.02, "as good as the mean, not overfitted"
    assert patient["held_out"]["1"]["loss"] <= early["held_out"]["1"]["loss"] + 1e-6


def test_layers_can_be_trained_one_after_the_other(call, tmp_path):
    folder = write(tmp_path / "data")
    for layer in ("1", "3"):
        call(STEP2, "--data-dir", folder, "--layers", layer, "--rank", 4, "--epochs", 1)
    manifest = Manifest.load(folder)
    assert manifest.checkpoints == (1, 3) and set(manifest.training["layers"]) == {"1", "3"}


def test_new_probes_void_old_thresholds(call, tmp_path):
    folder = write(tmp_path / "data")
    manifest = Manifest.load(folder)
    manifest.thresholds = {1: 0.5, 3: 0.5}
    manifest.save(folder)
    call(STEP2, "--data-dir", folder, "--layers", "1,3", "--rank", 4, "--epochs", 1)
    assert Manifest.load(folder).thresholds == {}


def damage(folder, name):
    if name == "missing":
        hidden_path(folder, 3).unlink()
    elif name == "truncated":
        hidden_path(folder, 3).write_bytes(hidden_path(folder, 3).read_bytes()[:-3000])
    elif name == "shorter":
        torch.save(torch.ones(10), entropy_path(folder, 3))
    elif name == "nan":
        states = torch.load(hidden_path(folder, 3))
        states[7, 7] = float("nan")
        torch.save(states, hidden_path(folder, 3))
    elif name == "other model":
        torch.save(torch.ones(4000, 48), hidden_path(folder, 3))
    elif name == "one document":
        torch.save(torch.zeros(4000, dtype=torch.int32), documents_path(folder))
    elif name == "no manifest":
        (folder / "manifest.json").unlink()
    elif name == "no JSON":
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "hidden_states_layer3.pt is missing: run collect_multilayer_data.py"),
        ("truncated", "hidden_states_layer3.pt cannot be read, it is truncated"),
        ("shorter", "has 4000 hidden states, 10 entropies and 4000 document numbers"),
        ("nan", "1 hidden states of layer 3 .* are NaN or infinite"),
        ("other model", "hidden states of layer 3 have size 48, the manifest says 32"),
        ("one document", "the text is one document"),
        ("no manifest", "no manifest.json"),
        ("no JSON", "is no SEDAC manifest"),
    ],
)
def test_data_that_cannot_be_trusted_is_refused_and_the_old_probes_stay(call, tmp_path, name, message):
    folder = write(tmp_path / "data")
    call(STEP2, "--data-dir", folder, "--layers", "1,3", "--rank", 4, "--epochs", 1)
    before = {layer: probe_path(folder, layer).read_bytes() for layer in (1, 3)}
    damage(folder, name)
    with pytest.raises(SedacError, match=message):
        call(STEP2, "--data-dir", folder, "--layers", "1,3", "--rank", 8, "--epochs", 1)
    assert {layer: probe_path(folder, layer).read_bytes() for layer in (1, 3)} == before


def test_a_layer_that_was_not_collected_is_named(call, tmp_path):
    with pytest.raises(SedacError, match=r"layer 2 was not collected in .*, which has 1,3: run step 1"):
        call(STEP2, "--data-dir", write(tmp_path / "data"), "--layers", "1,2")


def test_a_training_that_diverges_says_so(call, tmp_path):
    with pytest.raises(SedacError, match="diverged: try a lower --lr"):
        call(STEP2, "--data-dir", write(tmp_path / "data"), "--layers", "1", "--lr", 1e30, "--epochs", 2)


def test_a_disk_that_is_full_while_writing_leaves_the_old_probes(call, full_disk, tmp_path):
    folder = write(tmp_path / "data", layers=(1,))
    call(STEP2, "--data-dir", folder, "--layers", "1", "--rank", 4, "--epochs", 1)
    before = probe_path(folder, 1).read_bytes(), (folder / "manifest.json").read_bytes()
    with full_disk(4000), pytest.raises(SedacError, match="what was there before is untouched"):
        call(STEP2, "--data-dir", folder, "--layers", "1", "--rank", 64, "--epochs", 1)
    assert (probe_path(folder, 1).read_bytes(), (folder / "manifest.json").read_bytes()) == before
    assert not list(folder.glob(".*tmp"))


def test_the_shipped_scripts_make_a_whole_artefact_of_a_real_model(tiny_artifact, tmp_path):
    manifest = Manifest.load(tiny_artifact)
    assert manifest.checkpoints == (1, 3) and manifest.rank == 16 and manifest.collection["dataset"] == "pydoc"
    for layer in manifest.checkpoints:
        assert load_probe(tiny_artifact, layer, 64, 16)(torch.zeros(3, 64)).min() >= 0
    copy = shutil.copytree(tiny_artifact, tmp_path / "copy")
    assert json.loads((copy / "manifest.json").read_text())["format"] == 1
