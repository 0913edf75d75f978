"""What the patched vLLM model calls: `attach` builds a runtime beside a Qwen2 model, and the runtime's `run_layer` is traced by
torch.compile in place of the call of a decoder layer.

Each policy has a half that is traced and knows its settings (cascade_runtime.py, gates_runtime.py), and by device what stands behind the
operators (operators.py): cpu_cascade.py and gpu_cascade.py for a cascade, cpu_gates.py and gpu_gates.py for gates.
"""

import json
from typing import Any

from torch import nn
from vllm.logger import init_logger

from . import vllm_patch, vllm_plugin
from .cascade_runtime import CascadeRuntime
from .cli import SedacError
from .gates_runtime import GatesRuntime
from .policy import HardExit, load_policy
from .policy_gates import GatedWidths, check_gates_supported
from .settings import Settings
from .vllm_requests import follow_batches

logger = init_logger("vllm.sedac")


def attach(model: nn.Module, vllm_config: Any, prefix: str) -> CascadeRuntime | GatesRuntime:
    """Make the runtime of a Qwen2Model under construction, or stop vLLM's start with a sentence that says why not."""
    settings = Settings.from_env()
    vllm_plugin.require_registered()
    check_supported(model, vllm_config)
    policy = load_policy(settings, model.config)
    key = {**policy.graph_key(), "prefix": prefix, "patch": vllm_patch.fingerprint()}
    vllm_config.additional_config["sedac"] = json.dumps(key, sort_keys=True)  # part of the compile cache's key
    runtime = make_runtime(f"{prefix}.sedac", model, policy, settings, vllm_config)
    sizes = (
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.compilation_config.max_cudagraph_capture_size,
    )
    runtime.make_room(max(size or 0 for size in sizes), next(model.parameters()).device)
    follow_batches(vllm_config)
    vllm_config.compilation_config.static_forward_context[runtime.name] = runtime
    if policy.warning:
        logger.warning("SEDAC: %s", policy.warning)
    logger.info("SEDAC on: %s, from %s", policy.describe(settings), settings.probe_dir)
    return runtime


def make_runtime(
    name: str, model: nn.Module, policy: HardExit | GatedWidths, settings: Settings, vllm_config: Any
) -> CascadeRuntime | GatesRuntime:
    """The runtime of this policy on this device."""
    gates = isinstance(policy, GatedWidths)
    if gates:
        check_gates_supported(vllm_config)
    runtime: type[CascadeRuntime | GatesRuntime]
    if vllm_config.device_config.device_type == "cpu":
        from .cpu_cascade import CpuCascade
        from .cpu_gates import CpuGates

        runtime = CpuGates if gates else CpuCascade
    else:
        from .gpu_cascade import GpuCascade  # the only way to Triton
        from .gpu_gates import GpuGates

        runtime = GpuGates if gates else GpuCascade
    return runtime(name, model, policy, settings, vllm_config)


def check_supported(model: nn.Module, vllm_config: Any) -> None:
    """Refuse what SEDAC cannot run rightly yet: other decoder layers, pipeline parallel, speculation, DBO."""
    from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer

    off = "or unset SEDAC_ENABLED"
    layers = {type(layer) for layer in model.layers}
    if layers != {Qwen2DecoderLayer}:
        names = ", ".join(sorted(layer.__name__ for layer in layers))
        raise SedacError(f"SEDAC runs Qwen2 and Qwen2.5 decoder layers, found {names}: choose such a model {off}")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise SedacError(f"SEDAC does not support pipeline parallelism yet: set --pipeline-parallel-size 1 {off}")
    if vllm_config.speculative_config is not None:
        raise SedacError(f"SEDAC does not support speculative decoding yet: start without it {off}")
    if not isinstance(vllm_config.additional_config, dict):
        raise SedacError(f"SEDAC needs vLLM's additional_config to be a dict: start without your own class {off}")
    if vllm_config.parallel_config.enable_dbo:
        raise SedacError(f"SEDAC does not support micro-batched steps: start without --enable-dbo {off}")
