"""The operators of the patched model: opaque to torch.compile, they carry nothing but activations and indices, and find the rest
through vLLM's forward context. No graph holds a threshold, nor the number of a layer, which comes as a tensor on the host: so layers
that are alike are one graph, which vLLM compiles once.

For a cascade `sedac::checkpoint` and `sedac::mlp` (on a CPU checkpoints are traced, and `sedac::rules` and `sedac::count` stand
around them), for gates `sedac::gate` (on a GPU `sedac::gated_mlp`) and `sedac::narrowed_mlp`. What they do is the runtime's business.
`sedac::either` does nothing: it stands for one of two ways until a graph is compiled (compiled_steps.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema
from vllm.forward_context import get_forward_context


def _runtime(name: str) -> Any:
    return get_forward_context().no_compile_layers[name]


def checkpoint(
    hidden: Tensor, residual: Tensor, margin: Tensor | None, index: int, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(_runtime(name).checkpoint(index, hidden, residual, margin))


def checkpoint_fake(
    hidden: Tensor, residual: Tensor, margin: Tensor | None, index: int, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(tokens, dtype=torch.int64),
        hidden.new_empty(1, dtype=torch.int32),
        hidden.new_empty(tokens, dtype=torch.bool),
    )


def rules(hidden: Tensor, checkpoints: int, name: str) -> tuple[Tensor, Tensor]:
    return _runtime(name).rules(len(hidden))


def rules_fake(hidden: Tensor, checkpoints: int, name: str) -> tuple[Tensor, Tensor]:
    thresholds = hidden.new_empty(checkpoints, hidden.shape[0], dtype=torch.float32)
    return thresholds, hidden.new_empty(1, dtype=torch.bool)


def count(decided: Tensor, n_running: Tensor, name: str) -> Tensor:
    """Returns n_running, which the layers behind it need: nothing else would keep this in the graph."""
    _runtime(name).count(decided)
    return n_running.clone()


def count_fake(decided: Tensor, n_running: Tensor, name: str) -> Tensor:
    return torch.empty_like(n_running)


def mlp(x: Tensor, rows: Tensor, n_running: Tensor, layer: Tensor, name: str) -> Tensor:
    return _runtime(name).mlp(x, rows, n_running, int(layer))


def mlp_fake(x: Tensor, rows: Tensor, n_running: Tensor, layer: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def either(skipping: Tensor, whole: Tensor) -> Tensor:
    raise RuntimeError(
        "SEDAC: this graph was compiled without the pass that picks one of two ways (compiled_steps.py): start with "
        "--enforce-eager, and report which vLLM and torch this is"
    )


def either_fake(skipping: Tensor, whole: Tensor) -> Tensor:
    return torch.empty_like(skipping)


def gate(x: Tensor, leader: int, name: str) -> Tensor:
    return _runtime(name).gate(x, leader)


def gate_fake(x: Tensor, leader: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def gated_mlp(
    hidden: Tensor, residual: Tensor, least: Tensor | None, layer: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _runtime(name).gated_mlp(hidden, residual, least, int(layer))


def gated_mlp_fake(
    hidden: Tensor, residual: Tensor, least: Tensor | None, layer: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(residual), hidden.new_empty(hidden.shape[0], dtype=torch.int32)


def narrowed_mlp(x: Tensor, level: Tensor, layer: Tensor, name: str) -> Tensor:
    return _runtime(name).narrowed_mlp(x, level, int(layer))


def narrowed_mlp_fake(x: Tensor, level: Tensor, layer: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def layer_numbers(layers: int) -> tuple[Tensor, ...]:
    """The layers' numbers as these operators take them, `[]` each, int64, on the host whatever torch's default device is."""
    return tuple(torch.tensor(layer, device="cpu") for layer in range(layers))


_library = Library("sedac", "DEF")  # torch.library.custom_op costs tens of microseconds more a call
for _name, _op, _fake in (
    ("checkpoint", checkpoint, checkpoint_fake),
    ("rules", rules, rules_fake),
    ("count", count, count_fake),
    ("mlp", mlp, mlp_fake),
    ("either", either, either_fake),
    ("gate", gate, gate_fake),
    ("gated_mlp", gated_mlp, gated_mlp_fake),
    ("narrowed_mlp", narrowed_mlp, narrowed_mlp_fake),
):
    _library.define(_name + infer_schema(_op, mutates_args=()))
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    _library._register_fake(_name, _fake)
