"""What a cascade's operators do on a GPU: nothing that a captured CUDA graph could not replay, and host work apart from it.

Four ways through an MLP, chosen by the size of the step alone. Predicated: up to the largest captured size no value may
be read back, and Triton kernels skip on the device. Conditional: at captured sizes where cuBLAS beats them, and for weights
that they cannot read, a node in the graph chooses how many rows the model's own MLP runs for (conditional.py). Gather: steps of
so many tokens that skipping pays for it are not captured; what a checkpoint decided is read back once, when the first MLP behind it
asks, and the model's own MLP runs on the gathered rows. Dense, where none would be faster: the model's own MLP on all rows, and the exited ones set to zero
in its activation, so that a token means the same in every batch; sizes that always go that way have stock's MLPs in the compiled
graph, and no operator (compiled_steps.py). Other uncaptured steps run as fast as the host launches, so there an MLP is as few and as
plain calls of torch as can be. Where skipping costs more than dense while nothing is skipped, a captured step of that size is recorded
both ways, and the host picks before each replay (recordings.py).
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger

from . import kernels, polling
from .cascade_runtime import CascadeRuntime
from .checkpoint_kernels import LargeCheckpoint, checkpoint
from .checkpoint_parts import ROWS_SAVED, DeviceProbe, Rule
from .cli import SedacError
from .compiled_steps import compile_apart, joins
from .conditional import Switches, Unavailable
from .gpu_mlps import WholeMlps, dense, first_of, gather, without_sum
from .gpu_steps import captures, log_other_gpu, slots, spans, static_limit
from .kernels import Weights
from .policy import Exits, HardExit
from .policy_gates import HOPPER
from .polling import Seen
from .recordings import Pick, record_twice
from .settings import Settings

logger = init_logger("vllm.sedac")

# Floating-point operations of one MLP from which on gathering pays: below, the host cannot launch as fast as the GPU
# computes, and what gathering launches besides costs time (docs/results/gpu_h200.json: 2,048 tokens of 3B against 7B).
GATHER_FROM = 5e11
# For quantised weights so many times as many: vLLM's own layers run, FP8's products take the GPU half as long, and the host five times
# the calls (2,048 tokens of 7B in FP8, gathered: 0.96 times stock's speed where none exited, 1.00 where all did, from 0.86 to 1.56).
QUANTISED_TIMES = 2
# Operations of one worker's share of an MLP from which on a conditional node is used where nobody has measured. A node costs 8 to
# 15 µs (kernel_settings.json); at 2.1e11 operations, 512 tokens of 7B, that is 4.5 % of the MLP, and at 2.5e11 under the 4 % that
# may cost a step 2 %. On slower GPUs and with weights to dequantise an MLP takes longer; newer GPUs than Hopper may be
# faster, and stay dense.
CONDITIONAL_FROM = 2.5e11


class GpuCascade(CascadeRuntime):
    """Exits inside CUDA graphs."""

    def __init__(self, name: str, model: nn.Module, policy: HardExit, settings: Settings, vllm_config: Any):
        super().__init__(name, model, policy, settings)
        tensor_parallel = get_tensor_model_parallel_world_size()
        if self.controller is not None and tensor_parallel > 1:
            raise SedacError(
                "adaptive thresholds with tensor parallelism are not supported yet on GPUs: set SEDAC_ADAPTIVE=0 and "
                "SEDAC_THRESHOLDS, or calibrate (python sedac_calibrate.py)"
            )
        policy = self.policy
        adaptive = self.controller is not None
        self.rule = Rule.make(policy.table, policy.weights, policy.gamma, policy.level, adaptive)
        self.apart = self.rule.counting_apart()  # vLLM's own runs
        self.probes = [DeviceProbe.make(probe) for probe in policy.probes]
        self.large = [LargeCheckpoint(probe, self.rule, index) for index, probe in enumerate(self.probes)]
        self.taken = self.rule.taken
        self.taken.fill_(self.phase)
        self.static_limit = static_limit(vllm_config)
        bounds = itertools.pairwise([*self.checkpoints, self.window.stop - 1])
        self.alike = {layer: range(layer, last + 1) for first, last in bounds for layer in range(first + 1, last + 1)}
        size = 6 * model.config.hidden_size * model.config.intermediate_size // tensor_parallel
        self.tensor_parallel = tensor_parallel > 1
        # What the last checkpoint of an uncaptured step left: the rows that run, where the step gathers, else whether a token runs.
        self.computed: Callable[[], Tensor] | None = None
        self.running: Tensor | None = None
        self.whole = WholeMlps(self.mlps)
        self.why_dense = why = why_no_kernels(vllm_config)
        gather_from = GATHER_FROM * (1 if vllm_config.quant_config is None else QUANTISED_TIMES)
        self.paths = kernels.Paths(
            self.static_limit,
            max(self.static_limit + 1, int(gather_from / size)),
            -int(-CONDITIONAL_FROM // size),
            None if why else tuple(self.mlps[self.window[0]].down_proj.weight.shape),
            switches=captures(vllm_config)
            and torch.cuda.get_device_capability() <= HOPPER
            and vllm_config.lora_config is None,
            twice=captures(vllm_config),
        )
        sizes = range(1, self.static_limit + 1)
        if any(map(self.paths.second, sizes)):
            self.paths.twice = record_twice()
        self.pick = Pick(self.gains, [1.0] * len(self.checkpoints))
        self.switches: Switches | None = None
        if "conditional" in map(self.paths, sizes):
            try:
                self.switches = Switches(self.rule.counters.device, len(self.window))
            except Unavailable as error:
                self.do_without_switches(error)
        self.whole_in_graph = compile_apart(vllm_config, self.runs_whole)
        self.log_paths(why)
        if get_tensor_model_parallel_rank() == 0:  # the others would count the same tokens again
            polling.start(self, Seen)

    def do_without_switches(self, reason: Unavailable) -> None:
        """Captured steps that would have had conditional nodes run dense from now on."""
        self.paths.switches, self.switches = False, None
        logger.warning(
            "SEDAC: no conditional nodes in CUDA graphs: %s; steps that want them run every MLP whole", reason
        )

    def log_paths(self, why_no_kernels: str | None) -> None:
        """Which steps skip, and what keeps the others from it."""
        ways = {
            "predicated": "by kernels",
            "conditional": "by conditional nodes in the graph",
            "second": "by a second recording while enough of their rows exit",
        }
        by_way: dict[str, list[int]] = {}
        for tokens in range(1, self.static_limit + 1):
            by_way.setdefault("second" if self.paths.second(tokens) else self.paths(tokens), []).append(tokens)
        found = [f"of {spans(by_way[way])} tokens {words}" for way, words in ways.items() if way in by_way]
        found.append(f"of {self.paths.gather_from} or more by gathering rows")
        logger.log(
            logging.WARNING if why_no_kernels else logging.INFO,
            "SEDAC: %sMLPs are skipped in steps %s; in steps of other sizes every MLP runs whole and nothing is saved",
            f"{why_no_kernels}: " if why_no_kernels else "",
            ", ".join(found),
        )
        if self.paths.shape is not None:
            log_other_gpu("hard", *self.paths.shape)

    def gains(self, tokens: int, running: Sequence[float]) -> float | None:
        """Microseconds that the kernels save a step of so many tokens, if it is recorded twice and this share of its tokens runs
        on after each checkpoint."""
        second = self.paths.second(tokens)
        if second is None:
            return None
        return sum(
            layers * second.gains(share, tokens) for layers, share in zip(self.layers_ahead, running, strict=True)
        )

    def path(self, tokens: int) -> str:
        """The way of the step that is being captured, or runs without a graph, through its MLPs."""
        found = "predicated" if self.pick.captured and self.paths.second(tokens) else self.paths(tokens)
        return "dense" if found == "gather" and self.some_adapted else found

    def skips(self, tokens: int) -> bool:
        """Whether the next step of so many tokens, captured if it is small, saves anything where rows exit."""
        return self.paths(tokens) != "dense" or self.pick.pays(tokens)

    def runs_whole(self, tokens: int) -> bool:
        """Whether every step of so many tokens runs all MLPs whole."""
        return self.paths(tokens) == "dense" and not self.paths.second(tokens)

    def skipping(self, layer: int, mlp: nn.Module, exits: Exits, x: Tensor) -> Tensor:
        skipped = super().skipping(layer, mlp, exits, x)
        if not joins(self.whole_in_graph):
            return skipped
        # Not `running[:, None]`: vLLM computes items of a tensor in the piece of the graph that made it, and each layer's would be
        # one more result of the checkpoint's piece.
        return torch.ops.sedac.either(skipped, mlp(x).where(exits.running.unsqueeze(1), 0))

    def checkpoint(self, index: int, hidden: Tensor, residual: Tensor, margin: Tensor | None) -> Exits:
        path, own = self.path(len(hidden)), slots()
        large_dense = path == "dense" and len(hidden) > self.static_limit
        if large_dense and own is not None:
            exits = Exits(*self.large[index](hidden, residual, margin, own, self.token_rows))
        else:
            # Of what a node skips, the node's own kernel keeps count.
            ahead = self.layers_ahead[index] if path in ("predicated", "gather") else 0
            rest = (own, self.apart if own is None else self.rule, index, ahead, self.token_rows, path)
            exits = Exits(*checkpoint(self.probes[index], hidden, residual, margin, *rest))
        if path == "gather":
            self.computed = first_of(exits.rows, exits.n_running)
        elif path == "conditional":
            self.switches.checkpoint()
        elif large_dense:
            self.running = exits.running
        return exits

    def mlp(self, x: Tensor, rows: Tensor, n_running: Tensor, layer: int) -> Tensor:
        tokens, mlp = len(x), self.mlps[layer]
        path = self.path(tokens)
        if path == "gather":
            return gather(x, self.computed(), self.whole[layer])
        if tokens > self.static_limit:
            return self.whole[layer](x).where(self.running[:, None], 0)
        if path == "predicated":
            return kernels.mlp(x, Weights(mlp.gate_up_proj.weight, mlp.down_proj.weight), rows, n_running)
        if path == "conditional" and torch.cuda.is_current_stream_capturing():
            own = partial(without_sum, mlp)
            saved = self.rule.counters[ROWS_SAVED : ROWS_SAVED + 1]
            out = self.switches.mlp(x, rows, n_running, self.alike[layer], own, slots(), saved)
            return tensor_model_parallel_all_reduce(out) if self.tensor_parallel else out
        if path == "conditional":  # vLLM runs every size once before it captures it
            try:
                self.switches.prepare(x, partial(without_sum, mlp))
            except Unavailable as error:
                self.do_without_switches(error)
        return dense(mlp, x, rows, n_running)


def why_no_kernels(vllm_config: Any) -> str | None:
    """Why this package's kernels cannot run the MLPs of a model, or should not."""
    if vllm_config.quant_config is not None:
        return f"weights are quantised ({vllm_config.quant_config.get_name()})"
    if vllm_config.lora_config is not None:
        return "LoRA adapters may add to weights"
    if get_tensor_model_parallel_world_size() > 1:
        return "weights are split by tensor parallelism"
    if vllm_config.model_config.dtype not in (torch.bfloat16, torch.float16):
        return f"the model runs in {vllm_config.model_config.dtype}"
    if torch.cuda.get_device_capability() != HOPPER:
        return "the kernels were only tuned on Hopper GPUs"
    return None
