"""vLLM's steps on a GPU: which are captured, which of their tokens are real, and what the start says of them."""

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from . import kernels

logger = init_logger("vllm.sedac")

EAGER_STATIC = 64  # without captured graphs: up to here a read-back costs more than it can save


def captures(vllm_config: Any) -> bool:
    """Whether vLLM captures CUDA graphs."""
    compilation = vllm_config.compilation_config
    return not vllm_config.model_config.enforce_eager and bool(compilation.max_cudagraph_capture_size)


def static_limit(vllm_config: Any) -> int:
    """Tokens of a step up to which nothing may be read back."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size if captures(vllm_config) else 0
    return max(EAGER_STATIC, captured)


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


def log_other_gpu(policy: str, hidden_size: int, neurons: int) -> None:
    """Say which of the costs by which steps go their way (kernels.py) were measured on another GPU than this."""
    here = torch.cuda.get_device_name()
    for there, tokens in kernels.timed_elsewhere(policy, hidden_size, neurons, here).items():
        logger.info(
            "SEDAC: which steps skip, and when, follows from costs that for %s tokens were measured on an %s, and this is an %s: "
            "`python -m sedac_core.bench tune --policies %s` measures them here",
            spans(tokens),
            there,
            here,
            policy,
        )
