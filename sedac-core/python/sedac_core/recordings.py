"""Two recordings of a captured step, and which of them is replayed.

At sizes where the way through an MLP that skips costs more than the plain one while nothing is skipped, vLLM captures the
step twice: with every MLP whole, and skipping. A decode step is one graph, one with prefill in it a graph for each piece between
two attentions, and all pieces of a step are of one recording: a gate in one decides for MLPs in others. Before each replay the host
picks one, by what was skipped of late, which the polling thread reads ten times a second beside the steps, and by the measured
costs (kernel_settings.json).

Both recordings of a cascade decide alike and set exited rows to zero, so which one runs changes a token by rounding at most.
The whole recording of gates runs no gate, so it does not show what gates would have saved: while it is picked, one step in
LOOK_EVERY runs the other one to see. Narrowing then depends on the steps before, as it depends on a step's size anyway; a
whole MLP is never worse for the answer.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

RUNNER = "vllm.v1.worker.gpu_model_runner"
# Tokens from which on steps that are captured in pieces are recorded twice. vLLM captures larger ones only where it is told to; what
# a second recording of the others is worth, which every start would have to capture, nobody has timed (docs/LOG.md).
PIECES_FROM = 513
LOOK_EVERY = 32  # steps: at one token a look costs 5 % of a step (kernel_settings.json), so looking less than 0.2 %


class Pick:
    """Which recording of a step is to be replayed, or captured."""

    def __init__(
        self, gains: Callable[[int, tuple[float, ...]], float | None], shares: Sequence[float], look: bool = False
    ):
        """gains(tokens, shares): microseconds that the skipping recording of a step of so many tokens saves where rows run in
        these shares, None where such steps are recorded once. `look`: run it now and then while it saves nothing."""
        self.gains, self.look = gains, look
        self.waited = 0  # steps since the last one that skipped
        self.rows: list[float] = []  # that were seen at each level, old ones counting less
        self.captured: bool | None = None  # whether the recording under way is the one that skips; None: none is
        self.ran(shares)

    def second(self, tokens: int) -> bool:
        """Whether steps of this size are recorded twice."""
        return self.gains(tokens, self.shares) is not None

    def pays(self, tokens: int) -> bool:
        """Whether there is a recording that skips, and it is the faster one as rows ran of late."""
        known = self.known
        if tokens not in known:
            known[tokens] = (self.gains(tokens, self.shares) or 0.0) > 0
        return known[tokens]

    def skipping(self, tokens: int) -> bool:
        """Whether the step of so many tokens that comes now is to be the recording that skips."""
        if self.captured is not None:
            return self.captured and self.second(tokens)
        if self.pays(tokens):
            self.waited = 0
            return True
        self.waited += 1
        if not self.look or self.waited < LOOK_EVERY or not self.second(tokens):
            return False
        self.waited = 0
        return True

    def saw(self, rows: Sequence[float], keep: float) -> None:
        """So many rows more ran at each level, beside which the earlier ones count by `keep`. None at all say nothing."""
        self.rows = [keep * before + now for before, now in zip(self.rows or [0.0] * len(rows), rows, strict=True)]
        if total := sum(self.rows):
            self.ran([number / total for number in self.rows])

    def forget(self, shares: Sequence[float]) -> None:
        """What was seen says nothing any more: suppose these shares."""
        self.rows = []
        self.ran(shares)

    def ran(self, shares: Sequence[float]) -> None:
        """How rows ran in the last steps: of a cascade the share of tokens that ran on after each checkpoint, of gates the
        share of rows at each level."""
        self.shares = tuple(shares)
        self.known: dict[int, bool] = {}  # whether it pays, by size of a step, at these shares

    @contextlib.contextmanager
    def capture(self, skipping: bool) -> Iterator[None]:
        """While the recordings that skip are captured, or those that do not."""
        self.captured = skipping
        try:
            yield
        finally:
            self.captured = None


class Recordings(MutableMapping):
    """Stands in for the mapping in which vLLM keeps its captured graphs, by batch descriptor: each looked up in the recording
    that is to be when its presence is, as vLLM does before it reads or writes an entry. The pieces of a step follow its first."""

    def __init__(self, pick: Pick, least: int = 0, first: "Recordings | None" = None):
        """`least`: tokens from which on steps are recorded twice; `first`: those of a step's first piece, which these follow."""
        self.pick, self.least, self.first = pick, least, first
        self.whole: dict[Any, Any] = {}
        self.skipping: dict[Any, Any] = {}
        self.now = self.whole

    def __contains__(self, descriptor: Any) -> bool:
        first, tokens = self.first, descriptor.num_tokens
        own = first is None and tokens >= self.least and self.pick.skipping(tokens)
        skipping = own if first is None else first.now is first.skipping
        self.now = self.skipping if skipping else self.whole
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
    """Have vLLM's model runner capture steps twice where a runtime of its model wants that, once; False where there is no runner
    that this knows."""
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
        from .vllm_requests import runtimes

        pick = next((found.pick for found in runtimes(runner) if hasattr(found, "pick")), None)
        wrappers = pick and graphs_of(runner, cudagraph_runtime_mode)
        if not wrappers:
            return capture(runner, batch_descriptors, cudagraph_runtime_mode)
        least = 0 if wrappers[0] is runner.model else PIECES_FROM
        if not isinstance(wrappers[0].concrete_cudagraph_entries, Recordings):
            first = wrappers[0].concrete_cudagraph_entries = Recordings(pick, least)
            for wrapper in wrappers[1:]:
                wrapper.concrete_cudagraph_entries = Recordings(pick, first=first)
        with pick.capture(skipping=False):
            capture(runner, batch_descriptors, cudagraph_runtime_mode)
        with pick.capture(skipping=True):
            large = [descriptor for descriptor in batch_descriptors if descriptor.num_tokens >= least]
            again = [descriptor for descriptor in large if pick.second(descriptor.num_tokens)]
            capture(runner, again, cudagraph_runtime_mode)

    return both


def graphs_of(runner: Any, cudagraph_runtime_mode: Any) -> list[Any]:
    """What captures and replays a runner's steps in this mode, in the order in which a step comes to them; none where that is not
    known."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import CUDAGraphMode

    if cudagraph_runtime_mode == CUDAGraphMode.FULL:
        return [runner.model] if isinstance(runner.model, CUDAGraphWrapper) else []
    pieces = [
        wrapper
        for wrapper in CUDAGraphWrapper._all_instances
        if wrapper.runtime_mode == cudagraph_runtime_mode and wrapper.compilation_config is runner.compilation_config
    ]
    pieces.sort(key=lambda wrapper: not wrapper.runnable.is_first_graph)
    return pieces if sum(wrapper.runnable.is_first_graph for wrapper in pieces) == 1 else []
