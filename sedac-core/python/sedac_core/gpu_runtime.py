"""What the operators do on a GPU: nothing that a captured CUDA graph could not replay, and host work apart from it.

Three ways through an MLP, chosen by the size of the step alone. Predicated: up to the largest captured size no value may
be read back, and Triton kernels skip on the device. Gather: steps of so many tokens that skipping pays for it are not
captured; what a checkpoint decided is read back once, and the model's own MLP runs on the gathered rows, which keeps
quantised and tensor-parallel layers right. Dense, where neither would be faster: the model's own MLP on all rows, and
the exited ones set to zero, so that a token means the same in every batch.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from . import kernels
from .cli import SedacError
from .kernels import Rule
from .policy import Exits, HardExit
from .polling import poll
from .settings import Settings
from .vllm_runtime import Runtime, dense

logger = init_logger("vllm.sedac")

EAGER_STATIC = 64  # without captured graphs: up to here a read-back costs more than it can save
# Floating-point operations of one MLP from which on gathering pays: below, the host cannot launch as fast as the GPU
# computes, and what gathering launches besides costs time (docs/results/gpu_h200.json: 2,048 tokens of 3B against 7B).
GATHER_FROM = 5e11
TUNED_ON = (9, 0)  # compute capability


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
        self.rule.taken.fill_(0 if self.watching else 1)
        captured = (
            0 if vllm_config.model_config.enforce_eager else vllm_config.compilation_config.max_cudagraph_capture_size
        )
        self.static_limit = max(EAGER_STATIC, captured or 0)
        size = 6 * model.config.hidden_size * model.config.intermediate_size // tensor_parallel
        self.gather_from = max(self.static_limit + 1, int(GATHER_FROM / size))
        bounds = [*self.checkpoints[1:], self.window.stop - 1]
        self.layers_ahead = [last - layer for layer, last in zip(self.checkpoints, bounds, strict=True)]
        self.gathered = 0  # rows that run, read back at the last checkpoint of an uncaptured step
        dtype = vllm_config.model_config.dtype
        self.why_dense = None
        if vllm_config.quant_config is not None:
            self.why_dense = f"weights are quantised ({vllm_config.quant_config.get_name()})"
        elif tensor_parallel > 1:
            self.why_dense = "weights are split by tensor parallelism"
        elif dtype not in (torch.bfloat16, torch.float16):
            self.why_dense = f"the model runs in {dtype}"
        elif torch.cuda.get_device_capability() != TUNED_ON:
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
        slots = next(iter(get_forward_context().slot_mapping.values()), None)  # [tokens], negative for padding
        probe = self.policy.probes[index]
        exits = Exits(*kernels.checkpoint(probe, hidden, residual, margin, slots, self.rule, index, ahead))
        if gathers:
            self.gathered = int(exits.n_running)
        return exits

    def mlp(self, x: Tensor, rows: Tensor, n_running: Tensor, layer: int) -> Tensor:
        mlp, tokens = self.mlps[layer], len(x)
        if self.predicated(tokens):
            return kernels.mlp(x, mlp.gate_up_proj.weight, mlp.down_proj.weight, rows, n_running)
        if tokens < self.gather_from:
            return kernels.zero_exited(dense(mlp, x), rows, n_running)
        if self.gathered == tokens:
            return dense(mlp, x)
        out = torch.zeros_like(x)
        if self.gathered:
            computed = rows[: self.gathered]
            out.index_copy_(0, computed, dense(mlp, x[computed]))
        return out
