"""SEDAC_* variables: read in one place, validated, and documented as they are."""

import re
from pathlib import Path

import pytest

from sedac_core.cli import SedacError
from sedac_core.settings import PRESETS, VARIABLES, Settings, check_lengths

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_without_variables_sedac_is_off_and_adaptive():
    settings = Settings.from_env({})
    assert (settings.enabled, settings.adaptive, settings.thresholds, settings.layers) == (False, True, None, None)
    assert settings.exit_mode is None, "the manifest names the policy"


def test_thresholds_set_by_hand_hold_unless_adaptive_is_asked_for():
    assert not Settings.from_env({"SEDAC_THRESHOLDS": "0.5,1,inf"}).adaptive
    assert Settings.from_env({"SEDAC_THRESHOLDS": "0.5,1,inf", "SEDAC_ADAPTIVE": "1"}).adaptive


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEDAC_ENABLED", "yes"),
        ("SEDAC_PROBE_LAYERS", "14,7"),
        ("SEDAC_PROBE_LAYERS", "7,,21"),
        ("SEDAC_THRESHOLDS", "0.8,nan,1"),
        ("SEDAC_THRESHOLDS", "-1"),
        ("SEDAC_EXIT_RATES", "0.6,0.2"),
        ("SEDAC_EXIT_RATES", "0.6,1.2"),
        ("SEDAC_PROBE_RANK", "0"),
        ("SEDAC_LEVEL", "1"),
        ("SEDAC_KEEP_LAST", "-1"),
        ("SEDAC_EXIT_MODE", "gentle"),
        ("SEDAC_LAMBDA", "inf"),
        ("SEDAC_LAMBDA", "low"),
        ("SEDAC_ADAPTIVE_ALPHA", "0"),
        ("SEDAC_CALIBRATION_STEPS", "many"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(name, value):
    with pytest.raises(SedacError, match=f"{name} must be .*found '{re.escape(value)}'"):
        Settings.from_env({name: value})


def test_a_misspelt_variable_is_named_with_the_valid_ones():
    with pytest.raises(SedacError, match="unknown variable SEDAC_THRESHOLD: SEDAC knows .*SEDAC_THRESHOLDS"):
        Settings.from_env({"SEDAC_THRESHOLD": "1"})


def test_lists_must_have_one_value_for_each_checkpoint():
    with pytest.raises(SedacError, match="SEDAC_THRESHOLDS has 2 values .* for 3 checkpoints"):
        check_lengths((7, 14, 21), SEDAC_THRESHOLDS=(1.0, 2.0))


def test_the_readmes_table_of_variables_is_the_codes():
    rows = re.findall(r"^\| `(SEDAC_\w+)` \| `([^`]*)` \| (.*) \|$", README, re.MULTILINE)
    assert rows == [(variable.name, variable.default, variable.meaning) for variable in VARIABLES]


def test_the_readmes_presets_are_the_codes():
    rows = dict(re.findall(r"^\| (Conservative|Balanced|Aggressive) \| `([\d.,]+)` \|", README, re.MULTILINE))
    assert rows == {name.capitalize(): ",".join(map(str, values)) for name, values in PRESETS.items()}


def test_the_compile_caches_key_follows_what_is_built_into_the_graph_and_nothing_else(tiny_model, tiny_artifact):
    from transformers import AutoConfig

    from sedac_core.policy import load_policy

    def key(**environment: str) -> dict:
        given = {"SEDAC_ADAPTIVE": "0", "SEDAC_PROBE_DIR": str(tiny_artifact), "SEDAC_KEEP_LAST": "1", **environment}
        return load_policy(Settings.from_env(given), AutoConfig.from_pretrained(tiny_model)).graph_key()

    first = key(SEDAC_THRESHOLDS="0.1,0.2")
    assert first == key(SEDAC_THRESHOLDS="0,inf")
    assert first != key(SEDAC_THRESHOLDS="0.1,0.2", SEDAC_GAMMA="0.5")
    assert first != key(SEDAC_THRESHOLDS="0.1,0.2", SEDAC_WEIGHTS="1,2")
    assert first != key(SEDAC_THRESHOLDS="0.1,0.2", SEDAC_LEVEL="0.3")
    assert first != key(SEDAC_THRESHOLDS="0.1,0.2", SEDAC_KEEP_LAST="0")
    assert first != key(SEDAC_THRESHOLDS="0.1", SEDAC_PROBE_LAYERS="1")
    assert first != key(SEDAC_THRESHOLDS="0.2", SEDAC_PROBE_LAYERS="3")
