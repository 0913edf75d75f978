"""The benchmark of adaptive thresholds, in small, on the tiny model's risks."""

import json

import numpy as np
import pytest

from sedac_core import bench, bench_adaptive
from sedac_core.cli import SedacError
from sedac_core.collection import read_documents

CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстувщхыз")


@pytest.fixture(scope="module")
def measure(tiny_artifact, tmp_path_factory):
    """`measure("--window", 8192)` runs the benchmark; returns its records by metric, system and text."""
    folder = tmp_path_factory.mktemp("adaptive")
    other = folder / "other.jsonl"  # another script: the tiny model reads bytes that it has not met
    texts = [text.lower().translate(CYRILLIC) for text in read_documents("pydoc")[:40]]
    other.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")

    def run(*options) -> dict:
        out = folder / "adaptive.json"
        small = ["--probe-dir", tiny_artifact, "--exit-rates", "0.3,0.6", "--tokens", 50_000, "--after", 20_000]
        small += [
            "--samples",
            96,
            "--max-length",
            128,
            "--repeats",
            2,
            "--out",
            out,
            "--texts",
            "pydoc",
            "stdlib",
            other,
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["bench", "adaptive", *map(str, [*small, *options])])
            bench.main()
        records = bench.read_results(out)["records"]
        return {(r["metric"], r["system"], r["text"].rpartition("/")[2], r.get("tokens")): r for r in records}

    return run


def test_rates_are_held_and_found_again_after_the_text_changes(measure):
    found = measure()
    miss = found["window_miss", "adaptive", "pydoc", 16384]
    assert miss["value"] < 0.02 and miss["within"] == miss["windows"] == 6
    assert found["drift", "adaptive", "pydoc", 50_000]["value"] < 0.01
    off = found["off_at_change", "adaptive", "other.jsonl", None]
    assert off["value"] > 0.04, "the change is a real one"
    for text in ("stdlib", "other.jsonl"):
        assert found["tokens_to_hold_at_most", "adaptive", text, None]["value"] <= 12_000
        assert found["orders_held", "adaptive", text, None]["value"] == 2


def test_a_window_too_long_to_follow_the_text_is_found_out(measure):
    found = measure("--window", 1_000_000)
    assert found["orders_held", "adaptive", "other.jsonl", None]["value"] == 0
    assert found["tokens_to_hold_at_most", "adaptive", "other.jsonl", None]["value"] == 20_000


def test_rates_are_held_from_where_they_stay_near_on_average():
    looks = bench_adaptive.HELD_FOR // bench_adaptive.LOOK
    off = np.full((10, 2), 0.1)
    near = np.where(np.arange(2 * looks)[:, None] % 2, 0.03, -0.03) * np.ones(2)
    found = bench_adaptive.held_from(np.concatenate([off, near]))
    assert found == 4 * bench_adaptive.LOOK, "six of 32 looks at 0.1 are 0.019 on average"
    assert bench_adaptive.held_from(near) == 0
    assert bench_adaptive.held_from(np.full((100, 2), 0.021)) is None


def test_a_manual_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_adaptive, "MANUAL", tmp_path)
    with pytest.raises(SedacError, match="name other --texts"):
        bench_adaptive.documents("manual:de")
