"""Two recordings of a captured step: which sizes have them, and which of the two is looked up."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

kernels = pytest.importorskip("sedac_core.kernels", reason="Triton is not installed")
recordings = pytest.importorskip("sedac_core.recordings")


class Step(NamedTuple):
    """As hashable as vLLM's batch descriptors."""

    num_tokens: int


US = dict(
    zip(kernels.US, (100.0, 10.0, 80.0, 120.0), strict=True)
)  # dense; skipping with none, half and all of its rows
WIDTHS = (128, 64, 0)
GATED = {"dense": 100.0, "all rows": 110.0, "all at width 64": 70.0, "all at width 0": 30.0, "mixed": 110.0}


@pytest.fixture
def pick(monkeypatch):
    """Steps of up to 16 tokens are predicated, up to 256 recorded twice; 4 MLPs after the first checkpoint, 6 after the second."""
    settings = {
        16: kernels.MlpSettings(kernels.Fused(), "predicated"),
        256: kernels.MlpSettings(kernels.Tiled(), "dense", US),
        512: kernels.MlpSettings(kernels.Tiled(), "dense"),
    }
    monkeypatch.setattr(kernels, "_tuned", lambda policy: {"64x128": settings})
    paths = kernels.Paths(512, 2048, 9999, (64, 128))

    def gains(tokens, running):
        second = paths.second(tokens)
        return second and 4 * second.gains(running[0], tokens) + 6 * second.gains(running[1], tokens)

    pick = recordings.Pick(gains, (1.0, 1.0))
    pick.paths = paths
    return pick


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


def test_while_second_recordings_are_captured_the_sizes_that_have_one_skip(pick):
    with pytest.raises(KeyError), pick.capture(skipping=True):
        assert [pick.skipping(tokens) for tokens in (16, 17, 256, 512)] == [False, True, True, False]
        raise KeyError
    assert not pick.skipping(256)


def test_while_whole_recordings_are_captured_nothing_skips_and_nobody_looks(pick):
    pick.ran((0.0, 0.0))
    pick.look = True
    with pick.capture(skipping=False):
        assert not any(pick.skipping(256) for _ in range(3 * recordings.LOOK_EVERY))
    assert pick.skipping(256)


def gated(tokens: int, *shares: float, **us: float) -> float:
    return kernels.MlpSettings(kernels.Tiled(), "dense", GATED | us).gains_narrowed(shares, WIDTHS, tokens)


def test_gains_of_gates_follow_the_widest_row_or_each():
    assert [gated(1, *shares) for shares in ((1, 0, 0), (0, 1, 0), (0, 0, 1))] == pytest.approx([-10, 30, 70])
    assert gated(1, 0.5, 0, 0.5) == pytest.approx(30)
    # Mixed levels took as long as whole rows: a step's time is that of its widest row.
    assert gated(2, 0.5, 0, 0.5) == pytest.approx(100 - 0.75 * 110 - 0.25 * 30)
    assert gated(256, 0.01, 0, 0.99) == pytest.approx(-10 + 80 * 0.99**256)
    # They took as long as the levels' mean: each row pays for itself.
    assert gated(256, 0.5, 0, 0.5, mixed=70.0) == pytest.approx(30)
    assert gated(256, 0.5, 0, 0.5, mixed=90.0) == pytest.approx((30 - 10) / 2, abs=0.1)


def test_gains_at_widths_that_were_not_timed_lie_between():
    second = kernels.MlpSettings(kernels.Fused(), "dense", GATED)
    assert second.gains_narrowed((0, 1), (128, 32), 1) == pytest.approx(50)
    assert second.gains_narrowed((1, 0), (128, 32), 1) == pytest.approx(-10)


class Gates:
    """A runtime of gates as far as it picks recordings, every step of one token."""

    LEVELS = 3

    def __init__(self):
        self.pick = recordings.Pick(
            lambda tokens, shares: gated(tokens, *shares) if tokens < 300 else None, (1, 0, 0), True
        )

    def step(self, level: int, tokens: int = 1) -> bool:
        """A step of these tokens, all of which would run at this level, and a poll; whether it skipped."""
        skips = self.pick.skipping(tokens)
        if skips:
            self.pick.saw([tokens * (i == level) for i in range(self.LEVELS)], 0.5 ** (tokens / 16))
        return skips


@pytest.mark.parametrize("tokens", [1, 64])
def test_gates_are_looked_at_now_and_then_and_a_change_of_text_is_followed(tokens):
    gates, many = Gates(), 50 * recordings.LOOK_EVERY
    looks = [gates.step(0, tokens) for _ in range(many)]
    assert sum(looks) == 50 and not any(looks[: recordings.LOOK_EVERY - 1])
    narrowed = [gates.step(1, tokens) for _ in range(many)]
    first = next(i for i in range(many) if all(narrowed[i : i + 9]))
    assert first < (7 if tokens == 1 else 2) * recordings.LOOK_EVERY and all(narrowed[first:])
    whole = [gates.step(0, tokens) for _ in range(many)]
    assert whole.index(False) < (40 if tokens == 1 else 3) and sum(whole[100:]) <= 50


def test_old_rows_count_less_padding_says_nothing_and_what_was_seen_can_be_forgotten():
    pick = Gates().pick
    pick.saw([0, 0, 0], 0.5)
    assert pick.shares == (1, 0, 0)
    pick.saw([0, 8, 0], 0.5)
    pick.saw([2, 0, 2], 0.5)
    assert pick.shares == (0.25, 0.5, 0.25)
    pick.forget([1.0, 0.0, 0.0])
    pick.saw([0, 1, 0], 0.5)
    assert pick.shares == (0.0, 1.0, 0.0)


def test_nobody_looks_where_no_gate_may_narrow_or_steps_are_recorded_once():
    gates = Gates()
    assert not any(gates.step(1, 300) for _ in range(200))
    gates.pick.look = False
    assert not any(gates.step(1) for _ in range(200))


def test_without_captured_steps_nothing_is_recorded_twice(pick):
    assert pick.paths.second(256)
    pick.paths.twice = False
    pick.ran((0.0, 0.0))
    assert not pick.paths.second(256) and not pick.second(256) and not pick.skipping(256)


def test_sizes_past_the_table_have_the_defaults(pick):
    assert kernels.mlp_settings(513, 64, 128) is kernels.DEFAULTS[512]
    assert kernels.mlp_settings(512, 64, 128).path == "dense"


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
    with pick.capture(skipping=True):
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


def test_a_benchmark_finds_the_recording_it_names_and_the_only_one_by_any_name(pick):
    from sedac_core.engines import Engine

    engine, graphs = Engine.__new__(Engine), recordings.Recordings(pick)
    engine.steps = {size: (graphs, Step(size)) for size in (1, 256)}
    for tokens, name in ((1, "once"), (256, "whole")):
        assert Step(tokens) not in graphs
        graphs[Step(tokens)] = SimpleNamespace(cudagraph=name)
    with pick.capture(skipping=True):
        assert Step(256) not in graphs
        graphs[Step(256)] = SimpleNamespace(cudagraph="skipping")
    for shares in ((1.0, 1.0), (0.0, 0.0)):  # whichever the host picks
        pick.ran(shares)
        assert [engine.step_of(1, name) for name in (None, "whole", "predicated")] == ["once"] * 3
        assert [engine.step_of(256, name) for name in ("whole", "predicated")] == ["whole", "skipping"]
        assert engine.step_of(256) == ("skipping" if shares[0] == 0 else "whole")


def test_a_benchmark_runs_steps_without_their_graphs_for_a_while():
    from sedac_core.engines import Engine

    vllm = importlib.util.find_spec("vllm")
    if vllm is not None:  # read, not imported: that would take a test's process ten seconds
        source = Path(vllm.submodule_search_locations[0], "v1/cudagraph_dispatcher.py").read_text()
        assert "not self.keys_initialized" in source, "vLLM asks something else before it looks for a graph"
        source = Path(vllm.submodule_search_locations[0], "compilation/decorators.py").read_text()
        assert "if self.do_not_compile or" in source, "vLLM asks something else before it runs what it compiled"
    engine, own = Engine.__new__(Engine), SimpleNamespace(keys_initialized=True)
    model = SimpleNamespace(do_not_compile=False)
    runner = SimpleNamespace(cudagraph_dispatcher=own, get_model=lambda: SimpleNamespace(model=model))
    worker = SimpleNamespace(model_runner=runner)
    engine.llm = SimpleNamespace(collective_rpc=lambda method, args: method(worker, *args))
    with pytest.raises(KeyError), engine.without_graphs():
        assert not own.keys_initialized and model.do_not_compile
        raise KeyError
    assert own.keys_initialized and not model.do_not_compile


class Wrapper:
    """As vLLM's wrapper of a graph: captures what it does not have, replays what it has."""

    _all_instances = ()

    def __init__(self, mode, config, first=False):
        self.runtime_mode, self.compilation_config = mode, config
        self.runnable = SimpleNamespace(is_first_graph=first)
        self.concrete_cudagraph_entries = {}

    def __call__(self, descriptor, what=None):
        if descriptor not in self.concrete_cudagraph_entries:
            self.concrete_cudagraph_entries[descriptor] = what
        return self.concrete_cudagraph_entries[descriptor]


@pytest.mark.parametrize(("mode", "least"), [("FULL", 513), ("PIECEWISE", 17), ("PIECEWISE", 513)])
def test_all_pieces_of_a_step_are_of_one_recording(pick, monkeypatch, mode, least):
    """Those of small steps, which vLLM captures unasked, of the only one."""
    monkeypatch.setattr(recordings, "PIECES_FROM", least)
    both = mode == "FULL" or least <= 256
    modes = SimpleNamespace(FULL="FULL", PIECEWISE="PIECEWISE")
    own, other = object(), object()
    pieces = [Wrapper("PIECEWISE", own, first) for first in (False, False, True)]
    strangers = [Wrapper("PIECEWISE", other, True), Wrapper("FULL", own)]
    monkeypatch.setattr(Wrapper, "_all_instances", [*strangers, *pieces])
    runner = SimpleNamespace(model=Wrapper("FULL", own), compilation_config=own)
    for module, found in {
        "vllm.config": SimpleNamespace(CUDAGraphMode=modes),
        "vllm.compilation.cuda_graph": SimpleNamespace(CUDAGraphWrapper=Wrapper),
        "sedac_core.vllm_requests": SimpleNamespace(runtimes=lambda runner: [SimpleNamespace(pick=pick)]),
    }.items():
        monkeypatch.setitem(sys.modules, module, found)
    used = [runner.model] if mode == "FULL" else [pieces[2], *pieces[:2]]

    def capture(runner, descriptors, mode):
        for descriptor in descriptors:
            for wrapper in used:
                wrapper(descriptor, "skipping" if pick.captured else "whole")

    recordings.twice(capture)(runner, [Step(512), Step(256), Step(16)], mode)
    skipping = "skipping" if both else "whole"
    for shares, found in (((1.0, 1.0), "whole"), ((0.0, 0.0), skipping), ((1.0, 1.0), "whole")):
        pick.ran(shares)
        assert [wrapper(Step(256)) for wrapper in used] == [found] * len(used)
        assert [wrapper(Step(size)) for size in (16, 512) for wrapper in used] == ["whole"] * 2 * len(used)
    pick.look, pick.waited = True, recordings.LOOK_EVERY - 1
    assert [wrapper(Step(256)) for wrapper in used] == [skipping] * len(used), "a look is a look in all pieces"
    assert [wrapper(Step(256)) for wrapper in used] == ["whole"] * len(used)
    assert not any(wrapper.concrete_cudagraph_entries for wrapper in strangers)


def test_pieces_of_which_none_is_known_to_be_the_first_are_recorded_once(pick, monkeypatch):
    modes, own = SimpleNamespace(FULL="FULL"), object()
    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(CUDAGraphMode=modes))
    monkeypatch.setitem(sys.modules, "vllm.compilation.cuda_graph", SimpleNamespace(CUDAGraphWrapper=Wrapper))
    runner = SimpleNamespace(model=None, compilation_config=own)
    for pieces in ([], [Wrapper("PIECEWISE", own)], [Wrapper("PIECEWISE", own, True)] * 2):
        monkeypatch.setattr(Wrapper, "_all_instances", pieces)
        assert recordings.graphs_of(runner, "PIECEWISE") == recordings.graphs_of(runner, "FULL") == []
