"""The text patch, on the real qwen2.py of the installed vLLM and of vLLM 0.20.2."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sedac_core import vllm_patch
from sedac_core.cli import SedacError

SCRIPT = "patch_vllm_surgical.py"


@pytest.fixture(scope="session")
def stock_files(tmp_path_factory) -> dict[str, bytes]:
    """The stock qwen2.py by vLLM version; the CUDA wheel of 0.20.2 is downloaded once into the cache."""
    files = {}
    try:
        target = vllm_patch.Target.read(vllm_patch.find_target())
        files["0.32.0"] = target.text if target.state() == "stock" else target.original()
    except SedacError:
        pytest.skip("vLLM is not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sedac" / "qwen2-0.20.2.py"
    if not cache.exists():
        folder = tmp_path_factory.mktemp("wheel")
        wheel = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        platforms = [f"--platform=manylinux{name}_x86_64" for name in ("2014", "_2_31", "_2_35")]
        from sedac_core.demo_model import _installers

        pip = next(command for command in _installers() if "uv" not in Path(command[0]).name)
        command = [*pip, "download", "--quiet", *wheel, *platforms, "--dest", str(folder), "vllm==0.20.2"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_bytes(archive.read("vllm/model_executor/models/qwen2.py"))
    files["0.20.2"] = cache.read_bytes()
    return files


@pytest.fixture(params=["0.32.0", "0.20.2"])
def target(request, stock_files, tmp_path) -> Path:
    path = tmp_path / "qwen2.py"
    path.write_bytes(stock_files[request.param])
    return path


def test_patch_is_valid_python_idempotent_and_reverts_byte_for_byte(target):
    stock = target.read_bytes()
    assert "patched" in vllm_patch.patch(target)
    patched = target.read_bytes()
    ast.parse(patched)
    assert patched != stock and vllm_patch.Target.read(target).state() == "patched"
    assert "nothing to do" in vllm_patch.patch(target)
    assert target.read_bytes() == patched
    vllm_patch.revert(target)
    assert target.read_bytes() == stock
    assert [path.name for path in target.parent.iterdir()] == ["qwen2.py"]
    assert "not patched" in vllm_patch.revert(target)


def test_a_hard_linked_copy_is_left_alone(target):
    twin = target.with_name("in_uv_cache.py")
    os.link(target, twin)
    stock = twin.read_bytes()
    vllm_patch.patch(target)
    assert twin.read_bytes() == stock and target.read_bytes() != stock


def test_dry_run_shows_the_diff_and_writes_nothing(target, script):
    stock = target.read_bytes()
    done = script(SCRIPT, "--target", target, "--dry-run")
    assert done.returncode == 0
    assert "+            self.sedac = vllm_runtime.attach(self, vllm_config, prefix)" in done.stdout
    assert target.read_bytes() == stock and len(list(target.parent.iterdir())) == 1


def test_check_tells_patched_from_stock_by_its_exit_code(target, script):
    assert script(SCRIPT, "--target", target, "--check").returncode == 1
    assert script(SCRIPT, "--target", target).returncode == 0
    done = script(SCRIPT, "--target", target, "--check")
    assert done.returncode == 0 and "patched" in done.stdout


def test_every_anchor_must_match_exactly_once(stock_files):
    text = stock_files["0.32.0"].decode()
    for edit in vllm_patch.EDITS:
        for broken in (text.replace(edit.anchor, "# gone\n"), text + edit.anchor):
            with pytest.raises(SedacError, match=f"anchor '{edit.name}'.*tested with vLLM 0.20.2 and 0.32.0"):
                vllm_patch.apply(broken)


def test_an_untested_vllm_is_refused_unless_asked_for(target):
    target.write_bytes(target.read_bytes() + b"# a later vLLM\n")
    stock = target.read_bytes()
    with pytest.raises(SedacError, match="not a file SEDAC was tested with"):
        vllm_patch.patch(target)
    assert target.read_bytes() == stock
    vllm_patch.patch(target, untested=True)
    vllm_patch.revert(target)
    assert target.read_bytes() == stock


def test_a_file_edited_after_the_patch_is_neither_patched_nor_reverted(target):
    vllm_patch.patch(target)
    target.write_bytes(target.read_bytes() + b"# mine\n")
    edited = target.read_bytes()
    for action in (vllm_patch.patch, vllm_patch.revert):
        with pytest.raises(SedacError, match="edited by hand"):
            action(target)
    assert target.read_bytes() == edited


def test_another_sedac_versions_patch_must_be_reverted_first(target, monkeypatch):
    stock = target.read_bytes()
    with monkeypatch.context() as other:
        other.setattr(vllm_patch, "__version__", "9.9")
        other.setattr(vllm_patch, "EDITS", vllm_patch.EDITS[:-1])
        vllm_patch.patch(target)
    with pytest.raises(SedacError, match=r"another SEDAC \(9.9, this is .*--revert"):
        vllm_patch.patch(target)
    with pytest.raises(SedacError, match="patched by SEDAC 9.9"):
        vllm_patch.require_patched(target)
    vllm_patch.revert(target)
    assert target.read_bytes() == stock


@pytest.mark.parametrize("damage", ["backup gone", "backup changed", "record gone"])
def test_a_revert_that_cannot_be_exact_is_refused(target, damage):
    vllm_patch.patch(target)
    found = vllm_patch.Target.read(target)
    if damage == "record gone":
        found.record_file.unlink()
    elif damage == "backup gone":
        found.backup.unlink()
    else:
        found.backup.write_bytes(b"something else")
    patched = target.read_bytes()
    with pytest.raises(SedacError, match="reinstall vLLM"):
        vllm_patch.revert(target)
    assert target.read_bytes() == patched


def test_a_read_only_installation_gets_a_sentence_and_stays_as_it_was(target, script):
    stock = target.read_bytes()
    target.chmod(0o444)
    target.parent.chmod(0o555)
    if os.geteuid() == 0:  # root may write anywhere: step down to nobody in the child
        for folder in (target.parent, *target.parents):
            if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
                folder.chmod(folder.stat().st_mode | 0o055)
        code = (
            "import sys; from pathlib import Path; from sedac_core import cli, vllm_patch; import os; os.setuid(65534); "
            "cli.run(lambda: print(vllm_patch.patch(Path(sys.argv[1]))))"
        )
        done = subprocess.run([sys.executable, "-c", code, target], capture_output=True, text=True)
    else:
        done = script(SCRIPT, "--target", target)
    target.parent.chmod(0o755)
    assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert target.read_bytes() == stock and len(list(target.parent.iterdir())) == 1


def test_a_missing_vllm_gets_its_own_sentence(tmp_path, script):
    done = script(SCRIPT, "--target", tmp_path / "nowhere.py")
    assert done.returncode == 2 and "--target" in done.stderr
    code = (
        "import importlib.util as u; f=u.find_spec; u.find_spec=lambda n,*a: None if n=='vllm' else f(n,*a)\n"
        "from sedac_core import cli, vllm_patch; cli.run(vllm_patch.find_target)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "vLLM is not installed" in done.stderr
