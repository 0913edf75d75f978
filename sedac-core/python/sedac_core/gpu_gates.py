"""What gates' operators do on a GPU, inside CUDA graphs: three of the four ways of a cascade (gpu_runtime.py), for the whole step.

Predicated, up to the largest captured size, by kernels that decide, too; gather, in large steps that are not captured; dense. A step
or a recording that does not skip runs no gate, and each of its tokens the whole MLP, which is never worse for the answer. Neurons are
put in the order of their importance when the model loads, with the adapters' behind them in the same tensor: vLLM's own MLP runs
on views of it. Levels in bits a weight leave an MLP's own weights alone and put planes of them beside (precision.py): captured steps of
few tokens read those, all others run dense, as four bits save no arithmetic.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger

from . import gate_kernels, kernels, polling
from .control import Change
from .gate_kernels import DeviceGate
from .gates_runtime import PricedGates, before_packing
from .gpu_mlps import WholeMlps, dense
from .gpu_runtime import captures, slots, spans, static_limit
from .kernels import MlpSettings, Weights
from .policy_gates import GatedWidths
from .polling import SeenLevels
from .recordings import LOOK_EVERY, Pick, record_twice
from .settings import Settings

logger = init_logger("vllm.sedac")

# Floating-point operations of one MLP from which on gathering may pay, though every layer is read back. 8,192 tokens of 3B, 1.1e12 of
# them, gain by it once half of the tokens narrow; 2,048 take up to twice as long as dense (docs/results/gpu_gates_h200.json,
# gathered whatever it saves).
GATHER_FROM = 1e12
# What deciding, reading back and gathering cost in every layer then, in operations of its MLP. Of 8,192 tokens that takes 13 ms of 7B's
# 28 layers and 6 ms of 3B's 36 where nothing narrows; the 3.2e11 that a width of 0.7 saves each of 3B's MLPs do not pay for it, and
# the 5.5e11 of half the tokens do (same file). Steps gather while more than that is saved.
GATHER_COST = 3.5e11
# Of the tokens whose gates ran, how many later ones make one count half in what the host picks recordings by. Where narrowing pays
# from a share s of rows on, a text that narrows all is followed after 16 · log2(1 / (1 - s)) tokens seen, and back after
# 16 · log2(1 / s): at one token a step and s = 22 % after 6 looks, one every 32 steps (recordings.py), and after 35 steps.
REMEMBERED = 16


class GpuGates(PricedGates):
    """Gates inside CUDA graphs: in each layer one operator decides and runs the MLP."""

    def __init__(self, name: str, model: nn.Module, policy: GatedWidths, settings: Settings, vllm_config: Any):
        super().__init__(name, model, policy, settings)
        shape = policy.shape
        self.num_layers = shape.num_layers
        self.mlps = [layer.mlp for layer in model.layers]
        self.weights: list[Weights | None] = [None] * self.num_layers  # once the model is loaded
        self.gates: dict[int, DeviceGate] = {}
        for index in self.window:
            before_packing(self.mlps[index], partial(self.narrow, index))
        own = gate_kernels.new_counters(len(shape.levels), policy.prices.device)
        self.counted = torch.stack([own, own])  # of captured steps whose gates ran, and of all others
        self.by_kernels, self.otherwise = self.counted
        down = self.mlps[0].down_proj.weight
        self.static_limit = static_limit(vllm_config)
        self.mlp_operations = 2 * 3 * down.numel()  # for a token
        gather_from = max(self.static_limit + 1, int(GATHER_FROM / self.mlp_operations))
        self.gather_from = math.inf if shape.bits else gather_from
        self.gather_cost = GATHER_COST
        self.gathers = False  # the uncaptured step under way
        self.gathered: tuple[Tensor, list[int]] | None = None  # rows by level and their counts, of an uncaptured step
        self.large = Pick(self.gains_gathered, [])
        self.whole = WholeMlps({layer: self.mlps[layer] for layer in self.window})
        self.twice = captures(vllm_config)
        if any(map(self.second, range(1, self.static_limit + 1))):
            self.twice = record_twice()
        self.pick = Pick(self.gains, [])
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
        inside = spans([tokens for tokens in sizes if self.tuned(tokens).path == "predicated"])
        second = spans([tokens for tokens in sizes if self.second(tokens)])
        found = [f"of {inside} tokens by kernels"] if inside else []
        found += [f"of {second} tokens by a second recording while enough of their rows narrow"] if second else []
        if self.gather_from < math.inf:
            found.append(f"of {self.gather_from} or more by gathering rows while enough of them narrow")
        logger.info(
            "SEDAC: gates narrow MLPs in steps %s; in steps of other sizes, where the kernels do not win or were never timed, "
            "every MLP runs whole and nothing is saved",
            ", ".join(found),
        )

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

    def second(self, tokens: int) -> MlpSettings | None:
        """The settings of a captured step that has a second recording, by the kernels (recordings.py); else None."""
        found, levels = self.tuned(tokens), self.timed_levels
        if not self.twice or tokens > self.static_limit or not found.us:
            return None
        narrowest = [0.0] * (len(levels) - 1) + [1.0]
        return found if found.gains_narrowed(narrowest, levels, tokens) > 0 else None

    @cached_property
    def kernels_run(self) -> bool:
        """Whether there is a size whose captured steps can run by the kernels."""
        sizes = range(1, self.static_limit + 1)
        return any(self.tuned(tokens).path == "predicated" or self.second(tokens) for tokens in sizes)

    @property
    def timed_levels(self) -> tuple[float, ...]:
        """The levels as the settings' times name them."""
        return self.policy.shape.bits or self.policy.shape.widths

    def gains(self, tokens: int, shares: Sequence[float]) -> float | None:
        """Microseconds that the kernels save an MLP of a step of so many tokens, if it is recorded twice and these shares of its
        rows run at each level."""
        second = self.second(tokens)
        return None if second is None else second.gains_narrowed(shares, self.timed_levels, tokens)

    def path(self, tokens: int) -> str:
        """The way of the step that is being captured, or runs without a graph, through its MLPs."""
        if tokens > self.static_limit:
            return "gather" if self.gathers else "dense"
        kernels_run = self.tuned(tokens).path == "predicated" or (self.pick.captured and self.second(tokens))
        return "predicated" if kernels_run else "dense"

    def skips(self, tokens: int) -> bool:
        """Whether the next step of so many tokens, captured if it is small, saves anything where tokens narrow."""
        if tokens > self.static_limit:
            return self.large.pays(tokens)
        return self.path(tokens) != "dense" or self.pick.pays(tokens)

    def ran(self, tokens: int, rows: Sequence[int]) -> None:
        """Captured steps whose gates ran had so many tokens, whose rows ran at each level, `[levels]`. Picks a recording by the
        share of rows at each level, in which a token counts half as much once as many came after it as REMEMBERED says."""
        self.pick.saw(rows, 0.5 ** (tokens / REMEMBERED))

    def gains_gathered(self, tokens: int, shares: Sequence[float]) -> float | None:
        """Operations that gathering saves in an MLP of an uncaptured step of so many tokens where these shares of rows run at each
        level; None where such steps never gather."""
        saved = sum(share * saved for share, saved in zip(shares, self.policy.shape.saved, strict=True))
        return None if tokens < self.gather_from else saved * tokens * self.mlp_operations - self.gather_cost

    def forget(self) -> None:
        """Another price is in force: what ran before says nothing. Looks where any price lets a gate narrow."""
        for pick in (self.pick, self.large):
            pick.forget([1.0] + [0.0] * (len(self.policy.shape.levels) - 1))
            pick.look = bool((self.policy.prices > -torch.inf).any())
        self.large.waited = LOOK_EVERY  # the next such step is a look

    def change(self, change: Change) -> None:
        super().change(change)
        self.forget()

    def decided(self, leader: int, x: Tensor, level: Tensor | None) -> tuple[Tensor, Tensor]:
        least = None if self.policy.shape.leader_before(leader) is None else level
        return torch.ops.sedac.gated_mlp(x, least, leader, self.name)

    # Behind the operators.

    def gated_mlp(self, x: Tensor, least: Tensor | None, layer: int) -> tuple[Tensor, Tensor]:
        """A leader decides for its group, no level below `least` `[tokens]`, int32, and its own MLP runs: output
        `[tokens, hidden]` and level `[tokens]`, int32, which nobody reads where the step runs whole."""
        tokens, prices, chosen, gate = len(x), self.policy.prices, self.token_rows, self.gates[layer]
        own = slots()
        if gate.first and tokens > self.static_limit:  # a run of vLLM's own is to need as much memory as any
            self.gathers = tokens >= self.gather_from if own is None else self.large.skipping(tokens)
        path = self.path(tokens)
        if path == "predicated":
            decides = (gate, prices, own, self.by_kernels)
            return kernels.gated_mlp(x, self.weights[layer], *decides, chosen=chosen, path=path, least=least)
        if path == "gather":
            level, rows, ends = gate_kernels.levels_of(x, gate, prices, own, self.otherwise, chosen, path, least)
            counts = [after - before for before, after in itertools.pairwise([0, *ends.tolist()])]
            self.gathered = rows, counts
            if own is not None:  # a step of tokens; the next one makes it count half
                self.large.saw([gate.group * count for count in counts], 0.5 if gate.first else 1.0)
            return self.by_level(x, layer), level
        if gate.first:
            gate_kernels.count_whole(own, tokens, self.num_layers, self.otherwise, prices, chosen)
        return self.run_whole(x, layer), torch.empty(tokens, dtype=torch.int32, device=x.device)

    def narrowed_mlp(self, x: Tensor, level: Tensor, layer: int) -> Tensor:
        """The MLP of a layer that follows a leader, at the levels that it decided."""
        path = self.path(len(x))
        if path == "predicated":
            return kernels.narrowed_mlp(x, self.weights[layer], level)
        if path == "gather":
            return self.by_level(x, layer)
        return self.run_whole(x, layer)

    def run_whole(self, x: Tensor, layer: int) -> Tensor:
        return self.whole[layer](x) if len(x) > self.static_limit else dense(self.mlps[layer], x)

    def by_level(self, x: Tensor, layer: int) -> Tensor:
        return kernels.by_level(x, self.weights[layer], *self.gathered, self.whole[layer])
