"""What the operators do on a GPU: nothing that a captured CUDA graph could not replay, and host work apart from it.

Three ways through an MLP, chosen by the size of the step alone. Predicated: up to the largest captured size no value may
be read back, and Triton kernels skip on the device. Gather: steps of so many tokens that skipping pays for it are not
captured; what a checkpoint decided is read back once, and the model's own MLP runs on the gathered rows, which keeps
quantised and tensor-parallel layers right. Dense, where neither would be faster: the model's own MLP on all rows, and
the exited ones set to zero, so that a token means the same in every batch.

Gates have the same three. Their kernels decide, too; a step that does not skip runs no gate, and each of its tokens the
whole MLP, which is never worse for the answer. Neurons are put in the order of their importance when the model loads,
with the adapters' behind them in the same tensor: vLLM's own MLP runs on views of it.
"""

import itertools
import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from . import gate_kernels, kernels
from .checkpoint_kernels import Rule, checkpoint
from .cli import SedacError
from .gate_kernels import DeviceGate
from .gates_runtime import PricedGates, before_packing
from .kernels import Weights
from .policy import Exits, HardExit
from .policy_gates import HOPPER, GatedWidths
from .polling import poll, poll_levels
from .settings import Settings
from .vllm_runtime import Runtime, dense

logger = init_logger("vllm.sedac")

EAGER_STATIC = 64  # without captured graphs: up to here a read-back costs more than it can save
# Floating-point operations of one MLP from which on gathering pays: below, the host cannot launch as fast as the GPU
# computes, and what gathering launches besides costs time (docs/results/gpu_h200.json: 2,048 tokens of 3B against 7B).
GATHER_FROM = 5e11
# The same for gates, which are read back in every layer: the GPU stands still for about 30 µs each time, so an MLP must
# take milliseconds. An estimate, not measured yet.
GATES_GATHER_FROM = 2e12


class GpuRuntime(Runtime):
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
        self.rule = Rule.make(policy.thresholds, policy.weights, policy.gamma, policy.level, adaptive)
        self.taken = self.rule.taken
        self.taken.fill_(not self.watching)
        self.static_limit = static_limit(vllm_config)
        size = 6 * model.config.hidden_size * model.config.intermediate_size // tensor_parallel
        self.gather_from = max(self.static_limit + 1, int(GATHER_FROM / size))
        self.gathered = 0  # rows that run, read back at the last checkpoint of an uncaptured step
        dtype = vllm_config.model_config.dtype
        self.why_dense = None
        if vllm_config.quant_config is not None:
            self.why_dense = f"weights are quantised ({vllm_config.quant_config.get_name()})"
        elif tensor_parallel > 1:
            self.why_dense = "weights are split by tensor parallelism"
        elif dtype not in (torch.bfloat16, torch.float16):
            self.why_dense = f"the model runs in {dtype}"
        elif torch.cuda.get_device_capability() != HOPPER:
            self.why_dense = "the kernels were only tuned on Hopper GPUs"
        if self.why_dense:
            logger.warning(
                "SEDAC: %s, so steps of less than %d tokens run every MLP whole and save nothing; larger ones skip",
                self.why_dense,
                self.gather_from,
            )
        if get_tensor_model_parallel_rank() == 0:  # the others would count the same tokens again
            threading.Thread(target=poll, args=(weakref.ref(self),), name="sedac counters", daemon=True).start()

    def predicated(self, tokens: int) -> bool:
        """Whether a step of so many tokens runs the predicated kernels."""
        if self.why_dense or tokens > self.static_limit:
            return False
        down = self.mlps[self.window[0]].down_proj.weight
        return kernels.mlp_settings(tokens, *down.shape).predicated

    def checkpoint(self, index: int, hidden: Tensor, residual: Tensor, margin: Tensor | None) -> Exits:
        tokens = len(hidden)
        gathers = tokens >= self.gather_from
        ahead = self.layers_ahead[index] if gathers or self.predicated(tokens) else 0
        probe = self.policy.probes[index]
        exits = Exits(*checkpoint(probe, hidden, residual, margin, slots(), self.rule, index, ahead))
        if gathers:
            self.gathered = int(exits.n_running)
        return exits

    def mlp(self, x: Tensor, rows: Tensor, n_running: Tensor, layer: int) -> Tensor:
        mlp, tokens = self.mlps[layer], len(x)
        if self.predicated(tokens):
            return kernels.mlp(x, Weights(mlp.gate_up_proj.weight, mlp.down_proj.weight), rows, n_running)
        if tokens < self.gather_from:
            return kernels.zero_exited(dense(mlp, x), rows, n_running)
        if self.gathered == tokens:
            return dense(mlp, x)
        out = torch.zeros_like(x)
        if self.gathered:
            computed = rows[: self.gathered]
            out.index_copy_(0, computed, dense(mlp, x[computed]))
        return out


class GpuGates(PricedGates):
    """Gates inside CUDA graphs: in each layer one operator decides and runs the MLP."""

    def __init__(self, name: str, model: nn.Module, policy: GatedWidths, settings: Settings, vllm_config: Any):
        super().__init__(name, model, policy, settings)
        shape = policy.shape
        self.leaders, self.num_layers = shape.leaders, shape.num_layers
        self.mlps = [layer.mlp for layer in model.layers]
        self.weights: list[Weights | None] = [None] * self.num_layers  # once the model is loaded
        self.gates: dict[int, DeviceGate] = {}
        for index, mlp in enumerate(self.mlps):
            before_packing(mlp, partial(self.narrow, index))
        self.counted = gate_kernels.new_counters(len(shape.levels), policy.prices.device)
        down = self.mlps[0].down_proj.weight
        self.static_limit = static_limit(vllm_config)
        self.gather_from = max(self.static_limit + 1, int(GATES_GATHER_FROM / (2 * 3 * down.numel())))
        self.gathered: tuple[Tensor, list[int]] | None = None  # rows by level and their counts, of an uncaptured step
        inside = spans([tokens for tokens in range(1, self.static_limit + 1) if self.predicated(tokens)])
        logger.info(
            "SEDAC: gates narrow MLPs in steps of %s tokens and of %d or more; steps of other sizes, where the kernels do "
            "not win, run every MLP whole",
            inside or "no number of captured",
            self.gather_from,
        )
        threading.Thread(target=poll_levels, args=(weakref.ref(self),), name="sedac counters", daemon=True).start()

    def narrow(self, layer: int) -> None:
        """Put one loaded MLP's neurons in their order and its adapters behind them; vLLM's own layers become views."""
        mlp, gates, shape = self.mlps[layer], self.policy.gates, self.policy.shape
        gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        order, bank = gates.order[layer].to(down.device), gates.banks[layer].to(down.device)
        weights = Weights.narrowed(gate_up.data, down.data, order, bank, shape.widths)
        gate_up.data = weights.gate_up[: 2 * weights.neurons]
        down.data = weights.down[:, : weights.neurons]
        self.weights[layer] = weights
        gates.banks[layer] = nn.Identity()  # what it held is now in the weights
        if layer in self.leaders:
            gate, gain, group = gates.gates[str(layer)], self.policy.gains[layer], len(shape.group(layer))
            self.gates[layer] = DeviceGate.make(gate, gain, group, layer == 0, down.data)

    def predicated(self, tokens: int) -> bool:
        """Whether a step of so many tokens runs the kernels."""
        shape = self.policy.shape
        if tokens > self.static_limit:
            return False
        return kernels.mlp_settings(tokens, shape.hidden_size, shape.intermediate_size, gated=True).predicated

    # Traced by torch.compile: branches on layer indices only.

    def run_layer(
        self,
        idx: int,
        layer: nn.Module,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        level: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run decoder layer `idx`; the level `[tokens]` is the latest leader's, and this layer's own where it leads."""

        def mlp(x: Tensor) -> Tensor:
            nonlocal level
            if idx in self.leaders:
                out, level = torch.ops.sedac.gated_mlp(x, idx, self.name)
                return out
            return torch.ops.sedac.narrowed_mlp(x, level, idx, self.name)

        hidden, residual = layer(positions, hidden, residual, mlp)
        return hidden, residual, level

    # Behind the operators.

    def gated_mlp(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A leader decides for its group, and its own MLP runs: output `[tokens, hidden]` and level `[tokens]`, int32, which
        nobody reads where the step runs whole."""
        tokens = len(x)
        decides = (self.gates[layer], self.policy.log_lambda, slots(), self.counted)
        if self.predicated(tokens):
            return kernels.gated_mlp(x, self.weights[layer], *decides)
        if tokens >= self.gather_from:
            level, rows, ends = gate_kernels.levels_of(x, *decides)
            counts = [after - before for before, after in itertools.pairwise([0, *ends.tolist()])]
            self.gathered = rows, counts
            return self.by_level(x, layer), level
        if layer == 0:
            gate_kernels.count_whole(slots(), tokens, self.num_layers, self.counted)
        return dense(self.mlps[layer], x), torch.empty(tokens, dtype=torch.int32, device=x.device)

    def narrowed_mlp(self, x: Tensor, level: Tensor, layer: int) -> Tensor:
        """The MLP of a layer that follows a leader, at the levels that it decided."""
        if self.predicated(len(x)):
            return kernels.narrowed_mlp(x, self.weights[layer], level)
        if len(x) >= self.gather_from:
            return self.by_level(x, layer)
        return dense(self.mlps[layer], x)

    def by_level(self, x: Tensor, layer: int) -> Tensor:
        return kernels.by_level(x, self.weights[layer], *self.gathered, partial(dense, self.mlps[layer]))

    def report(self, log_lambda: float, steps_before: int) -> None:
        """After the counters moved on: log once every so many steps."""
        if self.log_every and self.counters.steps // self.log_every > steps_before // self.log_every:
            logger.info(self.counters.summary(log_lambda))


def static_limit(vllm_config: Any) -> int:
    """Tokens of a step up to which nothing may be read back."""
    if vllm_config.model_config.enforce_eager:
        return EAGER_STATIC
    return max(EAGER_STATIC, vllm_config.compilation_config.max_cudagraph_capture_size or 0)


def slots() -> Tensor | None:
    """Each token's slot in the KV cache `[tokens]`, negative for padding; None in vLLM's own dummy runs."""
    return next(iter(get_forward_context().slot_mapping.values()), None)


def spans(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> '1 to 3, 7'."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in found)
