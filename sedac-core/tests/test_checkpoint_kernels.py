"""A checkpoint's kernels against their torch twins."""

import itertools

import pytest
import torch
from kernel_cases import DEVICE, DTYPES_HERE, padding, random, some_rows

from sedac_core import checkpoint_kernels, checkpoint_parts, step_counters
from sedac_core._rust import RiskHistogram
from sedac_core.checkpoint_parts import DeviceProbe
from sedac_core.metrics import RISK_BUCKETS
from sedac_core.probe import LREProbe

pytestmark = pytest.mark.usefixtures("interpreter")


def a_rule(checkpoints=2, gamma=0.5, level=0.5, adaptive=True, thresholds=(0.7, 0.6)) -> checkpoint_parts.Rule:
    in_force = torch.tensor(thresholds[:checkpoints], dtype=torch.float32, device=DEVICE)
    table = torch.stack([in_force, torch.zeros_like(in_force), in_force * 1.5])  # in force, off, and a preset
    return checkpoint_parts.Rule.make(table, [1.0, 2.0][:checkpoints], gamma, level, adaptive)


@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 150, 600])
@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("choices", [False, True], ids=["nobody chose", "some chose"])
def test_two_checkpoints_decide_count_and_compact_as_the_twin_does(tokens, rank, choices, dtype):
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
    chosen = some_rows(610).int() % 3 if choices else None  # the buffer is longer than the step
    path = "gather" if choices else "predicated"
    left = right = first = None
    for index, probe in enumerate(probes):
        last = index == 1
        rest = (index, 3 + last, chosen, path)
        one = checkpoint_kernels.checkpoint(DeviceProbe.make(probe), hidden, residual, left, slots, found, *rest)
        two = checkpoint_kernels.checkpoint_twin(probe, hidden, residual, right, slots, wanted, *rest)
        assert torch.equal(one[0].isinf(), two[0].isinf())
        assert torch.allclose(one[0], two[0], atol=1e-5)
        n = int(one[2])
        assert n == int(two[2]) and torch.equal(one[1][:n], two[1][:n])
        assert torch.equal(one[1].sort().values, torch.arange(tokens, device=DEVICE))
        assert torch.equal(one[3], two[3]) and torch.equal(one[3].nonzero()[:, 0], one[1][:n])
        first = one[0] if first is None else first
        left, right = one[0], two[0]
        if choices:
            assert not one[0][: tokens - tokens // 4][chosen[: tokens - tokens // 4] == 1].isinf().any(), "opted out"
    assert torch.equal(found.counters, wanted.counters)
    assert torch.allclose(found.risk_sums, wanted.risk_sums)
    real = tokens - tokens // 4
    assert found.counters[[step_counters.STEPS, step_counters.TOKENS]].tolist() == [1, real]
    seen = [found.counters[checkpoint_parts.BY_CHECKPOINT + 13 * i :][:13] for i in range(2)]
    assert [int(each[2:].sum()) for each in seen] == [real, real - int(seen[0][0])], "risks of those that got there"
    assert found.histogram.sum(1).tolist() == (
        [int((chosen[:real] == 0).sum()), int(((chosen[:real] == 0) & ~first[:real].isinf()).sum())]
        if choices
        else [real, real - int(seen[0][0])]
    )
    near = (found.histogram.cumsum(1) - wanted.histogram.cumsum(1)).abs()  # a rounding may move a token one bin on
    assert near.max() <= 1 and torch.equal(found.histogram.sum(1), wanted.histogram.sum(1))


def test_exits_that_are_only_watched_are_counted_nowhere_and_skip_nothing():
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    rule = a_rule(1, 0.0, thresholds=(float("inf"),))
    rule.taken.fill_(step_counters.OBSERVING)
    margin, rows, n_running, running = checkpoint_kernels.checkpoint(
        DeviceProbe.make(probe), random(6, 64), random(6, 64), None, None, rule, 0, 4
    )
    assert margin.isinf().all() and n_running.item() == 6 and running.all() and rows.tolist() == list(range(6))
    steps, tokens, *rest = rule.counters.tolist()
    assert (steps, tokens) == (1, 6) and rest[4:8] == [6, 0, 0, 0], "observing"
    assert rest[8:11] == [0, 0, 0] and sum(rest[11:]) == 6
    assert rule.histogram.sum() == 6


def test_a_stream_that_is_not_finite_never_exits_and_is_counted():
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    hidden = random(4, 64)
    hidden[1, 3], hidden[2, 0] = torch.nan, torch.inf
    rule = a_rule(1, 0.0, thresholds=(float("inf"),))
    margin, rows, n_running, _ = checkpoint_kernels.checkpoint(
        DeviceProbe.make(probe), hidden, random(4, 64), None, None, rule, 0, 1
    )
    assert rows[: int(n_running)].tolist() == [1, 2] and margin.isinf().tolist() == [True, False, False, True]
    saved, exited, odd, *risks = rule.counters[checkpoint_parts.ROWS_SAVED :].tolist()
    assert (saved, exited, odd, sum(risks)) == (2, 2, 2, 2) and rule.risk_sums.isfinite().all()


def test_risks_are_counted_in_the_buckets_of_the_metrics():
    probe, rule = LREProbe(64, 16).to(DEVICE).requires_grad_(False), a_rule(1, 0.0, adaptive=False)
    hidden, residual = random(300, 64, scale=3.0), random(300, 64, seed=1)
    probe.head.weight.mul_(20)
    checkpoint_kernels.checkpoint(DeviceProbe.make(probe), hidden, residual, None, padding(300, 50), rule, 0, 1)
    risks = probe(hidden + residual)[:250].tolist()
    buckets = rule.counters[checkpoint_parts.BY_CHECKPOINT + 2 :].tolist()
    assert buckets == [
        sum(low < risk <= high for risk in risks) for low, high in itertools.pairwise((-1, *RISK_BUCKETS, float("inf")))
    ]
    assert min(buckets[4:]) > 0 and rule.risk_sums.item() == pytest.approx(sum(risks), rel=1e-5)


def test_a_cascade_that_is_switched_off_or_runs_dense_says_so():
    probe, rule = LREProbe(64, 16).to(DEVICE).requires_grad_(False), a_rule(1, 0.0, adaptive=False)
    chosen = torch.tensor([0, 1, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    for phase, path in (
        (step_counters.TAKEN, "dense"),
        (step_counters.OFF, "dense"),
        (step_counters.OBSERVING, "conditional"),
    ):
        rule.taken.fill_(phase)
        checkpoint_kernels.checkpoint(
            DeviceProbe.make(probe), random(5, 64), random(5, 64), None, None, rule, 0, 1, chosen, path
        )
    paths, reasons = rule.counters[2:6].tolist(), rule.counters[6:10].tolist()
    assert (paths, reasons) == ([0, 1, 2, 0], [5, 5, 2, 3])


@pytest.mark.parametrize("threshold", [0.0, 0.5, float("inf")])
def test_at_gamma_0_and_level_a_half_a_token_exits_just_where_its_risk_is_under_the_threshold(threshold):
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    rule = a_rule(1, 0.0, thresholds=(threshold,))
    hidden, residual = random(40, 64), random(40, 64, seed=1)
    margin, *_ = checkpoint_kernels.checkpoint(DeviceProbe.make(probe), hidden, residual, None, None, rule, 0, 1)
    assert torch.equal(margin.isinf(), probe(hidden + residual) < threshold)


def test_the_bins_are_the_rust_histograms():
    risks = torch.cat([torch.rand(500) * 3, torch.tensor([0.0, 2.0**-30, 2.0**-24, 1.0, 2.0**23, 2.0**30])])
    histogram = RiskHistogram()
    histogram.add(risks.numpy())
    again = RiskHistogram()
    again.add(checkpoint_parts.bin_centres()[checkpoint_parts.histogram_bins(risks)].numpy())
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert again.quantile(share) == histogram.quantile(share)


def test_a_large_step_of_many_blocks_is_compacted_in_order_and_blocks_that_exited_are_left_out():
    tokens, early = 8300, 200  # more blocks than a program adds up at once, three of which nobody reaches again
    probes = [LREProbe(16, 5).to(DEVICE).requires_grad_(False) for _ in range(2)]
    hidden, residual = random(tokens, 16), random(tokens, 16, seed=1)
    chosen = torch.ones(tokens, dtype=torch.int32, device=DEVICE)  # off
    chosen[:early] = 2
    found, wanted = (a_rule(thresholds=(float("inf"), 0.6)) for _ in range(2))
    left = right = None
    for index, probe in enumerate(probes):
        left, rows, n, running = checkpoint_kernels.checkpoint(
            DeviceProbe.make(probe), hidden, residual, left, None, found, index, 1, chosen
        )
        right, *_ = checkpoint_kernels.checkpoint_twin(probe, hidden, residual, right, None, wanted, index, 1, chosen)
        assert n.item() == tokens - early and left[:early].isinf().all()
        assert torch.equal(running.nonzero()[:, 0], rows[: tokens - early])
        assert torch.equal(rows[: tokens - early], torch.arange(early, tokens, device=DEVICE))
        assert torch.equal(rows.sort().values, torch.arange(tokens, device=DEVICE))
        assert torch.allclose(left, right, atol=1e-5)
    assert torch.equal(found.counters, wanted.counters)
    assert torch.allclose(found.risk_sums, wanted.risk_sums)


@pytest.mark.parametrize("tokens", [200, 300, 600])
@pytest.mark.parametrize("padded", [0, 50])
def test_a_large_checkpoint_decides_and_counts_alike_step_after_step(tokens, padded):
    probes = [DeviceProbe.make(LREProbe(96, 5).to(DEVICE).requires_grad_(False)) for _ in range(2)]
    chosen, one, other = some_rows(tokens + 10).int() % 3, a_rule(), a_rule()
    large = [checkpoint_kernels.LargeCheckpoint(probe, other, index) for index, probe in enumerate(probes)]
    own = padding(tokens, padded)
    moved = torch.cat([own[:1], own])[1:]
    # Of fewer tokens `checkpoint` adds the first layer up by another kernel, on a GPU in another order.
    exact = DEVICE == "cpu" or tokens > checkpoint_kernels.SHARED_OUT
    for seed, slots in enumerate((own, own, moved, own)):  # launched directly but for the first and what is not aligned
        hidden, residual = random(tokens, 96, seed=seed), random(tokens, 96, seed=9)
        left = right = None
        for index, probe in enumerate(probes):
            rest = (slots, one, index, 0, chosen, "dense")
            left, *_, runs = checkpoint_kernels.checkpoint(probe, hidden, residual, left, *rest)
            right, *_, also = large[index](hidden, residual, right, slots, chosen)
            assert torch.equal(runs, also) and runs.any() and not runs.all()
            assert torch.equal(left, right) if exact else torch.allclose(left, right, atol=1e-5)
    assert torch.equal(one.counters, other.counters) and one.counters[step_counters.STEPS] == 4
    assert torch.allclose(one.risk_sums, other.risk_sums)
    near = (one.histogram.cumsum(1) - other.histogram.cumsum(1)).abs()
    assert near.max() <= (0 if exact else 1)
    assert DEVICE == "cpu" or all(checkpoint.compiled is not None for checkpoint in large)
