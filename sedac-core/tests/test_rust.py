"""The Rust core and its readable twins decide alike, bit for bit, and its border refuses what it cannot use."""

import itertools
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sedac_core import _rust
from sedac_core.cascade import decide

AWKWARD = [0.0, -0.0, 1.0, 0.8, 1e-45, 1e-40, 3.4e38, float("inf"), float("-inf"), float("nan"), -1.0]
RISK = st.one_of(st.floats(0, 3, width=32), st.sampled_from(AWKWARD), st.floats(width=32))
THRESHOLD = st.one_of(st.floats(0, 3, width=32), st.sampled_from([0.0, 0.8, 1.0, 1e-45, 3.4e38, float("inf")]))


@st.composite
def cases(draw):
    checkpoints, tokens = draw(st.integers(0, 4)), draw(st.sampled_from([0, 1, 2, 7, 33]))
    risks = draw(arrays.arrays(np.float32, (checkpoints, tokens), elements=RISK))
    thresholds = draw(st.lists(THRESHOLD, min_size=checkpoints, max_size=checkpoints))
    weight = st.floats(0.125, 4, width=32)
    weights = draw(st.lists(weight, min_size=checkpoints, max_size=checkpoints))
    gamma = draw(st.one_of(st.just(0.0), st.floats(0, 1.5, width=32)))
    level = draw(st.one_of(st.just(0.5), st.floats(0.015625, 0.984375, width=32)))
    return risks, thresholds, weights, gamma, level


def bits(values):
    return np.asarray(values, np.float32).view(np.int32)


def unusable(risks):
    return int((~(risks >= 0) | np.isinf(risks)).sum())


@settings(max_examples=300, deadline=None)
@given(cases())
def test_rust_and_torch_decide_alike_bit_for_bit(case):
    risks, thresholds, weights, gamma, level = case
    twin = decide(risks, thresholds, gamma, weights, level)
    exits, confidence, width, odd = _rust.evaluate_soft(risks, thresholds, weights, gamma, level)
    assert np.array_equal(exits, twin.exit_checkpoint)
    assert np.array_equal(bits(confidence), bits(twin.confidence))
    assert np.array_equal(bits(width), bits(twin.width))
    assert odd == unusable(risks)
    for plain, soft in zip(_rust.evaluate(risks, thresholds, weights, gamma, level), (exits, confidence), strict=True):
        assert np.array_equal(plain.view(np.int32), soft.view(np.int32))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_half_precision_and_strided_risks_decide_like_their_float32_copy(case):
    risks, *rest = case
    with np.errstate(over="ignore"):
        half = risks.astype(np.float16)
    brain = torch.from_numpy(risks).bfloat16()
    strided = np.repeat(risks, 2, axis=1)[:, ::2]
    for given_risks, same in (
        (half, half.astype(np.float32)),
        (brain.view(torch.uint16).numpy(), brain.float().numpy()),
        (strided, risks),
        (np.asfortranarray(risks), risks),
    ):
        for fast, slow in zip(
            _rust.evaluate(given_risks, *rest[:2], *rest[2:]), _rust.evaluate(same, *rest), strict=True
        ):
            assert np.array_equal(fast.view(np.int32), slow.view(np.int32))


def test_a_batch_is_decided_into_arrays_that_are_given():
    risks = np.random.default_rng(0).gamma(1, 1, (3, 300_001)).astype(np.float32)
    exits, confidence = np.full(300_001, 9, np.int32), np.full(300_001, 9, np.float32)
    given_back = _rust.evaluate(risks, [0.3, 0.5, 0.8], None, 0.5, out=(exits, confidence))
    assert given_back[0] is exits and given_back[1] is confidence
    twin = decide(risks, [0.3, 0.5, 0.8], 0.5)
    assert np.array_equal(exits, twin.exit_checkpoint) and np.array_equal(bits(confidence), bits(twin.confidence))


@pytest.mark.parametrize(
    "exits, confidence, error, message",
    [
        (np.zeros(3, np.int32), np.zeros(2, np.float32), ValueError, r"confidence must have shape \[3\], found \[2\]"),
        (np.zeros(4, np.int32), np.zeros(3, np.float32), ValueError, r"exit_checkpoint must have shape \[3\]"),
        (np.zeros(6, np.int32)[::2], np.zeros(3, np.float32), ValueError, "out must be contiguous"),
        (np.zeros(3, np.int32), np.broadcast_to(np.float32(0), 3), ValueError, "out must be .* that can be written"),
        (np.zeros(3, np.int64), np.zeros(3, np.float32), ValueError, r"must be int32 .*found int64 \[3\]"),
    ],
)
def test_arrays_that_decisions_cannot_be_written_into_are_refused(exits, confidence, error, message):
    risks = np.ones((1, 3), np.float32)
    with pytest.raises(error, match=message):
        _rust.evaluate(risks, [0.5], out=(exits, confidence))
    with pytest.raises(ValueError, match="apart from the risks"):
        _rust.evaluate(risks, [0.5], out=(np.zeros(3, np.int32), risks[0]))


@given(RISK, THRESHOLD)
def test_without_memory_the_rule_is_risk_under_threshold(risk, threshold):
    exits, _ = _rust.evaluate(np.float32([[risk]]), [threshold])
    assert (exits[0] == 0) == (0 <= risk < threshold and risk != float("inf"))


def test_a_sweep_gives_what_its_settings_give_one_by_one():
    rng = np.random.default_rng(0)
    for checkpoints, tokens in ((3, 5000), (1, 3000), (2, 1), (4, 0)):
        risks = rng.gamma(1, 1, (checkpoints, tokens)).astype(np.float32)
        risks[:, ::97], risks[:1, ::53], risks[:, ::71] = np.nan, -0.0, np.inf
        target = rng.random((checkpoints, tokens), np.float32)
        thresholds = rng.gamma(1, 0.5, (6, checkpoints)).astype(np.float32)
        thresholds[3], thresholds[4], thresholds[5] = thresholds[2], 0, np.inf
        gammas, levels, skipped = [0, 0.5, 1.2], [0.3, 0.5, 0.7], np.float64([0.9, 0.5, 0.2, 0.1])[:checkpoints]
        rates, saved, mean = _rust.sweep(risks, thresholds, gammas, levels, None, target, skipped.tolist())
        for i, j, k in itertools.product(range(6), range(3), range(3)):
            decision = decide(risks, thresholds[i], gammas[j], None, levels[k])
            assert np.array_equal(rates[i, j, k], decision.exit_rates())
            exits = decision.exit_checkpoint.numpy()
            exited = exits < checkpoints
            if exited.any():
                assert saved[i, j, k] == pytest.approx(skipped[exits[exited]].sum() / tokens)
                assert mean[i, j, k] == pytest.approx(target[exits[exited], np.flatnonzero(exited)].mean(), rel=1e-5)
            else:
                assert saved[i, j, k] == 0 and np.isnan(mean[i, j, k])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((2, 3), np.float32), [1.0]), r"thresholds must have shape \[2\], found \[1\]"),
        ((np.zeros((1, 3), np.float32), [1.0], [1.0, 2.0]), r"weights must have shape \[1\], found \[2\]"),
        ((np.zeros((1, 3), np.float32), [float("nan")]), "thresholds must be from 0 to infinity, found NaN"),
        ((np.zeros((1, 3), np.float32), [1.0], None, -1.0), "gamma must be from 0 on"),
        ((np.zeros((1, 3), np.float32), [1.0], None, 0.0, 1.0), "level must be between 0 and 1"),
        ((np.zeros(3, np.float32), [1.0]), r"risks must be float32, float16 or uint16 .* found float32 \[3\]"),
        ((np.zeros((1, 3)), [1.0]), r"risks must be float32, float16 or uint16 .* found float64 \[1, 3\]"),
    ],
)
def test_what_does_not_fit_is_a_value_error_with_what_was_found(arguments, message):
    with pytest.raises(ValueError, match=message):
        _rust.evaluate(*arguments)


def test_the_border_refuses_or_answers_rightly_whatever_it_is_given():
    fuzzer = [sys.executable, Path(__file__).with_name("fuzz_border.py"), "--calls", "4000", "--seconds", "120"]
    done = subprocess.run(fuzzer, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_other_python_threads_run_while_the_core_works():
    risks = np.random.default_rng(0).gamma(1, 1, (3, 500_000)).astype(np.float32)
    grid = np.random.default_rng(1).gamma(1, 1, (400, 3)).astype(np.float32)
    columns = np.ascontiguousarray(np.tile(risks, 8).T).T  # strided: some 10 ms
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread is made to let others run: the core does it, or nobody
    try:
        for call in (lambda: _rust.sweep(risks, grid, [0.5], [0.5]), lambda: _rust.evaluate(columns, [0.3, 0.5, 0.8])):
            turns, seen = [0], []

            def work(call=call, turns=turns, seen=seen):
                seen.append(turns[0])
                call()
                seen.append(turns[0])

            worker = threading.Thread(target=work)
            worker.start()
            while worker.is_alive():
                turns[0] += 1
                time.sleep(0)
            assert seen[1] > seen[0] + 5
    finally:
        sys.setswitchinterval(before)


def test_arrays_that_are_not_aligned_are_refused():
    record = np.zeros((1, 4), [("pad", "u1"), ("risk", "f4")])
    with pytest.raises(ValueError, match=r"found unaligned float32 \[1, 4\]"):
        _rust.evaluate(record["risk"], [1.0])


def test_histograms_merge_and_their_quantiles_keep_to_the_stated_error():
    risks = np.random.default_rng(0).lognormal(0, 3, 50_000).astype(np.float32)
    whole, first, second = _rust.RiskHistogram(), _rust.RiskHistogram(), _rust.RiskHistogram()
    whole.add(risks)
    first.add(risks[:20_000])
    second.add(risks[20_000:])
    first.merge(second)
    for share in (0.001, 0.2, 0.5, 0.9, 0.9999):
        exact = np.sort(risks)[math.ceil(share * len(risks)) - 1]
        assert whole.quantile(share) == pytest.approx(exact, rel=_rust.RiskHistogram.RELATIVE_ERROR)
        assert first.quantile(share) == whole.quantile(share)
    whole.add(np.float32([np.nan, -1, np.inf]))
    assert (whole.total, whole.unusable) == (50_003, 2)
    whole.merge(whole)
    assert whole.total == 100_006


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_adaptive_thresholds_hold_their_rates_over_ten_thousand_small_batches_without_drift(gamma):
    rng = np.random.default_rng(0)
    targets, sizes = [0.2, 0.6, 0.9], rng.integers(1, 9, 10_000)
    difficulty = rng.gamma(1.5, 1, sizes.sum())
    risks = (difficulty * rng.lognormal(0, 0.4, (3, sizes.sum()))).astype(np.float32)
    controller = _rust.ThresholdController(targets, 0.2, 8192, [0.8, 1.3, 1.7])
    exited = np.zeros((2, 3))
    at = 0
    for step, size in enumerate(sizes):
        batch = risks[:, at : at + size]
        at += size
        margin, running = np.zeros(size), np.ones(size, bool)
        for i, threshold in enumerate(controller.thresholds()):
            behind = -gamma * margin
            with np.errstate(all="ignore"):
                critical = np.where(behind < 0.5, batch[i] * (0.5 + behind) / (0.5 - behind), np.inf)
            controller.observe(i, critical[running].astype(np.float32))
            q = batch[i] / threshold
            margin = gamma * margin + (0.5 - 0.5 * q) / (1 + q)
            running &= ~(margin > 0)
            exited[step // 5_000, i] += (~running).sum()
        controller.update()
    halves = exited / [[sizes[:5_000].sum()], [sizes[5_000:].sum()]]
    assert np.abs(halves - targets).max() < 0.02
    assert controller.tokens(0) == sizes.sum() and controller.unusable(0) == 0


def test_thresholds_published_by_hand_are_read_at_once_and_whole_from_other_threads():
    controller = _rust.ThresholdController([0.2, 0.6, 0.9], 0.2, 100, [1, 1, 1])
    torn, done = [], threading.Event()

    def read():
        while not done.is_set():
            values = controller.thresholds()
            if len(set(values)) != 1:
                torn.append(values)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for value in range(2000):
        controller.publish([value] * 3)
    done.set()
    for reader in readers:
        reader.join()
    assert not torn and controller.thresholds() == [1999.0] * 3
