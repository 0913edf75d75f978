"""The host's half of the GPU runtime, on device buffers that happen to lie on the CPU: what the poll makes of them."""

from types import SimpleNamespace

import pytest
import torch

from sedac_core import checkpoint_kernels, gate_kernels
from sedac_core._rust import ThresholdController
from sedac_core.gates import Gate, GateShape
from sedac_core.metrics import Counters, GateCounters
from sedac_core.polling import Seen, SeenLevels
from sedac_core.probe import LREProbe


class Stub(SimpleNamespace):
    """What a poll sees of a runtime that only watches for two steps."""

    @property
    def watching(self) -> bool:
        return self.counters.steps < 2


@pytest.fixture
def runtime():
    """A runtime of one checkpoint after layer 2 of 8, adaptive to 40 %, without a model."""
    return Stub(
        counters=Counters((2,), 8),
        policy=SimpleNamespace(num_layers=8),
        controller=ThresholdController([0.4], 1.0, 8192, [0.0]),
        report=lambda thresholds, steps: None,
    )


def test_polls_pass_on_what_is_new_and_steer_the_thresholds(runtime):
    torch.manual_seed(0)
    probe = LREProbe(64, 16).requires_grad_(False)
    probe.head.weight.mul_(8)
    rule = checkpoint_kernels.Rule.make(torch.zeros(1), [1.0], 0.0, 0.5, adaptive=True)
    rule.taken.zero_()
    seen = Seen(rule.counters.clone(), rule.histogram.clone())
    assert not seen.advance(runtime, rule.counters, rule.histogram)
    exited = 0
    for step in range(12):
        hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(step))
        margin, _, n_running = checkpoint_kernels.checkpoint_twin(
            probe, hidden, torch.zeros(200, 64), None, None, rule, 0, 5
        )
        assert seen.advance(runtime, rule.counters, rule.histogram)
        rule.thresholds.copy_(torch.tensor(runtime.controller.thresholds()))
        rule.taken.fill_(int(not runtime.watching))
        if step >= 2:
            exited += int(margin.isinf().sum())
        assert int(n_running) == (200 if step < 2 else int((~margin.isinf()).sum()))
    counters = runtime.counters
    assert (counters.steps, counters.tokens, counters.exits) == (12, 2400, [exited])
    assert counters.rows_computed == 2400 * 8 - exited * 5
    assert exited / 2000 == pytest.approx(0.4, abs=0.03)
    assert not seen.advance(runtime, rule.counters, rule.histogram)


def test_polls_pass_on_the_levels_of_gates():
    torch.manual_seed(0)
    shape, logged = GateShape(64, 128, 3, (1.0, 0.5, 0.0), 4), []
    counters = GateCounters(shape, 3 * 64 * 128 * 2)
    runtime = SimpleNamespace(counters=counters, report=lambda price, steps: logged.append((price, steps)))
    gates = [
        gate_kernels.DeviceGate.make(Gate(64, 2), gain, 1, leader == 0, torch.empty(0))
        for leader, gain in shape.gains().items()
    ]
    counted, price = gate_kernels.new_counters(3, torch.device("cpu")), torch.tensor(0.5)
    seen = SeenLevels(counted)
    seen.advance(runtime, counted, price)
    assert counters.steps == 0 and not logged
    for steps in (1, 2):
        for _ in range(steps):
            for gate in gates:
                gate_kernels.levels_twin(torch.randn(20, 64), gate, price, None, counted)
        seen.advance(runtime, counted, price)
    assert (counters.steps, counters.tokens, sum(counters.levels)) == (3, 60, 180)
    assert counters.levels == counted[2:].tolist() and logged == [(0.5, 0), (0.5, 1)]
