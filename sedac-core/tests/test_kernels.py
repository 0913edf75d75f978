"""The Triton kernels against their torch twins: in Triton's interpreter here, on the GPU where there is one."""

import pytest
import torch

from sedac_core._rust import RiskHistogram
from sedac_core.probe import LREProbe

CUDA = torch.cuda.is_available()
kernels = pytest.importorskip("sedac_core.kernels", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a GPU, Triton's interpreter: conftest.py loaded the kernels for it, and running them asks again."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES_HERE = DTYPES if CUDA else DTYPES[:2]  # the interpreter knows no bfloat16 dot
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FUSED = kernels.Fused(block_n=32, block_k=32, down_n=32, down_k=32, splits=3, programs_per_sm=1)
WHOLE = kernels.Fused(block_n=64, block_k=16, down_n=16, down_k=64, splits=1, programs_per_sm=2)
TILED = kernels.Tiled((16, 32, 32, 4, 2), (32, 32, 64, 4, 2), 2)
KERNELS = pytest.mark.parametrize("kernel", [FUSED, WHOLE, TILED], ids=["fused", "unsplit", "tiled"])


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DEVICE, dtype)


def error(found, wanted):
    """Relative in the norm; NaN never passes."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)).item()


def some_rows(tokens: int):
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    return order.to(DEVICE)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "neurons", "running"),
    [(1, 64, 256, 1), (1, 64, 256, 0), (5, 96, 192, 3), (33, 64, 256, 17), (33, 64, 256, 33), (20, 128, 64, 20)],
)
def test_the_mlp_computes_the_running_rows_and_zeros(tokens, hidden, neurons, running, dtype, kernel):
    x, gate_up = random(tokens, hidden, dtype=dtype), random(2 * neurons, hidden, dtype=dtype, seed=1, scale=0.2)
    down, rows = random(hidden, neurons, dtype=dtype, seed=2, scale=0.2), some_rows(tokens)
    n_running = torch.tensor([running], dtype=torch.int32, device=DEVICE)
    found = kernels.mlp(x, gate_up, down, rows, n_running, kernel=kernel)
    wanted = kernels.mlp_twin(x, gate_up, down, rows, n_running)
    assert error(found, wanted) < TOLERANCE[dtype]
    assert not found[rows[running:]].any() and found[rows[:running]].any(-1).all()


@KERNELS
@pytest.mark.parametrize("counts", [[9, 9, 9, 9], [9, 6, 6, 1], [7, 3, 0, 0], [0, 0, 0, 0], [9, 0, 0, 0]])
def test_each_block_of_neurons_has_its_own_rows(counts, kernel):
    x, gate_up, down = random(9, 64), random(512, 64, seed=1, scale=0.2), random(64, 256, seed=2, scale=0.2)
    rows, n_running = some_rows(9), torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    found = kernels.mlp(x, gate_up, down, rows, n_running, 64, kernel)
    assert error(found, kernels.mlp_twin(x, gate_up, down, rows, n_running, 64)) < 1e-5


def test_weights_that_no_row_needs_are_not_read():
    x, gate_up, down = random(4, 64), random(512, 64, seed=1), random(64, 256, seed=2)
    n_running = torch.tensor([4, 2, 0, 0], dtype=torch.int32, device=DEVICE)
    wanted = kernels.mlp_twin(x, gate_up, down, some_rows(4), n_running, 64)
    poisoned = gate_up.clone()
    poisoned[128:256] = poisoned[256 + 128 :] = torch.nan  # gate and up of the neurons from 128 on
    poisoned_down = down.clone()
    poisoned_down[:, 128:] = torch.nan
    for kernel in (FUSED, WHOLE, TILED):
        found = kernels.mlp(x, poisoned, poisoned_down, some_rows(4), n_running, 64, kernel)
        assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("running", [0, 3, 7])
def test_the_rows_of_exited_tokens_are_set_to_zero(running):
    out, rows = random(7, 1500), some_rows(7)
    wanted = out.clone()
    wanted[rows[running:]] = 0
    kernels.zero_exited(out, rows, torch.tensor([running], dtype=torch.int32, device=DEVICE))
    assert torch.equal(out, wanted)


def a_rule(checkpoints=2, gamma=0.5, level=0.5, adaptive=True, thresholds=(0.7, 0.6)) -> kernels.Rule:
    buffer = torch.tensor(thresholds[:checkpoints], dtype=torch.float32, device=DEVICE)
    return kernels.Rule.make(buffer, [1.0, 2.0][:checkpoints], gamma, level, adaptive)


@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 150])
@pytest.mark.parametrize("rank", [5, 64])
def test_two_checkpoints_decide_count_and_compact_as_the_twin_does(tokens, rank, dtype):
    torch.manual_seed(0)
    probes = [LREProbe(96, rank).to(DEVICE).requires_grad_(False) for _ in range(2)]
    for probe in probes:
        probe.head.weight.mul_(4)
        probe.norm.weight.add_(torch.rand_like(probe.norm.weight))
        probe.norm.bias.add_(torch.rand_like(probe.norm.bias))
    slots = torch.arange(tokens, device=DEVICE)
    slots[tokens - tokens // 4 :] = -1  # padding
    hidden, residual = random(tokens, 96, dtype=dtype), random(tokens, 96, dtype=dtype, seed=1)
    found, wanted = a_rule(), a_rule()
    left = right = None
    for index, probe in enumerate(probes):
        last = index == 1
        one = kernels.checkpoint(probe, hidden, residual, left, slots, found, index, 3 + last)
        two = kernels.checkpoint_twin(probe, hidden, residual, right, slots, wanted, index, 3 + last)
        assert torch.equal(one[0].isinf(), two[0].isinf())
        assert torch.allclose(one[0], two[0], atol=1e-5)
        n = int(one[2])
        assert n == int(two[2]) and torch.equal(one[1][:n], two[1][:n])
        assert torch.equal(one[1].sort().values, torch.arange(tokens, device=DEVICE))
        left, right = one[0], two[0]
    assert torch.equal(found.counters, wanted.counters)
    assert found.counters[kernels.STEPS] == 1 and found.counters[kernels.TOKENS] == tokens - tokens // 4
    near = (found.histogram.cumsum(1) - wanted.histogram.cumsum(1)).abs()  # a rounding may move a token one bin on
    assert near.max() <= 1 and torch.equal(found.histogram.sum(1), wanted.histogram.sum(1))


def test_exits_that_are_only_watched_are_counted_nowhere_and_skip_nothing():
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    rule = a_rule(1, 0.0, thresholds=(float("inf"),))
    rule.taken.zero_()
    margin, rows, n_running = kernels.checkpoint(probe, random(6, 64), random(6, 64), None, None, rule, 0, 4)
    assert margin.isinf().all() and n_running.item() == 6 and rows.tolist() == list(range(6))
    assert rule.counters.tolist() == [1, 6, 0, 0, 0]
    assert rule.histogram.sum() == 6


def test_a_stream_that_is_not_finite_never_exits_and_is_counted():
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    hidden = random(4, 64)
    hidden[1, 3], hidden[2, 0] = torch.nan, torch.inf
    rule = a_rule(1, 0.0, thresholds=(float("inf"),))
    margin, rows, n_running = kernels.checkpoint(probe, hidden, random(4, 64), None, None, rule, 0, 1)
    assert rows[: int(n_running)].tolist() == [1, 2] and margin.isinf().tolist() == [True, False, False, True]
    assert rule.counters.tolist() == [1, 4, 2, 2, 2]


@pytest.mark.parametrize("threshold", [0.0, 0.5, float("inf")])
def test_at_gamma_0_and_level_a_half_a_token_exits_just_where_its_risk_is_under_the_threshold(threshold):
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    rule = a_rule(1, 0.0, thresholds=(threshold,))
    hidden, residual = random(40, 64), random(40, 64, seed=1)
    margin, _, _ = kernels.checkpoint(probe, hidden, residual, None, None, rule, 0, 1)
    assert torch.equal(margin.isinf(), probe(hidden + residual) < threshold)


def test_the_bins_are_the_rust_histograms():
    risks = torch.cat([torch.rand(500) * 3, torch.tensor([0.0, 2.0**-30, 2.0**-24, 1.0, 2.0**23, 2.0**30])])
    histogram = RiskHistogram()
    histogram.add(risks.numpy())
    again = RiskHistogram()
    again.add(kernels.bin_centres()[kernels.histogram_bins(risks)].numpy())
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert again.quantile(share) == histogram.quantile(share)


def test_settings_cover_every_size_and_shapes_nobody_tuned_are_not_predicated():
    for tokens in (1, 16, 17, 512, 8192):
        assert not kernels.mlp_settings(tokens, 999, 777).predicated
    x, rows, n_running = random(2, 64), some_rows(2), torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(AssertionError):
        kernels.mlp(x, random(512, 64), random(64, 128), rows, n_running)
