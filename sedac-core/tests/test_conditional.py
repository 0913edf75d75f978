"""Conditional nodes in CUDA graphs: which sizes want them, what their bodies do, and on a GPU the graphs themselves."""

import functools
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from sedac_core.artifacts import Manifest
from sedac_core.cli import SedacError

kernels = pytest.importorskip("sedac_core.kernels", reason="Triton is not installed")
conditional = pytest.importorskip("sedac_core.conditional")
bench_tune = pytest.importorskip("sedac_core.bench_tune")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
on_gpu = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


# ---------------------------------------------------------------- the way that a step goes


def a_table(monkeypatch, **paths: str):
    settings = {int(size[1:]): kernels.MlpSettings(kernels.Tiled(), path) for size, path in paths.items()}
    monkeypatch.setattr(kernels, "_tuned", lambda policy: {"64x128": settings} if policy == "hard" else {})


def test_the_table_says_which_way_captured_steps_go(monkeypatch):
    a_table(monkeypatch, _16="predicated", _64="dense", _512="conditional")
    paths = kernels.Paths(512, 2048, 300, (64, 128))
    found = [paths(tokens) for tokens in (1, 16, 17, 64, 65, 512, 513, 2047, 2048)]
    assert found == ["predicated"] * 2 + ["dense"] * 2 + ["conditional"] * 2 + ["dense"] * 2 + ["gather"]
    paths.switches = False
    assert [paths(tokens) for tokens in (16, 65, 512)] == ["predicated", "dense", "dense"]


@pytest.mark.parametrize("shape", [None, (999, 777)], ids=["weights the kernels do not carry", "a shape nobody tuned"])
def test_where_nobody_has_measured_large_mlps_are_conditional(shape):
    paths = kernels.Paths(512, 2048, 300, shape)
    assert [paths(tokens) for tokens in (1, 299, 300, 512, 513)] == ["dense"] * 2 + ["conditional"] * 2 + ["dense"]


@pytest.fixture(params=json.loads(kernels.SETTINGS_FILE.read_text()))
def here(request, monkeypatch):
    """The name of each GPU that somebody has tuned on, as if it were this machine's."""
    kernels._tuned.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: request.param)
    yield request.param
    kernels._tuned.cache_clear()


@pytest.mark.parametrize("table", ["hard", "gates", "rounded"])
def test_the_ways_in_the_repos_table_follow_from_its_figures(here, table):
    """Those of this GPU come before those of others."""
    gpus = json.loads(kernels.SETTINGS_FILE.read_text())
    for gpu, tables in gpus.items():
        for shape, sizes in tables.get(table, {}).items():
            for size, row in sizes.items():
                most = bench_tune.allowed(int(size), table)
                assert row["path"] == bench_tune.path(row, most), (gpu, shape, size)
                found = kernels._tuned(table)[shape][int(size)]
                if gpu == here or size not in gpus[here].get(table, {}).get(shape, {}):
                    assert (found.path, found.kernel, found.gpu) == (row["path"], kernels.kernel_of(row), gpu)


def test_what_was_timed_elsewhere_is_known(here):
    for policy in ("hard", "gates", "rounded"):
        elsewhere = kernels.timed_elsewhere(policy, 2048, 11008, here)
        assert here not in elsewhere and kernels.timed_elsewhere(policy, 999, 777, here) == {}
        everywhere = kernels.timed_elsewhere(policy, 2048, 11008, "another")
        sizes = json.loads(kernels.SETTINGS_FILE.read_text())[here].get(policy, {}).get("2048x11008", {})
        assert everywhere.get(here, []) == sorted(map(int, sizes))
        assert everywhere == elsewhere | ({here: everywhere[here]} if sizes else {})


def test_every_row_of_the_repos_table_can_be_held_to_its_twin(monkeypatch):
    table, started = json.loads(kernels.SETTINGS_FILE.read_text()), []
    monkeypatch.setattr(bench_tune, "compile_all", lambda jobs: None)
    monkeypatch.setattr(bench_tune, "_problem", lambda policy, shape: SimpleNamespace(start=started.append))
    monkeypatch.setattr(bench_tune, "check", lambda problem, kernel: None)
    every = list(bench_tune.POLICIES), list(bench_tune.SHAPES), [*bench_tune.SIZES, *bench_tune.LARGE_SIZES]
    number = bench_tune.check_table(table, *every)
    rows = [
        int(tokens)
        for tables in table.values()
        for policy in ("hard", "gates", "rounded")
        for sizes in tables.get(policy, {}).values()
        for tokens in sizes
    ]
    assert number == len(rows) and sorted(started) == sorted(rows)
    with pytest.raises(SedacError, match="no settings of these policies, shapes and sizes"):
        bench_tune.check_table({}, *every)


def us(all_rows, half=50.0, none=5.0):
    return {"dense": 100.0, "all rows": all_rows, "half of the rows": half, "no rows": none}


@pytest.mark.parametrize(
    ("predicated", "node", "wanted"),
    [
        (us(103.0), us(103.0, half=40.0), "conditional"),
        (us(103.0), us(103.0, half=60.0), "predicated"),
        (us(105.0), us(104.0), "conditional"),
        (us(104.0), us(105.0, half=10.0), "predicated"),
        (us(105.0), us(105.0), "dense"),
        (us(103.0), None, "predicated"),
        (us(105.0), None, "dense"),
    ],
)
def test_the_cheapest_way_that_costs_nothing_without_exits_is_taken(predicated, node, wanted):
    row = {"us": predicated} | ({"conditional": node} if node else {})
    assert bench_tune.path(row, 1.04) == wanted


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize("tokens", [1, 2, 64, 128, 129, 136, 256, 300, 512, 2048, 2049, 8192])
def test_the_bodies_cover_every_number_of_running_rows(tokens):
    bodies = conditional.bodies_of(tokens)
    assert bodies[0] == conditional.Body(0, 0) and bodies[-1] == conditional.Body(tokens, tokens)
    limits = [body.limit for body in bodies]
    assert limits == sorted(set(limits)) and len(bodies) <= conditional._MOST_BODIES
    for running in range(tokens + 1):
        taken = next(body for body in bodies if body.limit >= running)
        assert running <= taken.rows <= tokens
        stride = 128 if tokens <= 2048 else conditional.stride(tokens)
        assert taken.rows == min(tokens, -(-running // stride) * stride)  # no more rows than whole tiles of them
        assert (taken is bodies[-1]) == (running == tokens)


def mlp(weights: kernels.Weights, x: torch.Tensor) -> torch.Tensor:
    """As stock computes it."""
    act = kernels.silu_mul(x @ weights.gate_up.T)
    return act @ weights.down.T


def problem(tokens: int, hidden: int = 256, neurons: int = 512, dtype=torch.float32, copies: int = 1):
    """x, rows and the MLPs of some layers."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    layers = [
        kernels.Weights(random(2 * neurons, hidden, scale=0.1), random(hidden, neurons, scale=0.1))
        for _ in range(copies)
    ]
    return random(tokens, hidden), torch.randperm(tokens, generator=generator).to(DEVICE), layers


def running(number: int) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("rows_running", [0, 1, 127, 128, 129, 199])
def test_each_body_computes_the_running_rows_and_zeros_the_others(rows_running):
    x, rows, (weights,) = problem(200, 64, 96)
    whole = functools.partial(mlp, weights)
    wanted = kernels.zero_exited(whole(x), rows, running(rows_running))
    for body in conditional.bodies_of(200)[:-1]:
        if rows_running <= body.limit:
            out = torch.full_like(x, torch.nan)
            conditional.run(body, x, rows, running(rows_running), whole, out)
            assert torch.allclose(out, wanted, atol=1e-4) and not out[rows[rows_running:]].any()


# ---------------------------------------------------------------- where they cannot be


@pytest.mark.skipif(CUDA, reason="there is a driver")
def test_without_a_driver_the_reason_is_one_sentence():
    with pytest.raises(conditional.Unavailable, match=r"^[^\n]*driver[^\n]*$"):
        conditional.Switches(torch.device("cuda"), 4)


def test_without_cuda_bindings_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(conditional.Unavailable, match="pip install cuda-bindings"):
        conditional.Switches(torch.device("cuda"), 4)


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not installed")
def test_old_cuda_bindings_are_named(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(bindings, "__version__", "12.9.4")
    with pytest.raises(conditional.Unavailable, match=r"12\.9\.4 is older than 13"):
        conditional.Switches(torch.device("cuda"), 4)


# ---------------------------------------------------------------- graphs


def capture(work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    return graph, made


def error(found, wanted):
    """Relative in the norm; NaN never passes."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)).item()


def saved_by(tokens: int, real: int, rows_running: int, layers: int) -> int:
    taken = next(body for body in conditional.bodies_of(tokens) if body.limit >= rows_running)
    return layers * (real - min(real, taken.rows))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [72, 128, 136, 300])
def test_nodes_of_one_graph_do_what_the_plain_mlp_does_and_count(tokens, dtype):
    """As in a whole decode step: the layers of a checkpoint share a switch, those of the next have their own."""
    x, rows, mlps = problem(tokens, dtype=dtype, copies=4)
    switches = conditional.Switches(x.device, 3)
    switches.prepare(x, functools.partial(mlp, mlps[0]))
    first, second = running(0), running(0)
    slots = torch.arange(tokens, device=DEVICE)
    slots[tokens - 8 :] = -1
    saved = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def step():
        outs = []
        for decided, layers in ((first, (0, 1, 2)), (second, (3,))):
            switches.checkpoint()
            for layer in layers:
                own = functools.partial(mlp, mlps[layer])
                outs.append(switches.mlp(x, rows, decided, range(layer, layers[-1] + 1), own, slots, saved))
        return outs

    graph, outs = capture(step)
    for a, b in ((0, 0), (tokens, tokens), (tokens - 1, 1), (5, 0), (128, 40), (65, tokens), (tokens // 2, 0)):
        a, b = min(a, tokens), min(b, tokens)
        first.fill_(a)
        second.fill_(b)
        saved.zero_()
        graph.replay()
        for layer, number in enumerate((a, a, a, b)):
            wanted = kernels.zero_exited(mlp(mlps[layer], x), rows, running(number))
            if number == tokens:
                assert torch.equal(outs[layer], wanted)
            assert not outs[layer][rows[number:]].any()
            assert error(outs[layer], wanted) < 1e-2
        assert int(saved) == saved_by(tokens, tokens - 8, a, 3) + saved_by(tokens, tokens - 8, b, 1)


@on_gpu
def test_graphs_of_one_mlp_each_set_their_own_switches():
    """As in vLLM's piecewise graphs: the checkpoint is captured in a graph before."""
    x, rows, mlps = problem(200, dtype=torch.bfloat16, copies=3)
    switches, n_running = conditional.Switches(x.device, 3), running(0)
    switches.prepare(x, functools.partial(mlp, mlps[0]))
    saved = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    capture(lambda: (switches.checkpoint(), x + 1))
    graphs = [
        capture(
            functools.partial(
                switches.mlp, x, rows, n_running, range(layer, 3), functools.partial(mlp, mlps[layer]), None, saved
            )
        )
        for layer in range(3)
    ]
    for number in (0, 3, 128, 150, 200):
        n_running.fill_(number)
        for (graph, out), weights in zip(graphs, mlps, strict=True):
            graph.replay()
            wanted = kernels.zero_exited(mlp(weights, x), rows, n_running)
            assert error(out, wanted) < 1e-2
    assert int(saved) == 3 * sum(saved_by(200, 200, number, 1) for number in (0, 3, 128, 150, 200))


@on_gpu
def test_graphs_of_several_sizes_share_the_pool_and_keep_their_answers():
    n_running, found = running(0), {}
    switches = conditional.Switches(torch.device("cuda"), 1)
    saved = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for tokens in (512, 256, 136):  # the largest first, as vLLM does
        x, rows, (weights,) = problem(tokens, dtype=torch.bfloat16)
        own = functools.partial(mlp, weights)
        switches.prepare(x, own)
        work = functools.partial(switches.mlp, x, rows, n_running, (0,), own, None, saved)
        found[tokens] = *capture(lambda work=work: work() + 1), x, rows, own
    for tokens in (136, 512, 256, 512):
        graph, out, x, rows, own = found[tokens]
        for number in (tokens, 1, tokens // 2, 0):
            n_running.fill_(number)
            graph.replay()
            wanted = kernels.zero_exited(own(x), rows, n_running) + 1
            assert error(out, wanted) < 1e-2


@on_gpu
def test_a_node_that_is_wrong_is_found_before_anything_depends_on_it():
    x, _, (weights,) = problem(200, dtype=torch.bfloat16)
    calls = iter(range(1000))

    def drifting(x):
        return mlp(weights, x) + next(calls)

    with pytest.raises(conditional.Unavailable, match="was wrong for"):
        conditional.Switches(x.device, 1).prepare(x, drifting)


def products_of(graph) -> list[str]:
    """Names of the products of matrices that a replay runs, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    found = [event.key for event in profile.key_averages() for _ in range(event.count)]
    return sorted(name for name in found if any(part in name for part in ("nvjet", "gemm", "cutlass")))


@on_gpu
def test_in_skipped_layers_no_product_of_matrices_runs():
    x, rows, mlps = problem(256, 1024, 4096, torch.bfloat16, copies=4)
    switches, n_running = conditional.Switches(x.device, 4), running(256)
    switches.prepare(x, functools.partial(mlp, mlps[0]))
    saved = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def step():
        switches.checkpoint()
        for layer in range(4):
            switches.mlp(x, rows, n_running, range(layer, 4), functools.partial(mlp, mlps[layer]), None, saved)

    plain, _ = capture(lambda: [mlp(weights, x) for weights in mlps])
    graph, _ = capture(step)
    wanted = products_of(plain)
    assert len(wanted) == 8 and products_of(graph) == wanted
    n_running.zero_()
    assert products_of(graph) == []


# ---------------------------------------------------------------- in vLLM


def products(records: list[dict], system: str, batch: int, exit_rate: float) -> float:
    """Products of matrices in a replayed decode step, attention's own apart."""
    names = ("nvjet", "gemm", "cutlass", "cublas")
    return sum(
        r["value"]
        for r in records
        if (r["metric"], r["system"], r.get("batch"), r.get("exit_rate")) == ("launches", system, batch, exit_rate)
        if any(name in r["kernel"] for name in names)
        and not any(name in r["kernel"] for name in ("flash", "splitKreduce"))
    )


@on_gpu
@pytest.mark.slow
def test_a_replayed_decode_step_runs_no_dense_mlp_where_all_tokens_have_exited(tmp_path):
    """In the real vLLM, patched, on a 7B's shape with dummy weights, at sizes that go by kernels and at one recorded twice."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder, batches = ROOT / "configs/shapes/qwen2.5-7b", (1, 64, 256)
    config = json.loads((folder / "config.json").read_text())
    ways = [kernels.mlp_settings(batch, config["hidden_size"], config["intermediate_size"]).path for batch in batches]
    assert ways == ["predicated", "predicated", "dense"]
    command = [sys.executable, "-m", "sedac_core.bench", "gpu", "--models", folder, "--batches", "--prefill",
               "--trace", *batches, "--out", tmp_path / "trace.json"]  # fmt: skip
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    records = json.loads((tmp_path / "trace.json").read_text())["records"]
    window = config["num_hidden_layers"] - Manifest.keep_last - records[0]["checkpoint"] - 1
    for batch, way in zip(batches, ways, strict=True):
        stock = products(records, "stock", batch, 0.0)
        assert stock >= 2 * config["num_hidden_layers"]
        assert products(records, "sedac", batch, 1.0) == stock - 2 * window
        assert products(records, "sedac", batch, 0.0) == (stock if way == "dense" else stock - 2 * window)
