"""CUDA graphs of a call after the other, and how long their replays take."""

from collections.abc import Callable
from typing import Any

import torch


def captured(
    once: Callable[[int], Any], calls: int, beside: torch.cuda.CUDAGraph | None = None
) -> torch.cuda.CUDAGraph:
    """A graph of `once(0)`, `once(1)` and so on; with `beside`, in the memory of that graph, which must not run meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=beside and beside.pool()):
        for i in range(calls):
            once(i)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int, in_a_row: int = 1) -> float:
    """Microseconds of one of a graph's calls, over so many replays in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(in_a_row):
        graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / calls / in_a_row
