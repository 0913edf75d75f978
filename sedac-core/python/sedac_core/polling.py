"""The host's half of the GPU runtime: what happens beside the decode steps, never in them.

Counters and risk histograms are device buffers that the kernels add to. A thread copies them to the host on a stream of
its own and looks only at what the copy before brought, so it waits for nothing and no decode step waits for it.
"""

import atexit
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checkpoint_parts import BY_CHECKPOINT, PER_CHECKPOINT, ROWS_SAVED, bin_centres
from .step_counters import BY_LEVEL, BY_PATH, BY_REASON, FALLBACKS, OWN, PATHS, STEPS, TOKENS

POLL_SECONDS = 0.1
CALLED = "sedac counters"  # the thread


def start(runtime: Any, watch: "Callable[[Any], Seen | SeenLevels]") -> None:
    """Poll beside the worker for as long as there is this runtime; the thread has ended before the interpreter does, which would
    otherwise abort the process if it is inside of CUDA's library just then."""
    over = threading.Event()
    thread = threading.Thread(target=poll, args=(weakref.ref(runtime), watch, over), name=CALLED, daemon=True)
    thread.start()

    @atexit.register
    def end() -> None:
        over.set()
        thread.join(1.0)  # seconds: somebody may hold the runtime's lock for good


def poll(reference: weakref.ref, watch: "Callable[[Any], Seen | SeenLevels]", over: threading.Event) -> None:
    """What that thread does: until `over`, what `watch(runtime)` watches comes to the host ten times a second.

    No event is recorded or waited for (while another thread captures a graph that would break the capture): a copy is
    read at the next turn, when it is long done.
    """
    seen = watch(reference())
    stream = torch.cuda.Stream(seen.buffers[0].device)
    copies = [torch.zeros_like(buffer, device="cpu").pin_memory() for buffer in seen.buffers]
    while not over.wait(POLL_SECONDS):
        runtime = reference()
        if runtime is None:
            return
        with torch.cuda.stream(stream), runtime.lock:  # an admin call may switch SEDAC off, and that must last
            if seen.advance(runtime, *copies):
                seen.steer(runtime)
            for copy, buffer in zip(copies, seen.buffers, strict=True):
                copy.copy_(buffer, non_blocking=True)
        del runtime


class Seen:
    """What the host knows of a cascade's counters on the device: the last copy it has passed on."""

    def __init__(self, runtime: Any):
        rule = runtime.rule
        self.buffers = [rule.counters, rule.risk_sums, *([] if rule.histogram is None else [rule.histogram])]
        self.before = [torch.zeros_like(buffer, device="cpu") for buffer in self.buffers]
        self.thresholds = torch.zeros_like(rule.table[0], device="cpu")
        if rule.table.is_cuda:
            self.thresholds = self.thresholds.pin_memory()

    def advance(self, runtime: Any, *copies: Tensor) -> bool:
        """Pass on what is new since the last copies, to the counters and the controller; False if nothing is."""
        now = [copy.clone() for copy in copies]
        counted, sums, *bins = (after - before for after, before in zip(now, self.before, strict=True))
        delta = counted.tolist()
        if not delta[STEPS]:
            return False
        self.before = now
        if runtime.controller is not None:
            for index, row in enumerate(bins[0]):
                critical = bin_centres().repeat_interleave(row.clamp(min=0).long())
                runtime.controller.observe(index, critical.numpy())
            runtime.steer()
        counters, steps = runtime.counters, runtime.counters.steps
        computed = delta[TOKENS] * runtime.policy.num_layers - delta[ROWS_SAVED]
        exits, not_finite, *_ = by_checkpoint = [
            delta[BY_CHECKPOINT + i :: PER_CHECKPOINT] for i in range(PER_CHECKPOINT)
        ]
        counters.add(delta[STEPS], delta[TOKENS], computed, exits, not_finite)
        runtime.pick.ran([1 - gone / max(1, delta[TOKENS]) for gone in itertools.accumulate(exits)])
        for index, (buckets, total) in enumerate(zip(zip(*by_checkpoint[2:], strict=True), sums.tolist(), strict=True)):
            counters.risk_counts(index, buckets, total)
        tell_paths(counters, delta, runtime.why_dense)
        in_force = runtime.controller.thresholds() if runtime.controller else runtime.policy.thresholds.tolist()
        counters.state(runtime.calibration)
        runtime.report(in_force, steps)
        return True

    def steer(self, runtime: Any) -> None:
        """Adaptive thresholds to the device."""
        if runtime.controller is not None and runtime.enabled:
            self.thresholds.copy_(torch.tensor(runtime.controller.thresholds()))
            runtime.rule.table[0].copy_(self.thresholds, non_blocking=True)
            runtime.rule.taken.fill_(runtime.phase)


class SeenLevels:
    """The same for gates, and the price in force for the log."""

    def __init__(self, runtime: Any):
        self.buffers = [runtime.counted, runtime.policy.log_lambda]
        self.before = torch.zeros_like(runtime.counted, device="cpu")

    def advance(self, runtime: Any, counted: Tensor, price: Tensor) -> bool:
        """Pass on what is new since the last copy; False if nothing is."""
        now = counted.clone()
        predicated, _ = new = now - self.before
        delta = new.sum(0).tolist()
        if not delta[STEPS]:
            return False
        self.before = now
        counters, steps = runtime.counters, runtime.counters.steps
        counters.add(delta[TOKENS], delta[BY_LEVEL:], delta[STEPS])
        if predicated[STEPS]:
            runtime.ran(int(predicated[TOKENS]), predicated[BY_LEVEL:].tolist())
        tell_paths(counters, delta, None)
        runtime.report(price.item(), steps)
        return True

    def steer(self, runtime: Any) -> None:
        """A price moves by admin calls alone."""


def tell_paths(counters: Any, delta: Sequence[int], why_dense: str | None) -> None:
    """Steps by path and tokens that saved nothing, of what the device counted anew."""
    for path, steps in zip(PATHS, delta[BY_PATH:BY_REASON], strict=True):
        counters.path(path, steps)
    for reason, tokens in zip(FALLBACKS, delta[BY_REASON:OWN], strict=True):
        counters.fallback((why_dense or "step size") if reason == "dense" else reason, tokens)
