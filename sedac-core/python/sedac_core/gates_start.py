"""Where the training of gates starts from: steps 1 and 2 of gates_training.py."""

import dataclasses
import itertools
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .collection import decoder
from .distillation import ALONE, AdamW, KLToTeacher, Recipe, Teacher, Team, batches_of, logistic, piece, replayed
from .gated_model import final_states, gated, logits
from .gates import Gates, choose

SCORES = ("fisher", "magnitude", "variance")
STATISTICS_BATCHES = 8


# ---------------------------------------------------------------- 1. the order of neurons


@dataclasses.dataclass
class Activations:
    """What a model's MLPs read and compute on some of the training text: means over its tokens."""

    mean: Tensor  # [layers, intermediate], of the inner activations
    square: Tensor  # [layers, intermediate], of their squares
    size: Tensor  # [layers, intermediate], of their absolute values
    scale: Tensor  # [layers], root mean square of the MLP's input


def batches(teacher: Teacher, recipe: Recipe) -> tuple[Tensor, ...]:
    """The rows of token ids that statistics are taken of, `[batch, length]` each."""
    every = max(1, len(teacher.rows) // (STATISTICS_BATCHES * recipe.batch))
    return teacher.rows[::every][: STATISTICS_BATCHES * recipe.batch].split(recipe.batch)


@torch.no_grad()
def activations(model: nn.Module, teacher: Teacher, recipe: Recipe) -> Activations:
    layers, some = decoder(model).layers, batches(teacher, recipe)
    shape = (len(layers), layers[0].mlp.down_proj.in_features)
    mean, square, size = torch.zeros(3, *shape, device=model.device).unbind()
    scale = torch.zeros(len(layers), device=model.device)

    def count(layer: int):
        def hook(module, args):
            a = args[0].float().flatten(0, -2)  # [tokens, intermediate]
            for total, value in ((mean, a), (square, a.square()), (size, a.abs())):
                total[layer] += value.mean(0) / len(some)

        return hook

    def measure(layer: int):
        def hook(module, args):
            scale[layer] += args[0].float().square().mean() / len(some)

        return hook

    handles = [layer.mlp.down_proj.register_forward_pre_hook(count(i)) for i, layer in enumerate(layers)]
    handles += [layer.mlp.register_forward_pre_hook(measure(i)) for i, layer in enumerate(layers)]
    for ids in tqdm(some, "activations", file=sys.stderr):
        final_states(model, ids.to(model.device))
    for handle in handles:
        handle.remove()
    return Activations(mean, square, size, scale.sqrt())


def importance(model: nn.Module, teacher: Teacher, recipe: Recipe, seen: Activations) -> Tensor:
    """How much each neuron matters on the training text, `[layers, intermediate]`, by `recipe.importance`.

    fisher: E[½ (dlog p(y)/da · (a - mean a))²] with y drawn from the model's own distribution, the second-order KL when
    the neuron becomes its mean. magnitude: mean |a| times the norm of its column of down_proj. variance: the same with
    the standard deviation of a.
    """
    layers = decoder(model).layers
    columns = torch.stack([layer.mlp.down_proj.weight.float().norm(dim=0) for layer in layers])
    if recipe.importance == "magnitude":
        return seen.size * columns
    if recipe.importance == "variance":
        return (seen.square - seen.mean.square()).clamp_min(0).sqrt() * columns

    inner: dict[int, Tensor] = {}

    def watch(layer: int):
        def hook(module, args):
            a = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            a.retain_grad()
            inner.setdefault(layer, a)  # a layer that recomputes it in the backward pass comes here again
            return (a,)

        return hook

    handles = [layer.mlp.down_proj.register_forward_pre_hook(watch(i)) for i, layer in enumerate(layers)]
    fisher, some = torch.zeros_like(seen.mean), batches(teacher, recipe)
    torch.manual_seed(recipe.seed)
    for ids in tqdm(some, "importance", file=sys.stderr):
        states = final_states(model, ids.to(model.device)).flatten(0, 1)
        by_state = []
        with torch.no_grad():
            for part in states.split(piece(teacher.head)):
                p = logits(part, teacher.head).softmax(-1)
                drawn = torch.multinomial(p, 1)
                p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
                by_state.append(p.to(part.dtype) @ teacher.head)
        states.backward(torch.cat(by_state))
        for layer, a in inner.items():
            effect = a.grad.float() * (a.detach().float() - seen.mean[layer])
            fisher[layer] += 0.5 * effect.square().sum((0, 1)) / (len(some) * ids.numel())
        inner.clear()
    for handle in handles:
        handle.remove()
    return fisher


# ---------------------------------------------------------------- 2. where adapters start


@torch.no_grad()
def start_adapters(model: nn.Module, gates: Gates, mean: Tensor) -> None:
    """Each adapter: the `rank` most important neurons that its level leaves out, by the gates' order, and the mean of the others;
    `mean` is that of `Activations`."""
    rank = gates.shape.adapter_rank
    for layer in gates.shape.window:
        bank, mlp = gates.banks[layer], decoder(model).layers[layer].mlp
        gate_rows, up_rows = bank.gate_up.chunk(2)
        for level, width in enumerate(gates.shape.widths[1:]):
            missing = gates.order[layer, width:]
            top, rest = missing[:rank], missing[rank:]
            own = slice(level * rank, level * rank + len(top))
            gate_rows[own] = mlp.gate_proj.weight[top].float()
            up_rows[own] = mlp.up_proj.weight[top].float()
            bank.down[:, own] = mlp.down_proj.weight[:, top].float()
            bank.bias[level] = mlp.down_proj.weight[:, rest].float() @ mean[layer, rest]


def fit_locally(
    model: nn.Module, gates: Gates, teacher: Teacher, recipe: Recipe, steps: int, team: Team = ALONE
) -> None:
    """Fit every adapter to the output of the neurons it stands in for, relative to the residual stream there."""
    layers = decoder(model).layers
    optimiser = AdamW(gates.banks.parameters(), recipe.lr, steps, team)
    seen: dict[int, Tensor] = {}  # by layer, what its MLP reads
    activations: dict[int, Tensor] = {}  # by layer, what its down_proj reads

    def missing(layer: int, inner: Tensor) -> Tensor:
        """What each level leaves out, `[tokens, levels - 1, hidden]`: segments of neurons, summed from the last."""
        total, outputs = 0, []
        for upper, lower in itertools.pairwise(gates.shape.widths):
            own = gates.order[layer, lower:upper]
            total = total + F.linear(inner[:, own], layers[layer].mlp.down_proj.weight[:, own])
            outputs.append(total)
        return torch.stack(outputs, 1)

    def fit(layer: int):
        def hook(module, args, output):
            stream = output[0] if isinstance(output, tuple) else output
            stream = stream.flatten(0, -2).float()  # [tokens, hidden]
            x, bank = seen.pop(layer), gates.banks[layer]
            wanted = missing(layer, activations.pop(layer)).float()
            with torch.enable_grad():
                gate, up = F.linear(x, bank.gate_up.to(x.dtype)).chunk(2, -1)
                inner = (F.silu(gate) * up).unflatten(-1, (bank.count, bank.rank)).transpose(0, 1)
                down = bank.down.to(x.dtype).unflatten(-1, (bank.count, bank.rank)).permute(1, 2, 0)
                found = (inner @ down).transpose(0, 1).float() + bank.bias  # [tokens, levels - 1, hidden]
                power = stream.square().sum(-1, keepdim=True)  # [tokens, 1]; 0 where a token's embedding is 0
                error = (found - wanted).square().sum(-1) / power.clamp_min(1e-6 * power.mean())
                error.mean().backward()

        return hook

    def see(found: dict[int, Tensor], layer: int):
        return lambda module, args: found.__setitem__(layer, args[0].flatten(0, -2).to(model.dtype))

    window = [(i, layers[i]) for i in gates.shape.window]
    handles = [layer.register_forward_hook(fit(i)) for i, layer in window]
    handles += [layer.mlp.register_forward_pre_hook(see(seen, i)) for i, layer in window]
    handles += [layer.mlp.down_proj.register_forward_pre_hook(see(activations, i)) for i, layer in window]
    ids = torch.empty(recipe.batch // team.size, teacher.rows.shape[1], dtype=torch.int64, device=model.device)

    def compute() -> None:
        with torch.no_grad():
            final_states(model, ids)

    try:
        for step in team.bar(range(steps), "fitting adapters"):
            ids.copy_(teacher.rows[team.share(batches_of(len(teacher.rows), recipe.batch, recipe.seed + 1, step))])
            if step == 0 and recipe.captured(model.device):
                compute = replayed(compute, gates.banks.parameters())
            compute()
            optimiser.step(step / steps)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prior_damage(model: nn.Module, gates: Gates, teacher: Teacher, recipe: Recipe) -> Tensor:
    """KL in nats when just one layer, or span, runs at one level for all tokens, `[leaders, levels - 1]`.

    Each sequence of a batch tries another layer and level.
    """
    leaders, count = gates.shape.leaders, len(gates.shape.levels) - 1
    cases = [(leader, level) for leader in leaders for level in range(1, count + 1)]
    damage = []
    for start in tqdm(range(0, len(cases), recipe.batch), "single layers", file=sys.stderr):
        part = cases[start : start + recipe.batch]
        ids, states = teacher.batch(batches_of(len(teacher.rows), len(part), recipe.seed + 2, start), model.device)

        def decide(layer: int, x: Tensor, part=part) -> Tensor:
            own = [level if layer in gates.shape.span(leader) else 0 for leader, level in part]
            return torch.tensor(own, device=x.device)[:, None].expand(x.shape[:2])

        with gated(model, gates, 0.0, decide=decide):
            student = final_states(model, ids).flatten(0, 1)
        damage.append(KLToTeacher.apply(student, states, teacher.head).view(len(part), -1).mean(1))
    return torch.cat(damage).view(len(leaders), count).clamp_min(1e-5)


def prices_for(gates: Gates, prior: Tensor, budgets: Tensor, noise: float) -> Tensor:
    """log λ `[budgets]` at which gates that only know `prior`, under this noise, save the budgets: by bisection."""
    shape, count = gates.shape, prior.shape[1]
    draws = logistic((64, *prior.shape), prior.device) * noise
    gain = torch.stack([*shape.gains(prior.device).values()])  # [leaders, levels - 1]
    low, high = torch.full_like(budgets, -20), torch.full_like(budgets, 10)
    for _ in range(30):
        middle = (low + high) / 2
        damage = (prior.log() + draws)[None].expand(len(budgets), -1, -1, -1)  # [budgets, draws, leaders, levels - 1]
        level = choose(damage, middle[:, None, None], gain)  # [budgets, draws, leaders]
        level = level.cummax(-1).values if shape.latch else level
        level = shape.by_layer(dict(zip(shape.leaders, level.unbind(-1), strict=True)))  # [layers, budgets, draws]
        saved = shape.saved_share(F.one_hot(level, count + 1).float().mean(2).transpose(0, 1))
        low, high = torch.where(saved < budgets, middle, low), torch.where(saved < budgets, high, middle)
    return (low + high) / 2
