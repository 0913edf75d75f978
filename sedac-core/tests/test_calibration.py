"""Thresholds that meet exit rates, and certificates that hold."""

import numpy as np
import pytest

from sedac_core import _rust, calibration
from sedac_core.calibration import certificate_held, certify, rate_interval, thresholds_for_rates
from sedac_core.cascade import decide


def some_risks(tokens=10_000):
    rng = np.random.default_rng(0)
    return (rng.gamma(1.5, 1, tokens) * rng.lognormal(0, 0.4, (3, tokens))).astype(np.float32)


@pytest.mark.parametrize("gamma, level", [(0.0, 0.5), (0.5, 0.5), (0.7, 0.6), (1.0, 0.3)])
def test_thresholds_meet_the_exit_rates_to_a_token(gamma, level):
    risks = some_risks()
    thresholds = thresholds_for_rates(risks, [0.2, 0.6, 0.9], gamma, None, level)
    assert decide(risks, thresholds, gamma, None, level).exit_rates().tolist() == pytest.approx(
        [0.2, 0.6, 0.9], abs=2e-4
    )


def test_rates_that_do_not_rise_give_zero_and_a_rate_of_one_infinity():
    assert thresholds_for_rates(some_risks(), [0, 0, 1]) == [0, 0, float("inf")]
    middle = thresholds_for_rates(some_risks(), [0.5, 0.5, 0.7])
    assert middle[1] == 0 and middle[2] > 0


def test_tied_risks_exit_together_whichever_is_nearer_to_the_rate():
    risks = np.float32([[1, 2, 2, 2, 2, 3, 3, 3, 3, 3]])
    assert decide(risks, thresholds_for_rates(risks, [0.4])).exit_rates().item() == 0.5
    assert decide(risks, thresholds_for_rates(risks, [0.2])).exit_rates().item() == 0.1


def test_risks_that_are_no_numbers_never_exit_but_count_as_tokens():
    risks = some_risks(1000)
    risks[:, ::2] = np.nan
    thresholds = thresholds_for_rates(risks, [0.2, 0.4, 0.9])
    assert decide(risks, thresholds).exit_rates().tolist() == pytest.approx([0.2, 0.4, 0.5], abs=2e-3)


def test_the_controller_comes_to_the_offline_thresholds():
    risks = some_risks(4000)
    exact = thresholds_for_rates(risks, [0.2, 0.6, 0.9])
    controller = _rust.ThresholdController([0.2, 0.6, 0.9], 1.0, 100_000, [1, 1, 1])
    running = np.ones(4000, bool)
    for i, threshold in enumerate(exact):
        controller.observe(i, risks[i, running])
        running &= ~(risks[i] < threshold)
    controller.update()
    assert controller.thresholds() == pytest.approx(exact, rel=0.01)


def test_bad_rates_and_shapes_are_refused():
    for rates in ([0.2, 0.1, 0.9], [0.2, 0.6], [0.2, 0.6, 1.1]):
        with pytest.raises(ValueError, match="exit_rates must be 3 shares"):
            thresholds_for_rates(some_risks(10), rates)
    with pytest.raises(ValueError, match="at least one token"):
        thresholds_for_rates(np.zeros((3, 0), np.float32), [0.2, 0.6, 0.9])


def test_a_rate_interval_holds_the_rate_and_narrows_with_tokens():
    low, high = rate_interval(300, 1000)
    assert 0.27 < low < 0.3 < high < 0.33
    assert rate_interval(0, 0) == (0, 1) and rate_interval(0, 10)[0] == 0
    with pytest.raises(ValueError, match="11 of 10"):
        rate_interval(11, 10)


def test_rust_and_scipy_certify_alike():
    rng = np.random.default_rng(0)
    for samples, tolerated, delta in ((10, 0.5, 0.3), (100, 0.1, 0.1), (5000, 0.05, 0.1), (1_000_000, 0.2, 0.01)):
        means = np.sort(rng.integers(0, samples + 1, (7, 9)) / samples * 2 * tolerated, axis=1).clip(0, 1)
        certified, p = _rust.certify(means, samples, tolerated, delta)
        twin_certified, twin_p = certify(means, samples, tolerated, delta)
        assert np.array_equal(certified, twin_certified)
        assert p == pytest.approx(twin_p, rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("chains", [1, 5])
def test_the_certified_bound_is_broken_in_at_most_delta_of_two_thousand_draws(chains):
    """chains = 1: fixed-sequence testing of five settings; chains = 5: Bonferroni."""
    rng = np.random.default_rng(1)
    tolerated, delta, samples = 0.1, 0.1, 300
    true = np.float64([0.03, 0.06, 0.1001, 0.1001, 0.15])  # the last three break the bound, two of them barely
    broken = useful = 0
    for _ in range(2000):
        means = rng.binomial(samples, true) / samples
        certified, _ = _rust.certify(means.reshape(chains, -1), samples, tolerated, delta)
        broken += certified.ravel()[2:].any()
        useful += certified.ravel()[0]
    assert broken <= delta * 2000 and useful > 1500


def losses_of_known_mean(documents=400, seed=0) -> np.ndarray:
    """Ten settings whose true mean losses rise evenly from 0.02 to 0.2, each document easier or harder in all of them."""
    rng = np.random.default_rng(seed)
    true = np.linspace(0.02, 0.2, 10)
    hardness = rng.gamma(2, 0.5, documents)  # mean 1
    return np.minimum(rng.beta(1, 4, (10, documents)) * 5 * true[:, None] * hardness, 1)


def test_certificates_hold_on_the_other_half_and_a_rule_without_a_margin_does_not(monkeypatch):
    held, found = zip(*(certificate_held(losses_of_known_mean(seed=seed), 0.1, 0.05) for seed in range(5)), strict=True)
    assert min(held) >= 0.95 and min(found) > 0.95

    def without_margin(means, samples, tolerated, delta):
        return means <= tolerated, None

    monkeypatch.setattr(calibration, "certify", without_margin)
    # The true means nearest to the bound, 0.1, are 0.08 and 0.12: put the bound on one of them.
    losses = losses_of_known_mean()
    assert certificate_held(losses, float(losses[4].mean()), 0.05)[0] < 0.8


def test_what_cannot_be_certified_is_promised_to_nobody_and_few_documents_are_refused():
    assert certificate_held(losses_of_known_mean(), 0.01, 0.05) == (1.0, 0.0)
    with pytest.raises(ValueError, match="on 3 documents"):
        certificate_held(np.zeros((2, 3)), 0.1, 0.05)
