"""Two recordings of a captured step, and which of them is replayed.

At sizes where the way through an MLP that skips costs more than the plain one while no row exits, vLLM captures the whole step
twice: with every MLP dense, and skipping. Before each replay the host picks one, by the share of rows that ran of late,
which the polling thread reads ten times a second beside the steps, and by the measured costs (kernel_settings.json). Both
decide alike and set exited rows to zero, so which one runs changes a token by rounding at most.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

from .kernels import Paths

RUNNER = "vllm.v1.worker.gpu_model_runner"


class Pick:
    """Which recording of a step is to be replayed, or captured."""

    def __init__(self, paths: Paths, layers_ahead: Sequence[int]):
        """layers_ahead `[checkpoints]`: how many MLPs each one decides for."""
        self.paths, self.layers_ahead = paths, layers_ahead
        self.running: tuple[float, ...] = (1.0,) * len(layers_ahead)  # share of tokens after each checkpoint, of late
        self.known: dict[int, bool] = {}  # by size of a step, at these shares
        self.capturing = False  # the recording that skips

    def skipping(self, tokens: int) -> bool:
        """Whether the next step of so many tokens is to be the recording that skips."""
        if self.capturing:
            return True
        known, found = self.known, self.known.get(tokens)
        if found is None:
            second, running = self.paths.second(tokens), zip(self.layers_ahead, self.running, strict=True)
            found = second is not None and sum(layers * second.gains(share, tokens) for layers, share in running) > 0
            known[tokens] = found
        return found

    def ran(self, shares: Sequence[float]) -> None:
        """The share of tokens that ran on after each checkpoint, as the last steps had it."""
        self.running = tuple(shares)
        self.known = {}

    def path(self, tokens: int) -> str:
        """The way of the step that is being captured, or runs without a graph, through its MLPs."""
        return "predicated" if self.capturing and self.paths.second(tokens) else self.paths(tokens)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """While the second recordings are captured."""
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


class Recordings(MutableMapping):
    """Stands in for the mapping in which vLLM keeps its captured graphs, by batch descriptor: each looked up in the recording
    that is to be when its presence is, as vLLM does before it reads or writes an entry."""

    def __init__(self, pick: Pick):
        self.pick = pick
        self.whole: dict[Any, Any] = {}
        self.skipping: dict[Any, Any] = {}
        self.now = self.whole

    def __contains__(self, descriptor: Any) -> bool:
        self.now = self.skipping if self.pick.skipping(descriptor.num_tokens) else self.whole
        return descriptor in self.now

    def __getitem__(self, descriptor: Any) -> Any:
        return self.now[descriptor]

    def __setitem__(self, descriptor: Any, entry: Any) -> None:
        self.now[descriptor] = entry

    def __delitem__(self, descriptor: Any) -> None:
        for recording in (self.whole, self.skipping):
            recording.pop(descriptor, None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)

    def clear(self) -> None:
        self.whole.clear()
        self.skipping.clear()


recording: set[type] = set()  # model runners that capture twice


def record_twice() -> bool:
    """Have vLLM's model runner capture whole decode steps twice where a runtime of its model wants that, once; False where
    there is no runner that this knows."""
    runner = getattr(sys.modules.get(RUNNER), "GPUModelRunner", None)
    if not hasattr(runner, "_capture_cudagraphs"):
        return False
    if runner not in recording:
        recording.add(runner)
        runner._capture_cudagraphs = twice(runner._capture_cudagraphs)
    return True


def twice(capture: Callable) -> Callable:
    @functools.wraps(capture)
    def both(runner: Any, batch_descriptors: list[Any], cudagraph_runtime_mode: Any) -> None:
        from vllm.compilation.cuda_graph import CUDAGraphWrapper
        from vllm.config import CUDAGraphMode

        from .vllm_requests import runtimes

        pick = next((found.pick for found in runtimes(runner) if hasattr(found, "pick")), None)
        whole_steps = cudagraph_runtime_mode == CUDAGraphMode.FULL and isinstance(runner.model, CUDAGraphWrapper)
        if pick is None or not whole_steps:
            return capture(runner, batch_descriptors, cudagraph_runtime_mode)
        if not isinstance(runner.model.concrete_cudagraph_entries, Recordings):
            runner.model.concrete_cudagraph_entries = Recordings(pick)
        capture(runner, batch_descriptors, cudagraph_runtime_mode)
        with pick.capture():
            again = [descriptor for descriptor in batch_descriptors if pick.paths.second(descriptor.num_tokens)]
            capture(runner, again, cudagraph_runtime_mode)

    return both
