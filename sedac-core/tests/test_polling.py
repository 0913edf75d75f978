"""The host's half of the GPU runtime, on device buffers that happen to lie on the CPU: what the poll makes of them."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from sedac_core import checkpoint_kernels, checkpoint_parts, gate_kernels, gate_parts, metrics, step_counters
from sedac_core._rust import ThresholdController
from sedac_core.gates import Gate, GateShape
from sedac_core.metrics import Counters, GateCounters
from sedac_core.polling import Seen, SeenLevels
from sedac_core.probe import LREProbe


class Stub(SimpleNamespace):
    """What a poll sees of a runtime of one checkpoint after layer 2 of 8, adaptive to 40 %, without a model."""

    enabled = True

    @property
    def watching(self) -> bool:
        return self.counters.steps < 2

    @property
    def phase(self) -> int:
        return step_counters.OBSERVING if self.watching else step_counters.TAKEN

    @property
    def calibration(self) -> str:
        return "observing" if self.watching else "adaptive"

    def steer(self) -> None:
        self.controller.update()


@pytest.fixture
def runtime():
    table = torch.zeros(3, 1)  # in force, off, and a preset under which all exit
    table[2] = torch.inf
    return Stub(
        counters=Counters((2,), 8),
        policy=SimpleNamespace(num_layers=8, thresholds=table[0]),
        controller=ThresholdController([0.4], 1.0, 8192, [0.0]),
        rule=checkpoint_parts.Rule.make(table, [1.0], 0.0, 0.5, adaptive=True),
        why_dense=None,
        pick=SimpleNamespace(ran=lambda shares: None),
        lock=threading.Lock(),
        report=lambda thresholds, steps: None,
    )


def test_the_polling_thread_has_ended_before_the_interpreter_does():
    script = """
import time
from sedac_core import polling
def poll(reference, watch, over):
    over.wait()
    time.sleep(0.2)
    print("ended", flush=True)
polling.poll = poll
polling.start(polling.Seen, None)
print("main is done", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")) == (0, ["main is done", "ended", ""]), done.stderr


def value(metric, **labels) -> float:
    return metric.labels(**labels)._value.get()


def risks_of(layer: int) -> tuple[list[float], float]:
    histogram = metrics.RISK.labels(checkpoint=layer)
    return [bucket.get() for bucket in histogram._buckets], histogram._sum.get()


def test_polls_pass_on_what_is_new_and_steer_the_thresholds(runtime):
    torch.manual_seed(0)
    probe = LREProbe(64, 16).requires_grad_(False)
    probe.head.weight.mul_(8)
    rule, seen = runtime.rule, Seen(runtime)
    rule.taken.fill_(step_counters.OBSERVING)
    assert not seen.advance(runtime, *seen.buffers)
    observing = value(metrics.FALLBACKS, reason="observing")
    buckets, total = risks_of(2)
    exited, risks = 0, []
    for step in range(12):
        hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(step))
        margin, _, n_running, _ = checkpoint_kernels.checkpoint_twin(
            probe, hidden, torch.zeros(200, 64), None, None, rule, 0, 5
        )
        risks.append(probe(hidden))
        assert seen.advance(runtime, *seen.buffers)
        seen.steer(runtime)
        if step >= 2:
            exited += int(margin.isinf().sum())
        assert int(n_running) == (200 if step < 2 else int((~margin.isinf()).sum()))
    counters = runtime.counters
    assert (counters.steps, counters.tokens, counters.exits) == (12, 2400, [exited])
    assert counters.rows_computed == 2400 * 8 - exited * 5
    assert exited / 2000 == pytest.approx(0.4, abs=0.03)
    assert not seen.advance(runtime, *seen.buffers)
    assert value(metrics.FALLBACKS, reason="observing") == observing + 2 * 200 and runtime.counters._state == "adaptive"
    found, sum_found = risks_of(2)
    wanted = torch.bucketize(torch.cat(risks), torch.tensor(metrics.RISK_BUCKETS)).bincount(minlength=11)
    assert [after - before for after, before in zip(found, buckets, strict=True)] == wanted.tolist()
    assert sum_found - total == pytest.approx(float(torch.cat(risks).sum()), rel=1e-5)


def test_polls_tell_paths_and_why_tokens_saved_nothing_and_rates_are_for_those_who_did_not_choose(runtime):
    torch.manual_seed(0)
    probe, chosen = LREProbe(64, 16).requires_grad_(False), torch.arange(90).int() % 3
    seen = Seen(runtime)
    runtime.rule.table[0] = torch.inf
    runtime.why_dense = "weights are quantised (fp8)"
    paths = [value(metrics.PATHS, path=name) for name in step_counters.PATHS]
    reasons = ("request", runtime.why_dense)
    before = [value(metrics.FALLBACKS, reason=reason) for reason in reasons]
    for path in ("dense", "gather", "gather", "conditional"):
        hidden = torch.randn(90, 64)
        margin, *_ = checkpoint_kernels.checkpoint_twin(
            probe, hidden, hidden, None, None, runtime.rule, 0, 5, chosen, path
        )
        assert margin.isinf().tolist() == [row != 1 for row in chosen.tolist()], "who opted out never exits"
    seen.advance(runtime, *seen.buffers)
    now = [value(metrics.PATHS, path=name) for name in step_counters.PATHS]
    assert [b - a for a, b in zip(paths, now, strict=True)] == [0, 1, 1, 2]
    now = [value(metrics.FALLBACKS, reason=reason) for reason in reasons]
    assert [b - a for a, b in zip(before, now, strict=True)] == [4 * 30, 60]
    assert runtime.controller.tokens(0) == 4 * 30


def test_an_admin_call_that_ends_adaptive_mode_leaves_a_poll_nothing_to_steer(runtime):
    seen = Seen(runtime)
    checkpoint_kernels.checkpoint_twin(
        LREProbe(64, 16), torch.randn(9, 64), torch.zeros(9, 64), None, None, runtime.rule, 0, 5
    )
    runtime.controller, runtime.enabled = None, False
    assert seen.advance(runtime, *seen.buffers)
    before = runtime.rule.table.clone()
    seen.steer(runtime)
    assert torch.equal(runtime.rule.table, before) and runtime.rule.taken.item() == step_counters.TAKEN


def test_polls_pass_on_the_levels_of_gates():
    torch.manual_seed(0)
    shape, logged = GateShape(64, 128, 3, (1.0, 0.5, 0.0), 4), []
    counters, prices = GateCounters(shape, 3 * 64 * 128 * 2), torch.tensor([0.5, -torch.inf])
    counted, shares = torch.stack([step_counters.new_counters(3, torch.device("cpu"))] * 2), []
    runtime = SimpleNamespace(
        counters=counters,
        counted=counted,
        policy=SimpleNamespace(log_lambda=prices[0]),
        report=lambda price, steps: logged.append((price, steps)),
        ran=lambda tokens, rows: shares.append((tokens, rows)),
    )
    gates = [
        gate_parts.DeviceGate.make(Gate(64, 2), gain, 1, leader == 0, torch.empty(0))
        for leader, gain in shape.gains().items()
    ]
    seen = SeenLevels(runtime)
    before = value(metrics.PATHS, path="predicated"), value(metrics.FALLBACKS, reason="request")
    assert not seen.advance(runtime, *seen.buffers)
    assert counters.steps == 0 and not logged
    for steps in (1, 2):
        for _ in range(steps):
            for gate in gates:
                chosen = torch.arange(20).int() % 2
                gate_kernels.levels_twin(torch.randn(20, 64), gate, prices, None, counted[0], chosen)
        assert seen.advance(runtime, *seen.buffers)
    assert (counters.steps, counters.tokens, sum(counters.levels)) == (3, 60, 180)
    assert counters.levels == counted[0, step_counters.BY_LEVEL :].tolist() and logged == [(0.5, 0), (0.5, 1)]
    after = value(metrics.PATHS, path="predicated"), value(metrics.FALLBACKS, reason="request")
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 30]
    assert [tokens for tokens, _ in shares] == [20, 40]
    assert [sum(rows) for rows in zip(*(rows for _, rows in shares), strict=True)] == counters.levels
    everyone = torch.zeros(20, dtype=torch.int32)
    gate_kernels.levels_twin(torch.randn(20, 64), gates[0], prices, None, counted[1], everyone)
    assert seen.advance(runtime, *seen.buffers) and counters.tokens == 80
    assert len(shares) == 2, "steps that are not captured say nothing of those that are"
