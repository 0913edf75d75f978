"""How gates, adapters and the order of neurons are trained, the model itself frozen.

For levels that are shares of neurons:

1. `importance` orders each MLP's neurons. The default is Fisher's: how much the next-token distribution moves, to second
   order in nats, when a neuron becomes its mean.
2. Each adapter starts as the most important of the neurons it stands in for, plus the mean of the others, and
   `fit_locally` fits it to what its own MLP leaves out.
3. `distil` runs the whole model under its gates and minimises KL(full model ‖ gated model) of the next token. With a keep
   factor k in `out = k · MLP(x) + (1 - k) · (prefix(x) + adapter(x))`, taken at k = 0, the same backward pass yields
   dKL/dk for every token and layer at once. KL is quadratic near its minimum, so -½ dKL/dk is the damage of having
   narrowed just this MLP: what a gate learns to predict, by a gamma quasi-likelihood.
4. Every sequence runs at one of several budgets of saved bytes, each with a price λ of its own, which a controller drives
   to its budget. Logistic noise on the predictions explores both sides of every border.

Levels in bits have no adapters to train: of all this they need the order, and in 3 the gates alone learn.

A training may go on from gates that were trained before, in place of 1 and 2.

`_Narrowed` is one autograd function a layer whose backward pass trains adapters and gate together. It never computes the
whole MLP: the gradient of the inner activations that narrowing needs anyway also tells what the missing neurons would add.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import own_columns
from .artifacts import save_tensor
from .cli import SedacError
from .collection import decoder, replaced_mlps
from .distillation import (
    ALONE,
    AdamW,
    KLToTeacher,
    Recipe,
    Teacher,
    Team,
    batches_of,
    kl_and_gradient,
    logistic,
    replayed,
    teach,
)
from .gated_model import final_states
from .gates import Gate, Gates, choose
from .gates_start import activations, fit_locally, importance, prices_for, prior_damage, start_adapters
from .quality import interpolate, prices_for_saved

FIT_STEPS = 300
PRICE_BATCHES = 8  # of training text, to find the final prices
NOISE = (0.7, 0.25)  # logistic scale, in log nats, at the first and the last step; the last where gates go on
CHECKPOINT = ".gates_training.pt"


# ---------------------------------------------------------------- 3. distillation


def _narrow(gate: Tensor, up: Tensor, position: Tensor, width: Tensor) -> Tensor:
    """Inner activations `[tokens, intermediate]`, zero past each token's width `[tokens]`."""
    return (F.silu(gate.float()) * up.float() * (position < width[:, None])).to(gate.dtype)


def _own(gate: Tensor, up: Tensor, level: Tensor, rank: int) -> Tensor:
    return own_columns(F.silu(gate.float()) * up.float(), level, rank).to(gate.dtype)


def _glu_backward(gate: Tensor, up: Tensor, by_inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_silu_backward` in the type of `gate`, computed in float32."""
    return tuple(part.to(gate.dtype) for part in _silu_backward(gate.float(), up.float(), by_inner.float()))


def _silu_backward(gate: Tensor, up: Tensor, by_inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to gate and up of `silu(gate) * up`, given that to the product; and the product itself. float32."""
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return by_inner * up * sigmoid * (1 + gate - silu), by_inner * silu, silu * up


def _narrow_backward(gate: Tensor, up: Tensor, by_inner: Tensor, position: Tensor, width: Tensor):
    """Gradients to gate and up through the kept neurons, and `[tokens]` what the missing ones would change."""
    kept = position < width[:, None]
    by_gate, by_up, inner = _silu_backward(gate.float(), up.float(), by_inner.float())
    missing = torch.where(kept, 0, inner * by_inner.float()).sum(-1)
    return (by_gate * kept).to(gate.dtype), (by_up * kept).to(gate.dtype), missing


def _own_backward(gate: Tensor, up: Tensor, by_inner: Tensor, level: Tensor, rank: int):
    """Gradient to `[gate, up]` of a bank, its inner activations, and `[tokens]` what they change."""
    by_gate, by_up, inner = _silu_backward(gate.float(), up.float(), own_columns(by_inner.float(), level, rank))
    inner = own_columns(inner, level, rank)
    present = (inner * by_inner.float()).sum(-1)
    return torch.cat([by_gate, by_up], -1).to(gate.dtype), inner.to(gate.dtype), present


class Pointwise:
    """The element-wise steps, which torch.compile fuses into one kernel each where that is asked for."""

    def __init__(self, compile: bool):
        def built(function: Callable) -> Callable:
            return torch.compile(function, dynamic=False) if compile else function

        self.narrow, self.narrow_backward = built(_narrow), built(_narrow_backward)
        self.own, self.own_backward = built(_own), built(_own_backward)
        self.glu_backward = built(_glu_backward)
        self.kl = built(kl_and_gradient)


@dataclasses.dataclass
class Pass:
    """What one forward and backward pass of a training step shares among its layers."""

    gates: Gates
    pointwise: Pointwise
    noise: Tensor | float = 0.0
    log_lambda: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # [batch]
    levels: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # by leader, [batch, seq]
    gains: dict[int, Tensor] = dataclasses.field(init=False)  # by leader
    damage: Tensor | float = 0.0  # [tokens], of the layers of the span whose backward pass is under way

    def __post_init__(self) -> None:
        self.gains = self.gates.shape.gains(self.gates.order.device)

    def decide(self, leader: int, x: Tensor) -> Tensor:  # x [batch, seq, hidden]
        with torch.no_grad():
            log_damage = self.gates.gates[str(leader)](x)
            log_damage = log_damage + self.noise * logistic(log_damage.shape, x.device)
            level = choose(log_damage, self.log_lambda[:, None].expand(x.shape[:2]), self.gains[leader])
            before = self.gates.shape.leader_before(leader)
            return level if before is None else torch.maximum(level, self.levels[before])


class TrainedMLP(nn.Module):
    """Stands in for one frozen MLP during distillation."""

    def __init__(self, layer: int, mlp: nn.Module, run: Pass, position: Tensor):
        super().__init__()
        shape = run.gates.shape
        self.layer, self.leader = layer, shape.leader_of(layer)
        self.mlp, self.run, self.position = mlp, run, position
        self.bank = run.gates.banks[layer]
        self.gate = run.gates.gates[str(layer)] if layer == self.leader else None
        self.widths = torch.tensor(shape.widths, device=position.device)
        self.rounded = run.gates.rounded(layer, mlp) if shape.bits else None

    def forward(self, x: Tensor) -> Tensor:  # [batch, seq, hidden]
        rows = x.to(self.mlp.down_proj.weight.dtype)
        if self.gate is not None:
            self.run.levels[self.layer] = self.run.decide(self.layer, rows)
        level = self.run.levels[self.leader].flatten()
        parameters = (*self.bank.parameters(), *(self.gate.parameters() if self.gate is not None else ()))
        function = _Narrowed if self.rounded is None else _Rounded
        return function.apply(rows.flatten(0, 1), level, self, *parameters).view(x.shape).to(x.dtype)

    def learn(self, x: Tensor, level: Tensor, by_k: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the gate's parameters, if this layer has one; by_k `[tokens]`: dKL/dk, what the whole MLP would change.

        The loss is a mean over the tokens. Backward runs from the last layer to the first: a span's leader comes last.
        """
        run = self.run
        run.damage = run.damage - 0.5 * len(level) * by_k
        if self.gate is None:
            return ()
        damage = run.damage
        if run.gates.shape.leader_before(self.layer) is None:  # else the span goes on: a cascade's latch binds it too
            run.damage = 0.0
        return gate_gradients(self.gate, x, level, damage)


class _Narrowed(torch.autograd.Function):
    """`prefix(x) + adapter(x)` of each token's level; backward gives its gradients, the damage, and the gate's own."""

    @staticmethod
    def forward(ctx, x: Tensor, level: Tensor, owner: TrainedMLP, *parameters: Tensor) -> Tensor:
        mlp, bank, pointwise = owner.mlp, owner.bank, owner.run.pointwise
        gate, up = F.linear(x, mlp.gate_proj.weight), F.linear(x, mlp.up_proj.weight)
        bank_gate, bank_up = F.linear(x, bank.gate_up.to(x.dtype)).chunk(2, -1)
        inner = pointwise.narrow(gate, up, owner.position, owner.widths[level])
        own = pointwise.own(bank_gate, bank_up, level, bank.rank)
        out = F.linear(inner, mlp.down_proj.weight) + F.linear(own, bank.down.to(x.dtype))
        ctx.owner = owner
        ctx.save_for_backward(x, level, gate, up, bank_gate, bank_up)
        return out + bank.bias_of(level).to(out.dtype)

    @staticmethod
    def backward(ctx, by_out: Tensor):  # [tokens, hidden]
        x, level, gate, up, bank_gate, bank_up = ctx.saved_tensors
        owner: TrainedMLP = ctx.owner
        mlp, bank, pointwise = owner.mlp, owner.bank, owner.run.pointwise
        width = owner.widths[level]
        by_out = by_out.to(x.dtype)

        by_inner = by_out @ mlp.down_proj.weight  # [tokens, intermediate]
        by_gate, by_up, missing = pointwise.narrow_backward(gate, up, by_inner, owner.position, width)
        by_own = by_out @ bank.down.to(x.dtype)  # [tokens, count * rank]
        by_bank, own, present = pointwise.own_backward(bank_gate, bank_up, by_own, level, bank.rank)

        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = by_gate @ mlp.gate_proj.weight + by_up @ mlp.up_proj.weight + by_bank @ bank.gate_up.to(x.dtype)
        one_hot = F.one_hot(level, bank.count + 1)[:, 1:].to(x.dtype)  # [tokens, levels - 1]
        adapters = (by_bank.t() @ x).float(), (by_out.t() @ own).float(), (one_hot.t() @ by_out).float()

        # What the whole MLP would change, less what stands in for it.
        by_k = missing - present - (by_out.float() * bank.bias_of(level)).sum(-1)
        return by_x, None, None, *adapters, *owner.learn(x, level, by_k)


class _Rounded(torch.autograd.Function):
    """The MLP by the weights of each token's level in bits; backward, by the whole MLP's weights, gives the damage and the
    gate's own gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, level: Tensor, owner: TrainedMLP, *parameters: Tensor) -> Tensor:
        mlp = owner.mlp
        gate, up = F.linear(x, mlp.gate_proj.weight), F.linear(x, mlp.up_proj.weight)
        whole = F.linear(F.silu(gate) * up, mlp.down_proj.weight)
        out = torch.where(level[:, None] > 0, owner.rounded.masked(x, owner.widths[level]), whole)
        ctx.owner = owner
        ctx.save_for_backward(x, level, gate, up, whole - out)
        return out

    @staticmethod
    def backward(ctx, by_out: Tensor):  # [tokens, hidden]
        x, level, gate, up, rounding = ctx.saved_tensors
        mlp = ctx.owner.mlp
        by_out = by_out.to(x.dtype)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_gate, by_up, _ = ctx.owner.run.pointwise.glu_backward(gate, up, by_out @ mlp.down_proj.weight)
            by_x = by_gate @ mlp.gate_proj.weight + by_up @ mlp.up_proj.weight
        by_k = (by_out.float() * rounding.float()).sum(-1)
        return by_x, None, None, *ctx.owner.learn(x, level, by_k)


def gate_gradients(gate: Gate, x: Tensor, level: Tensor, damage: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the gamma quasi-likelihood for the tokens that were narrowed, at the level that they ran.

    Its optimum is exp(output) = E[damage]. Single values are held within [-5, 20] times the prediction: they are noisy.
    """
    narrowed = (level > 0).float()
    with torch.enable_grad():
        predicted = gate(x).gather(-1, (level - 1).clamp_min(0)[:, None]).squeeze(-1)  # log nats
        scale = predicted.detach().exp()
        held = torch.minimum(torch.maximum(damage, -5 * scale), 20 * scale)
        loss = (predicted + held * (-predicted).exp()) * narrowed
        return torch.autograd.grad(loss.sum() / narrowed.sum().clamp_min(50), list(gate.parameters()))


@dataclasses.dataclass
class Progress:
    """How far a training has come: what a checkpoint holds."""

    step: int
    seconds: float
    log_lambda: Tensor  # [budgets]
    history: list[float]  # mean KL of each tenth or so


def prepare(
    model: nn.Module, gates: Gates, teacher: Teacher, recipe: Recipe, team: Team, start: dict[float, float] | None
) -> Progress:
    """Steps 1 and 2, and where gates and prices start; `start`: the prices, by budget, that gates trained before have."""
    seen = activations(model, teacher, recipe)
    team.agree(seen.mean, seen.scale)
    if start:
        for leader in gates.shape.leaders:
            gates.gates[str(leader)].unfold(float(seen.scale[leader]))
        known = sorted(start.items())
        prices = [interpolate(known, budget) for budget in recipe.budgets]
        return Progress(0, 0.0, torch.tensor(prices, device=model.device), [])
    score = importance(model, teacher, recipe, seen)
    team.agree(score)
    gates.order.copy_(score.argsort(1, descending=True))
    if not gates.shape.bits:
        start_adapters(model, gates, seen.mean)
        fit_locally(model, gates, teacher, recipe, min(FIT_STEPS, recipe.steps), team)
    prior = prior_damage(model, gates, teacher, recipe)
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for leader, damage in zip(gates.shape.leaders, prior, strict=True):
            gate = gates.gates[str(leader)]
            gate.scale = float(seen.scale[leader])
            gate.head.bias.copy_(damage.log().clamp(-11, 3))
    budgets = torch.tensor(recipe.budgets, device=model.device)
    log_lambda = prices_for(gates, prior, budgets, NOISE[0])
    team.agree(log_lambda, *gates.state_dict().values())
    return Progress(0, 0.0, log_lambda, [])


def train(
    model: nn.Module,
    gates: Gates,
    rows: Tensor,
    recipe: Recipe,
    folder: Path,
    plan: Any,
    team: Team = ALONE,
    start: dict[float, float] | None = None,
) -> Progress:
    """Train gates and adapters, in place, on rows of token ids `[rows, length]`.

    With `start`, log λ by budget, `gates` have been trained before and go on from there. Leaves a checkpoint in `folder`
    every so many steps and continues from one that has the same `plan`, which is anything that JSON can hold and that
    determines the training. A `team` ends up with the same gates in each process.
    """
    if recipe.steps * recipe.batch < len(rows):  # the full model runs only on what will be used
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
        rows = rows[order[: recipe.steps * recipe.batch]]
    return distil(model, gates, teach(model, rows, recipe.batch), recipe, folder, plan, team, start)


def prices(
    model: nn.Module, gates: Gates, rows: Tensor, recipe: Recipe, progress: Progress
) -> tuple[list[float], list[float]]:
    """log λ for each budget, without noise, on some of the training text; and what it saves there."""
    every = max(1, len(rows) // (PRICE_BATCHES * recipe.batch))
    some = rows[::every][: PRICE_BATCHES * recipe.batch].split(recipe.batch)
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in some]
    return prices_for_saved(model, gates, batches, recipe.budgets, progress.log_lambda.tolist())


def distil(
    model: nn.Module,
    gates: Gates,
    teacher: Teacher,
    recipe: Recipe,
    folder: Path,
    plan: Any,
    team: Team,
    start: dict[float, float] | None,
) -> Progress:
    """Steps 3 and 4, after `prepare`'s 1 and 2."""
    path = folder / CHECKPOINT
    saved = torch.load(path, map_location=model.device, weights_only=True) if path.exists() else {}
    saved = saved if saved.get("plan") == plan else {}
    if not saved:
        progress = prepare(model, gates, teacher, recipe, team, start)
    optimisers = [AdamW(gates.gates.parameters(), recipe.gate_lr, recipe.steps, team)]
    if not gates.shape.bits:
        optimisers.append(AdamW(gates.banks.parameters(), recipe.lr, recipe.steps, team))
    if saved:
        progress = Progress(**saved["progress"])
        gates.load_state_dict(saved["gates"])
        for gate, scale in zip(gates.gates.values(), saved["scales"], strict=True):
            gate.scale = scale
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.inner.load_state_dict(state)
            optimiser.steps = progress.step
        print(f"continuing after step {progress.step}", file=sys.stderr)

    run = Pass(gates, Pointwise(recipe.compile))
    if recipe.compile:
        for module in decoder(model).modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.compile(dynamic=False)
    position, budgets = gates.position, torch.tensor(recipe.budgets, device=model.device)
    clock, first_noise = Clock(recipe, progress, team, model.device), NOISE[1] if start else NOISE[0]
    total, counted, tenth = torch.zeros((), device=model.device), 0, max(1, recipe.steps // 10)
    ids, states = teacher.batch(torch.arange(recipe.batch // team.size) % len(teacher.rows), model.device)
    run.noise, run.log_lambda = torch.zeros((), device=model.device), torch.zeros(len(ids), device=model.device)

    def compute() -> tuple[Tensor, Tensor]:
        """Mean KL of the batch in `ids`, whose gradients are added to the parameters', and what each sequence saved
        `[batch]`."""
        student = final_states(model, ids).flatten(0, 1)
        kl = KLToTeacher.apply(student, states, teacher.head, run.pointwise.kl).view(len(ids), -1).mean(1)  # [batch]
        with torch.autograd.set_multithreading_enabled(False):  # compiled code runs where it was compiled
            kl.mean().backward()
        return kl.detach().mean(), saved_by_sequence(run)

    bar = team.bar(desc="distilling", total=recipe.steps, initial=progress.step, unit="step")
    window = gates.shape.window
    with replaced_mlps(model, lambda i, mlp: TrainedMLP(i, mlp, run, position[i]) if i in window else mlp):
        if recipe.captured(model.device):
            compute = replayed(compute, gates.parameters())
        while (done := clock.share_done()) < 1:
            order = batches_of(len(teacher.rows), recipe.batch, recipe.seed, progress.step)
            for own, new in zip((ids, states), teacher.batch(team.share(order), model.device), strict=True):
                own.copy_(new)
            torch.manual_seed((recipe.seed * 1_000_003 + progress.step) * team.size + team.rank)
            budget = torch.randint(len(budgets), (len(ids),), device=model.device)
            run.noise.fill_(first_noise + (NOISE[1] - first_noise) * done)
            run.log_lambda.copy_(progress.log_lambda[budget])
            loss, saved = compute()
            for optimiser in optimisers:
                optimiser.step(done)
            control(progress.log_lambda, budgets, budget, saved, 1.5 * (1 - done) + 0.3, team)

            progress.step += 1
            total, counted = total + loss, counted + 1
            bar.update()
            if progress.step % tenth == 0 or counted == 50:
                team.average(total)
                progress.history.append(float(total) / counted)
                bar.set_postfix(kl=f"{progress.history[-1]:.4f}")
                total, counted = torch.zeros_like(total), 0
                if not math.isfinite(progress.history[-1]):
                    raise SedacError(f"training diverged after {progress.step} steps: try a lower --lr")
            if progress.step % recipe.checkpoint_every == 0 and team.rank == 0:
                progress.seconds = clock.seconds()
                state = {"plan": plan, "progress": vars(progress), "gates": gates.state_dict()}
                state["scales"] = [gate.scale for gate in gates.gates.values()]
                save_tensor({**state, "optimisers": [own.inner.state_dict() for own in optimisers]}, path)
    bar.close()
    progress.seconds = clock.seconds()
    with torch.no_grad():
        for gate in gates.gates.values():
            gate.fold()
        for parameter in gates.banks.parameters():
            parameter.copy_(parameter.bfloat16())  # as they are stored
    gates.requires_grad_(False)
    return progress


class Clock:
    """How much of the schedule is over, by steps or by minutes, the same for all of a team."""

    EVERY = 10  # steps between two looks at the first process's watch

    def __init__(self, recipe: Recipe, progress: Progress, team: Team, device: Any):
        self.recipe, self.progress, self.team = recipe, progress, team
        self.started = time.monotonic() - progress.seconds
        self.by_time, self.device = 0.0, device

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def share_done(self) -> float:
        """From 0 to 1 and, once the training is over, at least 1."""
        if self.recipe.minutes and self.progress.step % self.EVERY == 0:
            seen = torch.tensor(self.seconds() / 60 / self.recipe.minutes, device=self.device)
            self.team.agree(seen)
            self.by_time = float(seen)
        return max(self.progress.step / self.recipe.steps, self.by_time)


def saved_by_sequence(run: Pass) -> Tensor:
    """Share of MLP bytes that each sequence of the latest pass did not read, `[batch]`."""
    shape = run.gates.shape
    shares = F.one_hot(shape.by_layer(run.levels), len(shape.levels)).float().mean(2)  # [layers, batch, levels]
    return shape.saved_share(shares.transpose(0, 1))


def control(
    log_lambda: Tensor, budgets: Tensor, budget: Tensor, saved: Tensor, rate: float, team: Team = ALONE
) -> None:
    """Move each budget's price, in place, by how far its sequences of this step missed it."""
    missed = torch.zeros_like(log_lambda).index_add_(0, budget, budgets[budget] - saved)
    count = torch.zeros_like(log_lambda).index_add_(0, budget, torch.ones_like(saved))
    both = torch.stack([missed, count])
    team.average(both)
    missed, count = both * team.size
    log_lambda += rate * missed / count.clamp_min(1)


def checkpointed(model: nn.Module) -> None:
    """Let the model's layers recompute their activations in the backward pass: about a third more work, far less memory."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in decoder(model).layers:
        layer.training = True  # the layer itself, not its modules: only then does transformers recompute
