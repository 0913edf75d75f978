"""Step 5: what the launcher checks before anything heavy, and that nothing is left of a server."""

import shutil
import socket

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from sedac_core import vllm_patch
from sedac_core.artifacts import probe_path
from sedac_core.cli import SedacError

SCRIPT = "sedac_start_server.py"


@pytest.fixture
def patched(monkeypatch, tmp_path):
    """A patched qwen2.py stands in for the installed one, so that these tests leave the installation alone."""
    target = vllm_patch.Target.read(vllm_patch.find_target())
    copy = tmp_path / "patched" / "qwen2.py"
    copy.parent.mkdir()
    copy.write_bytes(target.text if target.state() == "stock" else target.original())
    vllm_patch.patch(copy)
    monkeypatch.setattr(vllm_patch, "find_target", lambda: copy)
    for name in ("SEDAC_ADAPTIVE", "SEDAC_THRESHOLDS", "SEDAC_PROBE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return copy


@pytest.fixture
def folder(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


def refused(call, *arguments) -> str:
    with pytest.raises(SedacError) as error:
        call(SCRIPT, "--dry-run", "--keep-last", 1, *arguments)
    return str(error.value)


def test_dry_run_prints_environment_and_command(script, tiny_model, tiny_artifact):
    options = ["--model", tiny_model, "--stock", "--port", 8123, "--dry-run", "--", "--dtype", "float32"]
    done = script(SCRIPT, *options)
    assert done.returncode == 0, done.stderr
    assert "-m vllm.entrypoints.openai.api_server --model" in done.stdout
    assert "--port 8123 --dtype float32" in done.stdout and "SEDAC_ENABLED=0" in done.stdout


def test_an_unpatched_vllm_is_refused(call, patched, tiny_model, folder):
    vllm_patch.revert(patched)
    assert "run python patch_vllm_surgical.py" in refused(call, "--model", tiny_model, "--probe-dir", folder)


def test_a_missing_probe_is_named_as_the_readme_says(call, patched, tiny_model, folder):
    probe_path(folder, 3).unlink()
    said = refused(call, "--model", tiny_model, "--probe-dir", folder)
    assert said == (
        f"SEDAC probe missing for layer 3: {probe_path(folder, 3)}. "
        "Train it (python train_multilayer_probes.py --layers 3) or set SEDAC_PROBE_DIR."
    )


def test_an_empty_probe_folder_names_the_first_missing_probe(call, patched, tiny_model, tmp_path):
    said = refused(call, "--model", tiny_model, "--probe-dir", tmp_path)
    assert said.startswith("SEDAC probe missing for layer 7:")


def test_a_truncated_probe_is_refused(call, patched, tiny_model, folder):
    path = probe_path(folder, 1)
    path.write_bytes(path.read_bytes()[:500])
    assert "cannot be read" in refused(call, "--model", tiny_model, "--probe-dir", folder)


def test_a_probe_of_another_model_is_refused(call, patched, tiny_model, folder):
    state = torch.load(probe_path(folder, 1), weights_only=True)
    state["proj.weight"] = torch.zeros(16, 80)
    torch.save(state, probe_path(folder, 1))
    said = refused(call, "--model", tiny_model, "--probe-dir", folder)
    assert "reads hidden size 80, the model has 64" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sedac-layer", "1,9"], "the last checkpoint is at most 3"),
        (["--sedac-threshold", "0.5"], "SEDAC_THRESHOLDS has 1 values"),
        (["--exit-rates", "0.5"], "SEDAC_EXIT_RATES has 1 values"),
        (["--level", "2"], "SEDAC_LEVEL must be"),
        (["--keep-last", "4"], "leaves no layer to skip"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_start(call, patched, tiny_model, folder, options, sentence):
    assert sentence in refused(call, "--model", tiny_model, "--probe-dir", folder, *options)


def test_a_port_in_use_is_refused(call, patched, tiny_model, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(call, "--model", tiny_model, "--probe-dir", folder, "--port", port)
    assert "another port" in said or "another --port" in said
