"""The package as a user installs it: a wheel that works by itself and carries its types."""

import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1]


def test_the_stubs_are_strictly_typed_and_match_the_compiled_module(tmp_path):
    stub = CORE / "python/sedac_core/_rust.pyi"
    subprocess.run([sys.executable, "-m", "mypy", "--strict", stub], check=True)
    subprocess.run([sys.executable, "-m", "mypy.stubtest", "sedac_core._rust"], check=True, cwd=tmp_path)


def test_the_crate_stays_near_a_thousand_lines_of_code():
    lines = [line.strip() for path in (CORE / "src").glob("*.rs") for line in path.read_text().splitlines()]
    assert sum(bool(line) and not line.startswith("//") for line in lines) <= 1100


def test_every_crate_has_a_licence_and_a_source_that_deny_toml_allows():
    """What `cargo deny check licenses sources` looks at, for machines without cargo-deny."""
    allowed = set(tomllib.loads((CORE / "deny.toml").read_text())["licenses"]["allow"])
    command = ["cargo", "metadata", "--format-version", "1", "--all-features", "--locked"]
    packages = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=CORE).stdout)["packages"]
    assert len(packages) > 20
    for package in packages:
        terms = re.split(r"( OR | AND |/|\(|\))", package["license"])
        words = {" OR ": " or ", "/": " or ", " AND ": " and ", "(": "(", ")": ")", "": ""}
        assert eval("".join(words.get(term, str(term in allowed)) for term in terms)), package["id"]
        assert package["source"] in (None, "registry+https://github.com/rust-lang/crates.io-index"), package["id"]


@pytest.mark.slow
def test_a_built_wheel_carries_types_and_no_stale_library_and_imports_elsewhere(tmp_path):
    build = [sys.executable, "-m", "maturin", "build", "--release", "--out", tmp_path]
    subprocess.run(build, check=True, cwd=CORE)
    (wheel,) = tmp_path.glob("*.whl")
    assert "cp311-abi3" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sedac_core/py.typed", "sedac_core/_rust.pyi", "sedac_core/cascade.py"} <= set(names)
    assert [name for name in names if name.endswith(".so")] == ["sedac_core/_rust.abi3.so"]
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "[vllm.general_plugins]" in text and "sedac=sedac_core.vllm_plugin:register" in text.replace(" ", "")

    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = "import sedac_core, sedac_core._rust, sys; print(sedac_core._rust.RiskHistogram().total)"
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{Path(__import__('numpy').__file__).parents[1]}"}
    python = tmp_path / "venv/bin/python"
    found = subprocess.run(
        [python, "-c", program], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert found.stdout == "0\n"


@pytest.mark.xdist_group("a group")
def test_tests_of_a_group_stay_in_one_process(request):
    """They share an installed vLLM: run apart they break each other now and then. pytest-xdist tells its scheduler by the name
    (pytest 9.2 does not let it: https://github.com/pytest-dev/pytest-xdist/issues/1386)."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("one process, or no groups")
    assert request.node.nodeid.endswith("@a group"), "pytest-xdist loses groups here: install requirements-dev.txt"
