"""Step sizes at which all MLPs run whole, compiled apart by vLLM: there each MLP stands in the compiled graph, as in stock's.

An operator costs the host more than the MLP that it runs does in a compiled graph, keeps vLLM from fusing across it, and where
nothing can be skipped nothing pays for that. So the traced model has both ways, joined by `sedac::either`; vLLM compiles it once for
each range of step sizes, and a pass of Inductor's leaves one way in each: the other's nodes are dead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context
from vllm.config import CompilationMode

PASS = "joint_custom_pre_pass"  # runs before vLLM's own passes, whose patterns see stock's graph


def compile_apart(vllm_config: Any, whole: Callable[[int], bool]) -> bool:
    """Let vLLM compile the step sizes `whole(tokens)` apart from the others, and the second way of each `sedac::either` stand
    there. False, and nothing changed, where there are none or vLLM does not compile by ranges: nothing may be joined then."""
    compilation = vllm_config.compilation_config
    sizes = range(1, vllm_config.scheduler_config.max_num_batched_tokens + 1)
    if compilation.mode != CompilationMode.VLLM_COMPILE or compilation.backend != "inductor":
        return False
    kinds = [whole(tokens) for tokens in sizes]
    if PASS in compilation.inductor_compile_config or not any(kinds):
        return False
    ends = [tokens for tokens in sizes[:-1] if kinds[tokens - 1] != kinds[tokens]]
    compilation.compile_ranges_endpoints = sorted({*(compilation.compile_ranges_endpoints or [sizes[-1]]), *ends})
    ranges = compilation.get_compile_ranges()
    compilation.inductor_compile_config[PASS] = PickWay([(r.start, r.end) for r in ranges if kinds[r.start - 1]])
    return True


def joins(apart: bool) -> bool:
    """Whether what runs here is being traced for graphs that a pass parts, `apart` being what `compile_apart` said: a model that vLLM
    runs as it is written has no pass."""
    return apart and torch.compiler.is_compiling()


class PickWay(InductorPass):
    """Puts one of its arguments in the place of each `sedac::either`: the second, whole MLPs, in these compile ranges, else the
    first."""

    def __init__(self, whole: list[tuple[int, int]]):
        self.whole = whole

    def __call__(self, graph: fx.Graph) -> None:
        compiled = get_pass_context().compile_range
        whole = any(start <= compiled.start and compiled.end <= end for start, end in self.whole)
        for node in graph.find_nodes(op="call_function", target=torch.ops.sedac.either.default):
            node.replace_all_uses_with(node.args[whole])
            graph.erase_node(node)
        graph.eliminate_dead_code()

    def uuid(self) -> str:
        return self.hash_dict({"source": self.hash_source(self), "whole": self.whole})
