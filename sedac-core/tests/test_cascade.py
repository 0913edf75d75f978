"""The decision rule: V6.0's comparison, accumulated confidence, and each token by itself."""

import math

import numpy as np
import pytest
import torch

from sedac_core.cascade import critical_threshold, decide, margin_step

RISKS = torch.tensor([[0.5, 1.0, float("nan"), 2.0, -1.0, 0.0], [0.1, 0.9, 1.0, float("inf"), 0.5, 0.0]])


def test_by_default_a_token_exits_where_its_risk_is_first_under_the_threshold():
    decision = decide(RISKS, [0.8, 1.3])
    assert decision.exit_checkpoint.tolist() == [0, 1, 1, 2, 1, 0]
    assert decision.exit_rates().tolist() == pytest.approx([2 / 6, 5 / 6])


def test_a_risk_equal_to_the_threshold_does_not_exit():
    assert decide([[0.8]] * 1, [0.8]).exit_checkpoint.tolist() == [1]
    assert decide([[np.nextafter(np.float32(0.8), np.float32(0))]], [0.8]).exit_checkpoint.tolist() == [0]


def test_an_infinite_threshold_exits_every_finite_risk_and_zero_none():
    assert decide(RISKS[:1], [float("inf")]).exit_checkpoint.tolist() == [0, 0, 1, 0, 1, 0]
    assert decide(RISKS[:1], [0.0]).exit_checkpoint.tolist() == [1] * 6


def test_with_memory_two_near_misses_and_good_evidence_add_up():
    near = torch.tensor([[0.81], [0.79], [2.0]])
    assert decide(near, [0.8] * 3).exit_checkpoint.item() == 1
    late = torch.tensor([[2.0], [0.79]])  # a bad first impression counts against the token
    assert decide(late, [0.8] * 2).exit_checkpoint.item() == 1
    assert decide(late, [0.8] * 2, gamma=0.9).exit_checkpoint.item() == 2


def test_confidence_is_threshold_over_threshold_plus_risk_and_accumulates():
    decision = decide(torch.tensor([[2.0], [3.0]]), [1.0, 1.0], gamma=0.5, weights=[1.0, 2.0])
    assert decision.confidence.item() == pytest.approx(0.5 * (1 / 3) + 2 * (1 / 4))


def test_soft_width_falls_from_one_at_the_exit_level_to_zero_at_full_confidence():
    width = decide([[0.0, 0.4, 0.7999, 5.0]], [0.8]).width.tolist()
    assert width[0] == 0 and width[0] < width[1] < width[2] <= 1 and width[3] == 1


def test_a_token_decides_as_when_it_is_alone():
    risks = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) * 2
    together = decide(risks, [0.4, 0.6, 0.9], gamma=0.7, level=0.55)
    alone = [decide(risks[:, i : i + 1], [0.4, 0.6, 0.9], gamma=0.7, level=0.55) for i in range(50)]
    assert together.exit_checkpoint.tolist() == [one.exit_checkpoint.item() for one in alone]
    assert together.confidence.tolist() == [one.confidence.item() for one in alone]


@pytest.mark.parametrize("gamma, level", [(0.0, 0.5), (0.0, 0.7), (0.6, 0.5), (1.0, 0.3)])
def test_a_running_token_exits_just_over_its_critical_threshold(gamma, level):
    generator = torch.Generator().manual_seed(0)
    risk, margin = torch.rand(2000, generator=generator) * 3, -level * torch.rand(2000, generator=generator)
    critical = critical_threshold(risk, margin, gamma, 1.5, level)
    reachable = critical < float("inf")
    assert reachable.any()
    over = margin_step(risk, critical * 1.001, margin, gamma, 1.5, level) > 0
    under = margin_step(risk, critical * 0.999, margin, gamma, 1.5, level) > 0
    assert over[reachable].all() and not under.any()
    assert not (margin_step(risk, torch.tensor(float("inf")), margin, gamma, 1.5, level) > 0)[~reachable].any()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"thresholds must be \[2\].*found \(1,\)"):
        decide(RISKS, [0.8])
    with pytest.raises(ValueError, match=r"risks must be \[checkpoints, tokens\], found shape \(6,\)"):
        decide(RISKS[0], [0.8])
    assert decide(torch.zeros(3, 0), [1, 1, 1]).exit_rates().tolist() == [0, 0, 0]


def test_each_row_of_a_policys_table_decides_as_a_policy_of_its_own():
    from sedac_core.policy import HardExit
    from sedac_core.probe import LREProbe

    torch.manual_seed(0)
    probes = tuple(LREProbe(32, 8).requires_grad_(False) for _ in range(2))
    rows = {"off": (0.0, 0.0), "some": (0.7, 0.7), "all": (math.inf, math.inf)}

    def exits(thresholds, chosen=None, choices=None):
        policy = HardExit(
            (1, 3), probes, torch.tensor(thresholds), 0.5, (1.0, 2.0), 0.5, 1, 6, "manifest", choices or {}
        )
        own = (None, None) if chosen is None else policy.table[chosen].unbind(1)
        _, first = policy.step(0, streams[0], None, own[0])
        return policy.step(1, streams[1], first.margin, own[1])[1].margin

    streams = torch.randn(2, 400, 32)
    chosen = torch.randint(4, (400,))
    together = exits((0.72, 0.69), chosen, rows)
    alone = torch.stack([exits((0.72, 0.69)), *(exits(row) for row in rows.values())])
    assert torch.equal(together, alone.gather(0, chosen[None])[0])
    gone = [together[chosen == row].isinf().float().mean() for row in range(4)]
    assert gone[1] == 0 and gone[3] == 1 and 0 < gone[0] < 1 and 0 < gone[2] < 1
