"""The artefact folder: what is written is read back, and what cannot be trusted is refused by name."""

import pickle
from pathlib import Path

import pytest
import torch

from sedac_core.artifacts import (
    Fingerprint,
    Manifest,
    check_layers,
    held_out,
    load_probe,
    probe_path,
    replacing,
    save_tensor,
)
from sedac_core.cli import SedacError
from sedac_core.probe import LREProbe

SHAPE = Fingerprint(64, 6, 128, 264)


def test_a_manifest_comes_back_as_it_was_saved(tmp_path):
    manifest = Manifest(
        "tiny", SHAPE, (1, 3), rank=8, thresholds={3: 1.25, 1: float("inf")}, gamma=0.5, weights=(1.0, 2.0)
    )
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "fingerprint": 3}'])
def test_a_damaged_or_foreign_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SedacError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_another_models_artefact_is_refused_with_both_shapes():
    other = type("Config", (), {"hidden_size": 64, "num_hidden_layers": 7, "intermediate_size": 128, "vocab_size": 264})
    with pytest.raises(SedacError, match=r"made for tiny .*num_hidden_layers 6.*num_hidden_layers 7"):
        Manifest("tiny", SHAPE, (1, 3)).check_model(other)


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.pt"
    save_tensor(torch.ones(3), path)
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert torch.load(path).tolist() == [1, 1, 1] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("hidden", "rank", "message"),
    [(32, 8, "reads hidden size 64, the model has 32"), (64, 4, "has rank 8, SEDAC_PROBE_RANK asks for 4")],
)
def test_a_probe_of_another_size_is_refused(tmp_path, hidden, rank, message):
    save_tensor(LREProbe(64, 8).state_dict(), probe_path(tmp_path, 7))
    with pytest.raises(SedacError, match=message):
        load_probe(tmp_path, 7, hidden, rank)


def test_a_missing_probe_has_the_readmes_message(tmp_path):
    with pytest.raises(SedacError) as error:
        load_probe(tmp_path, 7, 64)
    assert str(error.value) == (
        f"SEDAC probe missing for layer 7: {tmp_path}/sedac_probe_layer7.pth. "
        "Train it (python train_multilayer_probes.py --layers 7) or set SEDAC_PROBE_DIR."
    )


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    probe_path(tmp_path, 7).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SedacError, match=r"layer7\.pth cannot be read"):
        load_probe(tmp_path, 7, 64)
    assert not (tmp_path / "ran").exists()


def test_the_held_out_split_is_by_document_seeded_and_never_too_small_to_halve():
    documents = torch.arange(10).repeat_interleave(7)
    split = held_out(documents, 0)
    assert torch.equal(split, held_out(documents, 0)) and not torch.equal(split, held_out(documents, 1))
    assert len(documents[split].unique()) == 2 and int(split.sum()) == 14
    assert len(documents[held_out(documents, 0, 0.5)].unique()) == 5
    with pytest.raises(SedacError, match="needs two"):
        held_out(torch.zeros(5), 0)


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1), (-1,), (5,), (4, 7)])
def test_checkpoints_that_cannot_be_are_refused(layers):
    with pytest.raises(SedacError):
        check_layers(layers, 6)


def test_a_checkpoint_must_leave_a_layer_to_skip():
    check_layers((0, 4), 6)
    with pytest.raises(SedacError, match="its last 2 always run whole, so the last checkpoint is at most 2"):
        check_layers((3,), 6, keep_last=2)


def test_the_shipped_artefact_is_whole_small_and_calibrated():
    folder = Path(__file__).resolve().parents[2] / "sedac_data"
    manifest = Manifest.load(folder)
    assert manifest.model == "default" and manifest.checkpoints == (7, 14, 21) == tuple(manifest.thresholds)
    assert manifest.fingerprint == Fingerprint(576, 30, 1536, 49152)
    for layer in manifest.checkpoints:
        assert load_probe(folder, layer, 576, manifest.rank).rank == 64
        assert manifest.training["layers"][str(layer)]["rank_correlation"] > 0.5
    assert manifest.calibration["quality"]["ppl_sedac"] < 1.15 * manifest.calibration["quality"]["ppl_stock"]
    assert sum(probe_path(folder, layer).stat().st_size for layer in manifest.checkpoints) < 500_000
