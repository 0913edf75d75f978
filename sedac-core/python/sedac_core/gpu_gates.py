"""What gates' operators do on a GPU, inside CUDA graphs: two of the four ways of a cascade (gpu_cascade.py), for the whole step.

Predicated, by kernels that decide, too, in captured steps and in large ones that are not captured, and dense. A step or a recording
that does not skip runs no gate, and each of its tokens the whole MLP, which is never worse for the answer. No step reads a number
back: which way a large one goes, and which recording of a captured one is replayed, follows from what steps before it narrowed. Neurons
are put in the order of their importance when the model loads, with the adapters' behind them in the same tensor: vLLM's own MLP runs
on views of it. Levels in bits a weight leave an MLP's own weights alone and put planes of them beside (precision.py): captured steps of
few tokens read those, all others run dense, as four bits save no arithmetic.
"""

import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from . import gate_kernels, kernels, polling, step_counters
from .compiled_steps import compile_apart, joins
from .control import Change
from .gate_parts import DeviceGate
from .gates_runtime import GatesRuntime, before_packing
from .gpu_mlps import WholeMlps, dense
from .gpu_steps import captures, log_other_gpu, slots, spans, static_limit
from .kernels import MlpSettings, Weights
from .norm_kernels import Norm, normed
from .policy_gates import GatedWidths
from .polling import SeenLevels
from .recordings import LOOK_EVERY, Pick, record_twice
from .settings import Settings

logger = init_logger("vllm.sedac")

# Floating-point operations of one MLP from which on a step that is not captured may run by the kernels: they are five launches more a
# layer than the MLP is, and the host must get so far ahead of the GPU that it can make them. 8,192 tokens of 3B have 1.1e12.
LARGE_FROM = 1e12
# Of the tokens whose gates ran, how many later ones make one count half in what the host picks recordings by. Where narrowing pays
# from a share s of rows on, a text that narrows all is followed after 16 · log2(1 / (1 - s)) tokens seen, and back after
# 16 · log2(1 / s): at one token a step and s = 22 % after 6 looks, one every 32 steps (recordings.py), and after 35 steps.
REMEMBERED = 16


class GpuGates(GatesRuntime):
    """Gates inside CUDA graphs: in each layer one operator decides and runs the MLP."""

    def __init__(self, name: str, model: nn.Module, policy: GatedWidths, settings: Settings, vllm_config: Any):
        super().__init__(name, model, policy, settings)
        shape = policy.shape
        self.num_layers = shape.num_layers
        self.mlps = [layer.mlp for layer in model.layers]
        self.norms = [layer.post_attention_layernorm for layer in model.layers]
        self.weights: list[Weights | None] = [None] * self.num_layers  # once the model is loaded
        self.gates: dict[int, DeviceGate] = {}
        for index in self.window:
            before_packing(self.mlps[index], partial(self.narrow, index))
        own = step_counters.new_counters(len(shape.levels), policy.prices.device)
        self.counted = torch.stack([own, own])  # of captured steps whose gates ran, and of all others
        self.by_kernels, self.otherwise = self.counted
        self.apart = torch.zeros_like(own)  # vLLM's own runs
        down = self.mlps[0].down_proj.weight
        self.static_limit = static_limit(vllm_config)
        operations = 2 * 3 * down.numel()  # of an MLP for a token
        large_from = max(self.static_limit + 1, int(LARGE_FROM / operations))
        self.large_from: float = math.inf if shape.bits else large_from
        self.large_runs = False  # the uncaptured step under way, by the kernels
        self.whole = WholeMlps({layer: self.mlps[layer] for layer in self.window})
        self.twice = captures(vllm_config)
        if any(map(self.second, range(1, self.static_limit + 1))):
            self.twice = record_twice()
        # Which recording of a captured step, and which way of a large one; they look each at its own times.
        self.pick, self.large = Pick(self.gains, []), Pick(self.gains, [])
        self.whole_in_graph = compile_apart(vllm_config, self.runs_whole)
        self.forget()
        self.log_paths()
        polling.start(self, SeenLevels)

    def log_paths(self) -> None:
        """Which steps run gates."""
        if self.policy.shape.bits and not self.kernels_run:
            logger.warning(
                "SEDAC: no kernel of levels in bits is known to be faster than the whole MLP for this model on a GPU: every MLP runs "
                "whole, and nothing is saved"
            )
            return
        sizes = range(1, self.static_limit + 1)
        inside = spans([tokens for tokens in sizes if self.always(tokens)])
        second = spans([tokens for tokens in sizes if self.second(tokens)])
        found = [f"of {inside} tokens by kernels"] if inside else []
        found += [f"of {second} tokens by a second recording while enough of their rows narrow"] if second else []
        if self.large_from < math.inf and (self.always(self.large_from) or self.second(self.large_from)):
            found.append(f"of {self.large_from} or more by kernels while enough of their rows narrow")
        logger.info(
            "SEDAC: gates narrow MLPs in steps %s; in steps of other sizes, where the kernels do not win or were never timed, "
            "every MLP runs whole and nothing is saved",
            ", ".join(found),
        )
        shape = self.policy.shape
        log_other_gpu("rounded" if shape.bits else "gates", shape.hidden_size, shape.intermediate_size)

    def narrow(self, layer: int) -> None:
        """Put one loaded MLP's neurons in their order and its adapters behind them, so that vLLM's own layers become views, or its
        planes beside it."""
        mlp, gates, shape = self.mlps[layer], self.policy.gates, self.policy.shape
        gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        order = gates.order[layer].to(down.device)
        if shape.bits:
            if self.kernels_run:  # else nobody reads planes
                self.weights[layer] = Weights.rounded(gate_up.data, down.data, order, shape.widths)
        else:
            weights = Weights.narrowed(gate_up.data, down.data, order, gates.banks[layer].to(down.device), shape.widths)
            gate_up.data = weights.gate_up[: 2 * weights.neurons]
            down.data = weights.down[:, : weights.neurons]
            self.weights[layer] = weights
            gates.banks[layer] = nn.Identity()  # what it held is now in the weights
        if layer in self.leaders:
            gate, gain, group = gates.gates[str(layer)], self.policy.gains[layer], len(shape.group(layer))
            outside = shape.num_layers - len(shape.window)
            self.gates[layer] = DeviceGate.make(gate, gain, group, layer == self.leaders[0], down.data, outside)

    def tuned(self, tokens: int) -> MlpSettings:
        shape = self.policy.shape
        sizes = shape.hidden_size, shape.intermediate_size
        return kernels.mlp_settings(tokens, *sizes, gated=True, rounded=bool(shape.bits))

    def always(self, tokens: int) -> bool:
        """Whether steps of so many tokens run by the kernels whatever narrows."""
        within = tokens <= self.static_limit or tokens >= self.large_from
        return within and self.tuned(tokens).path == "predicated"

    def second(self, tokens: int) -> MlpSettings | None:
        """The settings of a step that runs by the kernels while enough of its rows narrow, else None: a captured one that has a second
        recording (recordings.py), or a large one."""
        found, levels = self.tuned(tokens), self.timed_levels
        within = self.twice if tokens <= self.static_limit else tokens >= self.large_from
        if not within or not found.us:
            return None
        narrowest = [0.0] * (len(levels) - 1) + [1.0]
        return found if found.gains_narrowed(narrowest, levels, tokens) > 0 else None

    def runs_whole(self, tokens: int) -> bool:
        """Whether every step of so many tokens runs all MLPs whole."""
        return not self.always(tokens) and self.second(tokens) is None

    @cached_property
    def kernels_run(self) -> bool:
        """Whether there is a size whose captured steps can run by the kernels."""
        sizes = range(1, self.static_limit + 1)
        return any(self.always(tokens) or self.second(tokens) for tokens in sizes)

    @property
    def timed_levels(self) -> tuple[float, ...]:
        """The levels as the settings' times name them."""
        return self.policy.shape.bits or self.policy.shape.widths

    def gains(self, tokens: int, shares: Sequence[float]) -> float | None:
        """Microseconds that the kernels save an MLP of a step of so many tokens, if it may run without them and these shares of its
        rows run at each level."""
        second = self.second(tokens)
        return None if second is None else second.gains_narrowed(shares, self.timed_levels, tokens)

    def path(self, tokens: int) -> str:
        """The way of the step that is being captured, or runs without a graph, through its MLPs."""
        if tokens > self.static_limit:
            return "predicated" if self.large_runs else "dense"
        return "predicated" if self.always(tokens) or (self.pick.captured and self.second(tokens)) else "dense"

    def skips(self, tokens: int) -> bool:
        """Whether the next step of so many tokens, captured if it is small, saves anything where tokens narrow."""
        pick = self.pick if tokens <= self.static_limit else self.large
        return self.always(tokens) or pick.pays(tokens)

    def ran(self, tokens: int, rows: Sequence[int]) -> None:
        """Steps whose gates ran had so many tokens, whose rows ran at each level, `[levels]`. Picks what runs next by the share of rows
        at each level, in which a token counts half as much once as many came after it as REMEMBERED says."""
        for pick in (self.pick, self.large):
            pick.saw(rows, 0.5 ** (tokens / REMEMBERED))

    def forget(self) -> None:
        """Another price is in force: what ran before says nothing. Looks where any price lets a gate narrow."""
        for pick in (self.pick, self.large):
            pick.forget([1.0] + [0.0] * (len(self.policy.shape.levels) - 1))
            pick.look = bool((self.policy.prices > -torch.inf).any())
        self.large.waited = LOOK_EVERY  # the next such step is a look

    def change(self, change: Change) -> None:
        super().change(change)
        self.forget()

    def run_layer(
        self,
        idx: int,
        layer: nn.Module,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        level: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A leader is vLLM's own layer line by line, but that the norm before the MLP is inside of the operator, where it decides as well.
        The first leader's operator counts, and so stands in every graph."""
        if idx not in self.leaders:
            return super().run_layer(idx, layer, positions, hidden, residual, level)
        if residual is None:
            hidden, residual = layer.input_layernorm(hidden), hidden
        else:
            hidden, residual = layer.input_layernorm(hidden, residual)
        hidden = layer.self_attn(positions=positions, hidden_states=hidden)
        least = None if self.policy.shape.leader_before(idx) is None else level
        out = torch.ops.sedac.gated_mlp(hidden, residual, least, self.numbers[idx], self.name)
        if idx == self.leaders[0] or not joins(self.whole_in_graph):
            return out
        x, summed = layer.post_attention_layernorm(hidden, residual)
        return tuple(map(torch.ops.sedac.either, out, (layer.mlp(x), summed, level)))

    def narrowed(self, layer: int, mlp: nn.Module, level: Tensor, x: Tensor) -> Tensor:
        out = super().narrowed(layer, mlp, level, x)
        return torch.ops.sedac.either(out, mlp(x)) if joins(self.whole_in_graph) else out

    # Behind the operators.

    def gated_mlp(
        self, hidden: Tensor, residual: Tensor, least: Tensor | None, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On the norm of hidden plus residual, both `[tokens, hidden]`, a leader decides for its group, no level below `least` `[tokens]`,
        int32, and its own MLP runs: output and that sum `[tokens, hidden]` and level `[tokens]`, int32, which nobody reads where the
        step runs whole."""
        tokens, prices, chosen, gate = len(hidden), self.policy.prices, self.token_rows, self.gates[layer]
        own, norm = slots(), self.norm(layer)
        if gate.first and tokens > self.static_limit:  # a run of vLLM's own is to need as much memory as any
            picked = self.second(tokens) if own is None else self.large.skipping(tokens)
            self.large_runs = self.always(tokens) or bool(picked)
        if self.path(tokens) == "predicated":
            decides = (gate, prices, own, self.apart if own is None else self.by_kernels)
            return kernels.gated_mlp(hidden, residual, norm, self.weights[layer], *decides, chosen=chosen, least=least)
        if gate.first and own is not None:
            gate_kernels.count_whole(own, tokens, self.num_layers, self.otherwise, prices, chosen)
        x, summed = normed(hidden, residual, norm)
        return self.run_whole(x, layer), summed, torch.empty(tokens, dtype=torch.int32, device=x.device)

    def norm(self, layer: int) -> Norm:
        """The norm before a layer's MLP."""
        own = self.norms[layer]
        return Norm(own.weight, own.variance_epsilon)

    def narrowed_mlp(self, x: Tensor, level: Tensor, layer: int) -> Tensor:
        """The MLP of a layer that follows a leader, at the levels that it decided."""
        if self.path(len(x)) == "predicated":
            return kernels.narrowed_mlp(x, self.weights[layer], level)
        return self.run_whole(x, layer)

    def run_whole(self, x: Tensor, layer: int) -> Tensor:
        return self.whole[layer](x) if len(x) > self.static_limit else dense(self.mlps[layer], x)
