"""vLLM's steps on a GPU: which are captured, and which of their tokens are real."""

from typing import Any

from torch import Tensor
from vllm.forward_context import get_forward_context

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
