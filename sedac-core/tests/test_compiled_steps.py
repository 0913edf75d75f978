"""Step sizes whose MLPs run whole are compiled apart, where vLLM can, and one way is left in each graph."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sedac_core import operators  # noqa: F401 - makes torch.ops.sedac

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("imports vllm")]


def config(mode=None, backend="inductor", endpoints=(96,), passes=()):
    from vllm.config import CompilationConfig, CompilationMode

    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE if mode is None else mode, compile_ranges_endpoints=list(endpoints)
    )
    compilation.backend = backend
    compilation.inductor_compile_config |= dict.fromkeys(passes)
    scheduler = SimpleNamespace(max_num_batched_tokens=96)
    return SimpleNamespace(compilation_config=compilation, scheduler_config=scheduler)


def ways(vllm_config) -> list[tuple[int, int, str]]:
    """The compile ranges, and which way through a joined graph stands in each."""
    from vllm.compilation.passes.inductor_pass import pass_context

    from sedac_core.compiled_steps import PASS

    def joined(x):
        return torch.ops.sedac.either(x.sin(), x.cos()) + 1

    found = []
    for compiled in vllm_config.compilation_config.get_compile_ranges():
        graph = make_fx(joined, tracing_mode="fake")(torch.ones(3)).graph
        with pass_context(compiled):
            vllm_config.compilation_config.inductor_compile_config[PASS](graph)
        names = {node.target for node in graph.nodes if node.op == "call_function"}
        assert len(names) == 2 and torch.ops.aten.add.Tensor in names, "the other way is gone"
        found.append((compiled.start, compiled.end, "whole" if torch.ops.aten.cos.default in names else "skipping"))
    return found


def test_each_range_keeps_its_own_way():
    from sedac_core.compiled_steps import PASS, compile_apart

    one, other = config(), config(endpoints=(32, 96))
    assert compile_apart(one, lambda tokens: 64 < tokens < 80) and compile_apart(other, lambda tokens: tokens > 64)
    assert ways(one) == [(1, 64, "skipping"), (65, 79, "whole"), (80, 96, "skipping")]
    assert ways(other) == [(1, 32, "skipping"), (33, 64, "skipping"), (65, 96, "whole")], "vLLM's own ranges stay"
    keys = {each.compilation_config.inductor_compile_config[PASS].uuid() for each in (one, other)}
    assert len(keys) == 2, "compiled graphs of one are not the other's"


def test_nothing_is_joined_where_nobody_would_part_it():
    from vllm.config import CompilationMode

    from sedac_core.compiled_steps import PASS, compile_apart

    whole = bool
    for each in (config(CompilationMode.NONE), config(backend="eager"), config(passes=[PASS])):
        before = dict(each.compilation_config.inductor_compile_config)
        assert not compile_apart(each, whole)
        assert each.compilation_config.compile_ranges_endpoints == [96]
        assert each.compilation_config.inductor_compile_config == before
    never = config()
    assert not compile_apart(never, lambda tokens: False) and never.compilation_config.compile_ranges_endpoints == [96]


def test_a_graph_in_which_both_ways_are_left_says_so():
    with pytest.raises(RuntimeError, match="start with --enforce-eager"):
        torch.ops.sedac.either(torch.ones(2), torch.ones(2))
