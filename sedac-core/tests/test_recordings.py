"""Two recordings of a captured step: which sizes have them, and which of the two is looked up."""

import functools
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest

kernels = pytest.importorskip("sedac_core.kernels", reason="Triton is not installed")
recordings = pytest.importorskip("sedac_core.recordings")


class Step(NamedTuple):
    """As hashable as vLLM's batch descriptors."""

    num_tokens: int


US = (100.0, 10.0, 80.0, 120.0)  # dense; skipping with none, half and all of its rows


@pytest.fixture
def pick(monkeypatch):
    """Steps of up to 16 tokens are predicated, up to 256 recorded twice; 4 MLPs after the first checkpoint, 6 after the second."""
    settings = {
        16: kernels.MlpSettings(kernels.Fused(), "predicated"),
        256: kernels.MlpSettings(kernels.Tiled(), "dense", US),
        512: kernels.MlpSettings(kernels.Tiled(), "dense"),
    }
    monkeypatch.setattr(kernels, "_tuned", lambda policy: {"64x128": settings})
    return recordings.Pick(kernels.Paths(512, 2048, 9999, (64, 128)), (4, 6))


def test_gains_follow_the_rows_that_run():
    second = kernels.MlpSettings(kernels.Tiled(), "dense", US)
    assert [second.gains(share, 256) for share in (0, 0.001, 0.25, 0.5, 0.75, 1)] == [90, 90, 20, 20, 0, -20]
    assert second.gains(0.001, 512) == 20  # half a row and more: some step has one


def test_the_skipping_recording_is_taken_while_it_gains(pick):
    def taken(*shares):
        pick.ran(shares)
        return [pick.skipping(tokens) for tokens in (1, 16, 17, 256, 257, 512, 513)]

    none = [False] * 7
    assert taken(1.0, 1.0) == none
    assert taken(0.0, 0.0) == [
        False,
        False,
        True,
        True,
        False,
        False,
        False,
    ]  # larger ones: once
    assert taken(1.0, 0.5)[2:4] == [True, True]  # 4 · -20 + 6 · 20
    assert taken(1.0, 0.75) == none


def test_nothing_is_skipped_before_anything_was_seen(pick):
    assert not any(map(pick.skipping, range(1, 600)))


def test_paths_are_those_of_the_recording_under_way(pick):
    assert [pick.path(tokens) for tokens in (16, 256, 512, 2048)] == ["predicated", "dense", "dense", "gather"]
    with pytest.raises(KeyError), pick.capture():
        assert [pick.path(tokens) for tokens in (16, 256, 512, 2048)] == ["predicated", "predicated", "dense", "gather"]
        raise KeyError
    assert pick.path(256) == "dense"


def test_without_captured_steps_nothing_is_recorded_twice(pick):
    assert pick.paths.second(256)
    pick.paths.twice = False
    pick.ran((0.0, 0.0))
    assert not pick.paths.second(256) and not pick.skipping(256)


def test_a_model_runner_is_made_to_record_twice_once_whatever_decorates_it(monkeypatch):
    class Runner:
        def capture(self, batch_descriptors, cudagraph_runtime_mode): ...

        _capture_cudagraphs = functools.wraps(capture)(lambda *given: None)  # decorated by somebody else

    monkeypatch.setitem(sys.modules, recordings.RUNNER, SimpleNamespace(GPUModelRunner=Runner))
    before = Runner._capture_cudagraphs
    assert recordings.record_twice()
    ours = Runner._capture_cudagraphs
    assert ours is not before and recordings.record_twice() and Runner._capture_cudagraphs is ours
    for other in (SimpleNamespace(), SimpleNamespace(GPUModelRunner=object)):
        monkeypatch.setitem(sys.modules, recordings.RUNNER, other)
        assert not recordings.record_twice()


def test_vllm_finds_the_graph_of_the_recording_that_is_to_be(pick):
    graphs, step = recordings.Recordings(pick), Step(256)
    assert step not in graphs
    graphs[step] = "whole"
    with pick.capture():
        assert step not in graphs
        graphs[step] = "skipping"
    assert step in graphs and graphs[step] == "whole"
    pick.ran((0.0, 0.0))
    assert step in graphs and graphs[step] == "skipping"
    pick.ran((1.0, 1.0))
    assert step in graphs and graphs[step] == "whole" and list(graphs) == [step]
    graphs.clear()
    assert step not in graphs
    pick.ran((0.0, 0.0))
    assert step not in graphs and len(graphs) == 0
