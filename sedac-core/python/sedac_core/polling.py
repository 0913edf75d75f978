"""The host's half of the GPU runtime: what happens beside the decode steps, never in them.

Counters and risk histograms are device buffers that the kernels add to. A thread copies them to the host on a stream of
its own and looks only at what the copy before brought, so it waits for nothing and no decode step waits for it.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from . import checkpoint_kernels, gate_kernels
from .checkpoint_kernels import BY_CHECKPOINT, ROWS_SAVED, STEPS, TOKENS

POLL_SECONDS = 0.1


def poll(reference: weakref.ref) -> None:
    """The thread beside the worker: counters and histograms to the host, adaptive thresholds back, ten times a second.

    No event is recorded or waited for (while another thread captures a graph that would break the capture): a copy is
    read at the next turn, when it is long done.
    """
    runtime = reference()
    rule = runtime.rule
    stream = torch.cuda.Stream(rule.counters.device)
    counters = torch.zeros_like(rule.counters, device="cpu").pin_memory()
    histogram = None if rule.histogram is None else torch.zeros_like(rule.histogram, device="cpu").pin_memory()
    thresholds = torch.zeros_like(rule.thresholds, device="cpu").pin_memory()
    before = Seen(counters.clone(), None if histogram is None else histogram.clone())
    pause = threading.Event()
    del runtime
    while not pause.wait(POLL_SECONDS):
        runtime = reference()
        if runtime is None:
            return
        changed = before.advance(runtime, counters, histogram)
        with torch.cuda.stream(stream):
            with runtime.lock:  # an admin call may switch SEDAC off, and that must last
                if changed and runtime.controller is not None and runtime.enabled:
                    thresholds.copy_(torch.tensor(runtime.controller.thresholds()))
                    rule.thresholds.copy_(thresholds, non_blocking=True)
                    if not runtime.watching:
                        rule.taken.fill_(1)
            counters.copy_(rule.counters, non_blocking=True)
            if histogram is not None:
                histogram.copy_(rule.histogram, non_blocking=True)
        del runtime


class Seen:
    """What the host knows of the device's counters: the last copy it has passed on."""

    def __init__(self, counters: Tensor, histogram: Tensor | None):
        self.counters, self.histogram = counters, histogram

    def advance(self, runtime: Any, counters: Tensor, histogram: Tensor | None) -> bool:
        """Pass on what is new since the last copy, to the counters and the controller; False if nothing is."""
        now = counters.clone()
        delta = (now - self.counters).tolist()
        if not delta[STEPS]:
            return False
        self.counters = now
        if runtime.controller is not None:
            bins = histogram.clone()
            for index, row in enumerate(bins - self.histogram):
                critical = checkpoint_kernels.bin_centres().repeat_interleave(row.clamp(min=0).long())
                runtime.controller.observe(index, critical.numpy())
            self.histogram = bins
            runtime.controller.update()
        steps = runtime.counters.steps
        runtime.counters.add(
            delta[STEPS],
            delta[TOKENS],
            delta[TOKENS] * runtime.policy.num_layers - delta[ROWS_SAVED],
            delta[BY_CHECKPOINT::2],
            delta[BY_CHECKPOINT + 1 :: 2],
        )
        in_force = runtime.controller.thresholds() if runtime.controller else runtime.policy.thresholds.tolist()
        runtime.report(in_force, steps)
        return True


def poll_levels(reference: weakref.ref) -> None:
    """The same for gates: counters to the host, the price in force for the log."""
    runtime = reference()
    stream = torch.cuda.Stream(runtime.counted.device)
    counted = torch.zeros_like(runtime.counted, device="cpu").pin_memory()
    price = torch.zeros_like(runtime.policy.log_lambda, device="cpu").pin_memory()
    before = SeenLevels(counted)
    pause = threading.Event()
    del runtime
    while not pause.wait(POLL_SECONDS):
        runtime = reference()
        if runtime is None:
            return
        before.advance(runtime, counted, price)
        with torch.cuda.stream(stream):
            counted.copy_(runtime.counted, non_blocking=True)
            price.copy_(runtime.policy.log_lambda, non_blocking=True)
        del runtime


class SeenLevels:
    """What the host knows of the device's counters of gates."""

    def __init__(self, counted: Tensor):
        self.counted = counted.clone()

    def advance(self, runtime: Any, counted: Tensor, price: Tensor) -> None:
        """Pass on what is new since the last copy."""
        now = counted.clone()
        delta = (now - self.counted).tolist()
        if not delta[gate_kernels.STEPS]:
            return
        self.counted = now
        counters, steps = runtime.counters, runtime.counters.steps
        counters.add(delta[gate_kernels.TOKENS], delta[gate_kernels.BY_LEVEL :], delta[gate_kernels.STEPS])
        runtime.report(price.item(), steps)
