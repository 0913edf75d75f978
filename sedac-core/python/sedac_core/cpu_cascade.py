"""What a cascade does on a CPU."""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.forward_context import get_forward_context

from .cascade_runtime import CascadeRuntime
from .policy import Exits, HardExit
from .settings import Settings

# Above this many rows, a gathered MLP runs for a multiple of it: each new row count costs oneDNN a compilation.
ROW_STEP = 16


class CpuExits(NamedTuple):
    """`Exits` on a CPU, with what the step's counting wants to know at its end."""

    margin: Tensor
    rows: Tensor
    n_running: Tensor
    rules: tuple[Tensor, Tensor]  # what `sedac::rules` found
    decided: tuple[Tensor, ...]  # risk [tokens] and margin [tokens] of each checkpoint so far


class CpuCascade(CascadeRuntime):
    """On the CPU: checkpoints are traced like the layers around them, and the running rows are gathered.

    Between kernels that stream a model's weights through the caches an operator in Python, and each of torch's in it, costs
    ten times what it costs alone (docs/LOG.md). So there are few: `sedac::rules` and `sedac::count` once a step, and
    `sedac::mlp` only where a token has exited; otherwise a compiled graph runs stock's own MLP. With LoRA adapters it always is
    the operator that runs it, since what they add to it is not made to be traced in a branch.
    """

    def __init__(self, name: str, model: nn.Module, policy: HardExit, settings: Settings, vllm_config: Any):
        super().__init__(name, model, policy, settings)
        self.lora = vllm_config.lora_config is not None

    # Traced by torch.compile.

    def decide(self, index: int, hidden: Tensor, residual: Tensor, exits: CpuExits | None) -> CpuExits:
        rules = torch.ops.sedac.rules(hidden, len(self.checkpoints), self.name) if exits is None else exits.rules
        thresholds, taken = rules
        margin, decided = (None, ()) if exits is None else (exits.margin, exits.decided)
        risk, now = self.policy.step(index, hidden + residual, margin, thresholds[index])
        decided = (*decided, risk, now.margin)
        n_running = torch.where(taken, now.n_running, len(hidden))
        if index == len(self.checkpoints) - 1:
            n_running = torch.ops.sedac.count(torch.stack(decided), n_running, self.name)
        return CpuExits(now.margin, now.rows, n_running, rules, decided)

    def skipping(self, layer: int, mlp: nn.Module, exits: Exits, x: Tensor) -> Tensor:
        some = functools.partial(super().skipping, layer, mlp, exits)
        if self.lora or not torch.compiler.is_compiling():  # torch.cond would compile at each call
            return some(x)
        return torch.cond(exits.n_running == x.shape[0], mlp, some, (x,))

    # Behind the operators.

    def rules(self, tokens: int) -> tuple[Tensor, Tensor]:
        """At the start of a step: each token's thresholds `[checkpoints, tokens]`, and whether exits are taken `[1]`, bool.

        New tensors: a graph that read the policy's table itself could read it once more after `count` has changed it.
        """
        rows = self.rows_chosen(tokens)
        row = (
            self.policy.thresholds[:, None].repeat(1, tokens)
            if rows is None
            else self.policy.table[rows].t().contiguous()
        )
        return row, torch.tensor([not self.watching])

    def mlp(self, x: Tensor, rows: Tensor, n_running: Tensor, layer: int) -> Tensor:
        running = int(n_running)
        if running == len(x):
            return dense(self.mlps[layer], x)
        if self.some_adapted:
            out = dense(self.mlps[layer], x)
            out[rows[running:]] = 0
            return out
        out = torch.zeros_like(x)
        if running:
            computed = rows[: computed_rows(running, len(x))]
            out[computed] = dense(self.mlps[layer], x[computed])
            out[computed[running:]] = 0
        return out

    def count(self, decided: Tensor) -> None:
        """At the end of a step: risks and margins `[2 * checkpoints, tokens]`, of each checkpoint one after the other."""
        tokens = actual_tokens()
        if not tokens:  # a dummy run of vLLM's
            return
        rows, watched, steps = decided.shape[1], self.watching, self.counters.steps
        risk, margin = decided.numpy()[0::2], decided.numpy()[1::2]
        running = margin < np.inf
        left = running[:, :tokens].sum(1).tolist()
        reached = np.concatenate([np.ones((1, tokens), bool), running[:-1, :tokens]])
        exits = (
            [0] * len(left) if watched else [before - after for before, after in itertools.pairwise([tokens, *left])]
        )
        whole = watched or self.some_adapted
        run = [rows] * len(left) if whole else running.sum(1).tolist()
        computed = tokens * (self.policy.num_layers - len(self.window))  # layers that run whole for every token
        computed += sum(
            ahead * computed_rows(number, rows) for ahead, number in zip(self.layers_ahead, run, strict=True)
        )
        self.counters.path("gather" if any(exits) and not whole else "dense")
        if watched or not self.enabled:
            self.counters.fallback("observing" if self.enabled else "switched off", tokens)
        elif (chosen := self.rows_chosen(tokens)) is not None:
            self.counters.fallback("request", int((chosen == 1).sum()))
        not_finite = self.counters.risks(risk[:, :tokens], reached)
        self.counters.add(1, tokens, computed, exits, not_finite)
        if self.controller is not None and self.enabled:
            self.follow(torch.from_numpy(risk[:, :tokens]), torch.from_numpy(margin[:, :tokens]), reached)
        if watched:
            self.counters.state(self.calibration)
        self.report(self.policy.thresholds.tolist(), steps)

    def follow(self, risk: Tensor, margin: Tensor, reached: np.ndarray) -> None:
        """Adaptive thresholds move on, by the risks of the tokens that reached each checkpoint and chose nothing."""
        if (chosen := self.rows_chosen(risk.shape[1])) is not None:
            reached = reached & (chosen.numpy() == 0)
        for index, mask in enumerate(reached):
            before = margin[index - 1] if index else 0.0
            self.controller.observe(index, self.policy.critical(index, risk[index], before).numpy()[mask])
        self.steer()
        self.policy.thresholds.copy_(torch.tensor(self.controller.thresholds()))


def computed_rows(running: int, rows: int) -> int:
    """How many of a step's rows an MLP computes for those that run."""
    return min(rows, -(-running // ROW_STEP) * ROW_STEP) if running > ROW_STEP else running


def dense(mlp: nn.Module, x: Tensor) -> Tensor:
    """vLLM's own MLP of `x` `[rows, hidden]` on a CPU, or one of the same parts, outside of the compiled graph. vLLM's
    activation takes ten times as long there as torch's two."""
    gate, up = linear(mlp.gate_up_proj, x).chunk(2, -1)
    return linear(mlp.down_proj, F.silu(gate).mul_(up))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """vLLM's linear layer; on a CPU its packed product straight away: the way there costs as much as a small product."""
    packed = layer.__dict__.get("cpu_linear")
    if packed is None or layer.tp_size > 1:
        return layer(x)[0]
    return packed(x, layer.weight, layer.bias)


def actual_tokens() -> int:
    """Tokens of this step that belong to requests: without padding, and 0 in vLLM's own dummy runs."""
    metadata = get_forward_context().attn_metadata
    if not metadata:
        return 0
    return next(iter(metadata.values())).num_actual_tokens
