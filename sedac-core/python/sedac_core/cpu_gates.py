"""What gates' operators do on a CPU: in each layer two opaque operators stand in the MLP's place.

`sedac::gate` lets a group's leader decide, `sedac::narrowed_mlp` runs each token's level on the tokens that have it. A narrowed
MLP is a smaller MLP: an adapter is a few SwiGLU neurons and a bias, so the most important neurons and the adapter's stand
side by side in weights of their own, a copy for each width, packed by the routine that packs vLLM's own linear layers.
The copies take about as much memory as the MLPs do (0.7 + 0.35 of it at the default levels). Prefixes of one permuted
copy would take as much, since vLLM keeps its packed weights to itself, and unpacked ones are slower (docs/LOG.md). The whole
MLP stays vLLM's own, so that tokens that narrow nothing compute exactly what stock computes. A level in bits runs torch's product
of four-bit weights on the planes that it reads; they take 53 % of a bf16 model's MLPs beside these. That product is made for few
tokens: larger steps run whole, which is never worse for the answer.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.logger import init_logger
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from .adapter import AdapterBank
from .cpu_cascade import ROW_STEP, actual_tokens, dense
from .gates import by_level
from .gates_runtime import GatesRuntime, before_packing
from .policy_gates import GatedWidths
from .precision import GROUP, MOST_ROUNDED, Planes, planes_of
from .settings import Settings

logger = init_logger("vllm.sedac")


class CpuGates(GatesRuntime):
    """One model's gates on a CPU: what its two operators do."""

    def __init__(self, name: str, model: nn.Module, policy: GatedWidths, settings: Settings, vllm_config: Any):
        super().__init__(name, model, policy, settings)
        shape = policy.shape
        self.last = self.window[-1]
        # By layer, what runs tokens of each level.
        self.runs: list[list[Callable[[Tensor], Tensor]]] = [[partial(dense, layer.mlp)] for layer in model.layers]
        for index in self.window:
            mlp = model.layers[index].mlp
            before_packing(mlp, partial(self.add_narrowed, index, mlp))
        if shape.bits:
            logger.warning(
                "SEDAC: levels in bits are not faster than whole MLPs on CPUs so far, and much slower in float32, which has no fast product "
                "of four-bit weights: serve them to look at their answers"
            )
        self.whole = False  # whether the step under way is too large for levels in bits
        self.level = torch.empty(0)  # [tokens], the latest leader's
        self.tokens = 0  # real tokens of the step under way; padding and dummy runs do not count
        self.rows: Tensor | None = None  # [tokens]: each one's row of the policy's prices, where a request chose one
        self.level_rows = torch.zeros(len(shape.levels), dtype=torch.int64)  # their MLP rows by level

    def add_narrowed(self, layer: int, mlp: nn.Module) -> None:
        gates, widths = self.policy.gates, self.policy.shape.widths
        if self.policy.shape.bits:
            planes = PackedPlanes(mlp, gates.order[layer], widths[1:])
            self.runs[layer] += [RoundedLevel(planes, width) for width in widths[1:]]
            return
        for level, width in enumerate(widths[1:], 1):
            narrowed = NarrowedMLP(mlp, gates.banks[layer], gates.order[layer, :width], level)
            self.runs[layer].append(partial(dense, narrowed))
        gates.banks[layer] = nn.Identity()  # what it held is now in the narrowed MLPs

    # Behind the operators.

    def gate(self, x: Tensor, leader: int) -> Tensor:
        """The level `[tokens]` of each token in the layers that follow this leader, x `[tokens, hidden]`."""
        shape = self.policy.shape
        if leader == self.leaders[0]:
            self.tokens = actual_tokens()
            self.rows = self.rows_chosen(len(x))
            self.level_rows.zero_()
            self.level_rows[0] = self.tokens * (shape.num_layers - len(self.window))
            self.whole = bool(shape.bits) and len(x) > MOST_ROUNDED
        level = torch.zeros(len(x), dtype=torch.int64) if self.whole else self.policy.level(leader, x, self.rows)
        if shape.leader_before(leader) is not None:
            level = torch.maximum(level, self.level)
        self.level = level
        rows = torch.bincount(level[: self.tokens], minlength=len(self.level_rows))
        self.level_rows += len(shape.group(leader)) * rows
        return level

    def narrowed_mlp(self, x: Tensor, level: Tensor, layer: int) -> Tensor:
        """The MLP of `layer` at each token's level, `[tokens, hidden]`."""
        out = by_level(self.runs[layer], x, level, ROW_STEP)
        if layer == self.last and self.tokens:
            self.end_step()
        return out

    def end_step(self) -> None:
        levels, steps = self.level_rows.tolist(), self.counters.steps
        self.counters.add(self.tokens, levels)
        self.counters.path("gather" if any(levels[1:]) else "dense")
        if not self.enabled:
            self.counters.fallback("switched off", self.tokens)
        else:
            off = 0 if self.rows is None else int((self.rows[: self.tokens] == 1).sum())
            self.counters.fallback("request", off)
            if self.whole:
                self.counters.fallback("dense", self.tokens - off)
        self.report(self.policy.log_lambda.item(), steps)


class NarrowedMLP(nn.Module):
    """One level of one of vLLM's MLPs: some of its neurons, and the adapter that stands in for the others."""

    def __init__(self, mlp: nn.Module, bank: AdapterBank, kept: Tensor, level: int):
        """`kept` `[width]`: the neurons that this level keeps. The MLP's weights must not be packed yet."""
        super().__init__()
        gate, up = mlp.gate_up_proj.weight.chunk(2)  # [intermediate, hidden]
        down = mlp.down_proj.weight  # [hidden, intermediate]
        adapter_gate, adapter_up, adapter_down, bias = (weight.to(down.dtype) for weight in bank.own(level))
        self.gate_up_proj = PackedLinear(torch.cat([gate[kept], adapter_gate, up[kept], adapter_up]))
        self.down_proj = PackedLinear(torch.cat([down[:, kept], adapter_down], 1), bias)


class PackedLinear(nn.Module):
    """A linear layer in the form in which vLLM's own run fastest on this CPU; `linear` runs it."""

    tp_size = 1

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)


class PackedPlane(nn.Module):
    """One plane of a weight `[out, in]` as torch's product of four-bit weights reads it: values q stand for
    `step · (q - 8) + middle`; steps and middles `[out, in / GROUP]`."""

    def __init__(self, values: Tensor, step: Tensor, middle: Tensor, like: torch.dtype):
        super().__init__()
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int().contiguous(), 1)
        self.scale = torch.stack([step, middle], -1).transpose(0, 1).to(like).contiguous()  # [in / GROUP, out, 2]

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.weight, GROUP, self.scale)


class PackedPlanes(nn.Module):
    """The planes of one of vLLM's MLPs: the high ones whole, the low ones cut where levels end, so that a level reads its own."""

    def __init__(self, mlp: nn.Module, order: Tensor, widths: Sequence[int]):
        """order `[neurons]`, the most important first; widths: how many of them each level reads in eight bits. The MLP's weights
        must not be packed yet."""
        super().__init__()
        gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        pair = planes_of(gate_up, down, order)
        (step_in, least_in), (step_out, least_out) = (planes.scale.float().unbind(-1) for planes in pair)
        both, across = pair

        def high(planes: Planes, step: Tensor, least: Tensor) -> PackedPlane:
            return PackedPlane(planes.high_values(), step, least + 8 * step, down.dtype)

        def low(values: Tensor, step: Tensor) -> PackedPlane:
            return PackedPlane(values, step / 16, torch.zeros_like(step), down.dtype)

        self.gate_up, self.down = high(both, step_in, least_in), high(across, step_out, least_out)
        self.parts = [slice(*ends) for ends in itertools.pairwise(sorted({0, *widths}))]
        self.fine_gate_up, self.fine_down = nn.ModuleList(), nn.ModuleList()
        low_in, low_out = both.low_values(), across.low_values()
        for part in self.parts:
            own = torch.cat([torch.arange(part.start, part.stop) + start for start in (0, len(order))])
            groups = slice(part.start // GROUP, part.stop // GROUP)
            self.fine_gate_up.append(low(low_in[own], step_in[own]))
            self.fine_down.append(low(low_out[:, part], step_out[:, groups]))


class RoundedLevel(nn.Module):
    """One level in bits of one of vLLM's MLPs."""

    def __init__(self, planes: PackedPlanes, width: int):
        super().__init__()
        self.planes = planes
        self.fine = [i for i, part in enumerate(planes.parts) if part.stop <= width]

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        planes = self.planes
        gate, up = planes.gate_up(x).chunk(2, -1)  # [tokens, neurons]
        for i in self.fine:
            fine_gate, fine_up = planes.fine_gate_up[i](x).chunk(2, -1)
            gate[:, planes.parts[i]] += fine_gate
            up[:, planes.parts[i]] += fine_up
        inner = F.silu(gate).mul_(up)
        out = planes.down(inner)
        for i in self.fine:
            out += planes.fine_down[i](inner[:, planes.parts[i]])
        return out
