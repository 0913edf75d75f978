"""How gates, adapters and the order of neurons are trained, the model itself frozen.

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

Under torchrun each process runs its share of every batch on a GPU of its own; gradients are averaged, so that all take the
same steps.

`_Narrowed` is one autograd function a layer whose backward pass trains adapters and gate together. It never computes the
whole MLP: the gradient of the inner activations that narrowing needs anyway also tells what the missing neurons would add.
"""

import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

from .adapter import own_columns
from .artifacts import save_tensor
from .cli import SedacError
from .collection import decoder
from .gates import Gate, Gates, choose, final_states, gated, logits, replaced_mlps
from .quality import BETWEEN, prices_for_saved

SCORES = ("fisher", "magnitude", "variance")
BUDGETS = (0.06, 0.125, 0.19, 0.25, 0.32, 0.4, 0.5, 0.6)
LOSS_VOCABULARY = 49152  # the training loss looks at the tokens most likely under the full model only
LOGIT_BYTES = 1 << 30  # the largest piece of logits held at once
STATISTICS_BATCHES = 8
FIT_STEPS = 300
PRICE_BATCHES = 8  # of training text, to find the final prices
NOISE = (0.7, 0.25)  # logistic scale, in log nats, at the first and the last step
CHECKPOINT = ".gates_training.pt"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training is asked for."""

    steps: int
    batch: int  # sequences a step
    lr: float = 1.5e-3  # of the adapters
    gate_lr: float = 2e-3
    minutes: float | None = None  # the schedule ends by steps or by this, whichever comes first
    importance: str = "fisher"
    budgets: tuple[float, ...] = BUDGETS
    seed: int = 0
    checkpoint_every: int = 200
    compile: bool = False

    def captured(self, device: torch.device) -> bool:
        """Whether steps are recorded and replayed as CUDA graphs."""
        return self.compile and device.type == "cuda"


def pack_rows(documents: list[str], tokenizer: Any, length: int) -> Tensor:
    """Documents one after the other, a blank line between them, cut into rows `[rows, length]`."""
    ids = [i for text in documents for i in tokenizer(text + BETWEEN, verbose=False)["input_ids"]]
    if len(ids) < length:
        raise SedacError(f"the training text has {len(ids)} tokens, less than one row of {length}: give more text")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches_of(rows: int, batch: int, seed: int, step: int) -> Tensor:
    """The rows `[batch]` of a step: every row once an epoch, in an order that only seed and step determine."""
    places = range(step * batch, (step + 1) * batch)
    orders = {
        epoch: torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        for epoch in range(places.start // rows, (places.stop - 1) // rows + 1)
    }
    return torch.stack([orders[place // rows][place % rows] for place in places])


# ---------------------------------------------------------------- several GPUs


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes that train one artefact together; a team of one where torchrun did not start us."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, batch: int) -> "Team":
        """The team that torchrun's environment names; `SedacError` where a batch cannot be shared evenly."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if batch % size:
            raise SedacError(f"{size} processes cannot share {batch} sequences a step: make it a multiple of {size}")
        device = local_device()
        if device:
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device else "gloo")
        return cls(distributed.get_rank(), size)

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the first dimension."""
        return rows[self.rank :: self.size]

    def average(self, tensor: Tensor) -> None:
        """Make `tensor`, in place, its mean over the team."""
        if self.size > 1:
            distributed.all_reduce(tensor)
            tensor /= self.size

    def agree(self, *tensors: Tensor) -> None:
        """Overwrite tensors with the first process's."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def bar(self, *args: Any, **kwargs: Any) -> tqdm:
        """A progress bar, shown by the first process."""
        return tqdm(*args, file=sys.stderr, disable=self.rank > 0, **kwargs)


ALONE = Team()


def replayed(compute: Callable[[], Any], parameters: Iterable[nn.Parameter]) -> Callable[[], Any]:
    """`compute` as one CUDA graph: a GPU is done in less than half the time that the host needs to launch a step's kernels.

    Whatever it reads and returns must stay where it is; gradients that recording leaves in `parameters` are cleared.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries take their workspaces
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own threads go on
        results = compute()
    for parameter in parameters:
        parameter.grad.zero_()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def local_device() -> str | None:
    """The GPU that torchrun means for this process."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None


# ---------------------------------------------------------------- the full model


@dataclasses.dataclass
class Teacher:
    """What the full model makes of the training rows."""

    rows: Tensor  # [rows, length], token ids
    states: Tensor  # [rows, length, hidden], what the LM head reads; on the CPU
    head: Tensor  # [loss vocabulary, hidden]

    def batch(self, chosen: Tensor, device: Any) -> tuple[Tensor, Tensor]:
        """Token ids `[batch, length]` and the teacher's states `[batch * length, hidden]`."""
        ids, states = self.rows[chosen], self.states[chosen].flatten(0, 1)
        if torch.device(device).type == "cuda":  # from pinned memory, so that nobody waits for the copy
            ids, states = ids.pin_memory(), states.pin_memory()
        return ids.to(device, non_blocking=True), states.to(device, non_blocking=True)


@torch.no_grad()
def teach(model: nn.Module, rows: Tensor, batch: int) -> Teacher:
    parts = rows.split(batch)
    states = torch.cat(
        [final_states(model, part.to(model.device)).cpu() for part in tqdm(parts, "full model", file=sys.stderr)]
    )
    head = model.get_output_embeddings().weight
    if len(head) > LOSS_VOCABULARY:
        mass = torch.zeros(len(head), dtype=torch.float64, device=head.device)
        flat = states.flatten(0, 1)
        for part in flat[:: max(1, len(flat) // 32768)].split(piece(head)):
            mass += logits(part.to(head.device), head).softmax(-1).sum(0)
        head = head[mass.topk(LOSS_VOCABULARY).indices].contiguous()
    return Teacher(rows, states, head)


def piece(head: Tensor) -> int:
    """Tokens whose float32 logits fill one piece of memory: a power of two, so that pieces are of few sizes."""
    return 1 << max(0, (LOGIT_BYTES // (4 * len(head))).bit_length() - 1)


def _kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) `[tokens]` of logits `[tokens, vocabulary]`, and its gradient to the student's."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


class KLToTeacher(torch.autograd.Function):
    """KL in nats `[tokens]` of two sets of states `[tokens, hidden]`; logits are never kept, a piece at a time."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, head: Tensor, kl: Callable = _kl) -> Tensor:
        size = piece(head)
        pairs = zip(student.split(size), teacher.split(size), strict=True)
        losses, gradients = [], []
        for ours, theirs in pairs:
            loss, gradient = kl(logits(ours, head), logits(theirs, head))
            losses.append(loss)
            gradients.append(gradient.to(head.dtype) @ head)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (by_state,) = ctx.saved_tensors
        return (by_state.float() * gradient[:, None]).to(by_state.dtype), None, None, None


# ---------------------------------------------------------------- 1. the order of neurons


@dataclasses.dataclass
class Statistics:
    score: Tensor  # [layers, intermediate], importance
    mean: Tensor  # [layers, intermediate], mean inner activation
    scale: Tensor  # [layers], root mean square of the MLP's input


def importance(model: nn.Module, teacher: Teacher, recipe: Recipe) -> Statistics:
    """How much each neuron matters on the training text, by `recipe.importance`.

    fisher: E[½ (dlog p(y)/da · (a - mean a))²] with y drawn from the model's own distribution, the second-order KL when
    the neuron becomes its mean. magnitude: mean |a| times the norm of its column of down_proj. variance: the same with
    the standard deviation of a.
    """
    layers = decoder(model).layers
    shape = (len(layers), layers[0].mlp.down_proj.in_features)
    mean, square, size, fisher = torch.zeros(4, *shape, device=model.device).unbind()
    scale = torch.zeros(len(layers), device=model.device)
    every = max(1, len(teacher.rows) // (STATISTICS_BATCHES * recipe.batch))
    batches = teacher.rows[::every][: STATISTICS_BATCHES * recipe.batch].split(recipe.batch)
    inner: dict[int, Tensor] = {}

    def count(layer: int):
        def hook(module, args):
            a = args[0].float().flatten(0, -2)  # [tokens, intermediate]
            for total, value in ((mean, a), (square, a.square()), (size, a.abs())):
                total[layer] += value.mean(0) / len(batches)

        return hook

    def watch(layer: int):
        def hook(module, args):
            a = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            a.retain_grad()
            inner[layer] = a
            return (a,)

        return hook

    def measure(layer: int):
        def hook(module, args):
            scale[layer] += args[0].float().square().mean() / len(batches)

        return hook

    handles = [layer.mlp.down_proj.register_forward_pre_hook(count(i)) for i, layer in enumerate(layers)]
    handles += [layer.mlp.register_forward_pre_hook(measure(i)) for i, layer in enumerate(layers)]
    with torch.no_grad():
        for ids in tqdm(batches, "activations", file=sys.stderr):
            final_states(model, ids.to(model.device))
    for handle in handles:
        handle.remove()

    columns = torch.stack([layer.mlp.down_proj.weight.float().norm(dim=0) for layer in layers])
    if recipe.importance == "magnitude":
        return Statistics(size * columns, mean, scale.sqrt())
    if recipe.importance == "variance":
        return Statistics((square - mean.square()).clamp_min(0).sqrt() * columns, mean, scale.sqrt())

    handles = [layer.mlp.down_proj.register_forward_pre_hook(watch(i)) for i, layer in enumerate(layers)]
    torch.manual_seed(recipe.seed)
    for ids in tqdm(batches, "importance", file=sys.stderr):
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
            effect = a.grad.float() * (a.detach().float() - mean[layer])
            fisher[layer] += 0.5 * effect.square().sum((0, 1)) / (len(batches) * ids.numel())
        inner.clear()
    for handle in handles:
        handle.remove()
    return Statistics(fisher, mean, scale.sqrt())


# ---------------------------------------------------------------- 2. where adapters start


@torch.no_grad()
def start_adapters(model: nn.Module, gates: Gates, statistics: Statistics) -> None:
    """Each adapter: the `rank` most important neurons that its level leaves out, and the mean of the others."""
    rank = gates.shape.adapter_rank
    gates.order.copy_(statistics.score.argsort(1, descending=True))
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
            bank.bias[level] = mlp.down_proj.weight[:, rest].float() @ statistics.mean[layer, rest]


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


def logistic(shape: tuple[int, ...], device: Any) -> Tensor:
    uniform = torch.rand(shape, device=device).clamp(1e-6, 1 - 1e-6)
    return uniform.log() - (-uniform).log1p()


# ---------------------------------------------------------------- 3. distillation


def _narrow(gate: Tensor, up: Tensor, position: Tensor, width: Tensor) -> Tensor:
    """Inner activations `[tokens, intermediate]`, zero past each token's width `[tokens]`."""
    return (F.silu(gate.float()) * up.float() * (position < width[:, None])).to(gate.dtype)


def _own(gate: Tensor, up: Tensor, level: Tensor, rank: int) -> Tensor:
    return own_columns(F.silu(gate.float()) * up.float(), level, rank).to(gate.dtype)


def _glu_backward(gate: Tensor, up: Tensor, by_inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to gate and up of `silu(gate) * up`, given that to the product; and the product itself. float32."""
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return by_inner * up * sigmoid * (1 + gate - silu), by_inner * silu, silu * up


def _narrow_backward(gate: Tensor, up: Tensor, by_inner: Tensor, position: Tensor, width: Tensor):
    """Gradients to gate and up through the kept neurons, and `[tokens]` what the missing ones would change."""
    kept = position < width[:, None]
    by_gate, by_up, inner = _glu_backward(gate.float(), up.float(), by_inner.float())
    missing = torch.where(kept, 0, inner * by_inner.float()).sum(-1)
    return (by_gate * kept).to(gate.dtype), (by_up * kept).to(gate.dtype), missing


def _own_backward(gate: Tensor, up: Tensor, by_inner: Tensor, level: Tensor, rank: int):
    """Gradient to `[gate, up]` of a bank, its inner activations, and `[tokens]` what they change."""
    by_gate, by_up, inner = _glu_backward(gate.float(), up.float(), own_columns(by_inner.float(), level, rank))
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
        self.kl = built(_kl)


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

    def forward(self, x: Tensor) -> Tensor:  # [batch, seq, hidden]
        rows = x.to(self.mlp.down_proj.weight.dtype)
        if self.gate is not None:
            self.run.levels[self.layer] = self.run.decide(self.layer, rows)
        level = self.run.levels[self.leader].flatten()
        parameters = (*self.bank.parameters(), *(self.gate.parameters() if self.gate is not None else ()))
        return _Narrowed.apply(rows.flatten(0, 1), level, self, *parameters).view(x.shape).to(x.dtype)


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
        mlp, bank, pointwise, run = owner.mlp, owner.bank, owner.run.pointwise, owner.run
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

        # dKL/dk: what the whole MLP would change, less what stands in for it. The loss is a mean over the tokens.
        by_k = missing - present - (by_out.float() * bank.bias_of(level)).sum(-1)
        run.damage = run.damage - 0.5 * len(level) * by_k
        if owner.gate is None:  # backward runs from the last layer to the first: the span's leader comes last
            return by_x, None, None, *adapters
        damage = run.damage
        if run.gates.shape.leader_before(owner.layer) is None:  # else the span goes on: a cascade's latch binds it too
            run.damage = 0.0
        return by_x, None, None, *adapters, *gate_gradients(owner.gate, x, level, damage)


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


class AdamW:
    """AdamW without decay, a tenth of the steps or 30 of warm-up, a cosine to 2 %, gradients clipped to a norm of 1."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float, steps: int, team: Team):
        self.parameters, self.lr, self.steps, self.team = list(parameters), lr, 0, team
        self.warm_up = max(1, min(30, steps // 10))
        fused = self.parameters[0].is_cuda
        self.inner = torch.optim.AdamW(self.parameters, lr, betas=(0.9, 0.98), weight_decay=0, fused=fused)
        sizes = [parameter.numel() for parameter in self.parameters]
        self.gradient = self.parameters[0].new_zeros(sum(sizes))  # of all parameters, in one piece
        for parameter, own in zip(self.parameters, self.gradient.split(sizes), strict=True):
            parameter.grad = own.view_as(parameter)

    def step(self, done: float) -> None:
        """One step, `done` being the share of the schedule that is over."""
        warm = min(1.0, (self.steps + 1) / self.warm_up)
        for group in self.inner.param_groups:
            group["lr"] = self.lr * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, done))))
        self.team.average(self.gradient)
        self.gradient *= (1 / (self.gradient.norm() + 1e-6)).clamp_max(1.0)
        self.inner.step()
        self.gradient.zero_()
        self.steps += 1


@dataclasses.dataclass
class Progress:
    """How far a training has come: what a checkpoint holds."""

    step: int
    seconds: float
    log_lambda: Tensor  # [budgets]
    history: list[float]  # mean KL of each tenth or so


def prepare(model: nn.Module, gates: Gates, teacher: Teacher, recipe: Recipe, team: Team) -> Progress:
    """Steps 1 and 2, and where gates and prices start."""
    statistics = importance(model, teacher, recipe)
    team.agree(statistics.score, statistics.mean, statistics.scale)
    start_adapters(model, gates, statistics)
    fit_locally(model, gates, teacher, recipe, min(FIT_STEPS, recipe.steps), team)
    prior = prior_damage(model, gates, teacher, recipe)
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for leader, damage in zip(gates.shape.leaders, prior, strict=True):
            gate = gates.gates[str(leader)]
            gate.scale = float(statistics.scale[leader])
            gate.head.bias.copy_(damage.log().clamp(-11, 3))
    budgets = torch.tensor(recipe.budgets, device=model.device)
    log_lambda = prices_for(gates, prior, budgets, NOISE[0])
    team.agree(log_lambda, *gates.state_dict().values())
    return Progress(0, 0.0, log_lambda, [])


def train(
    model: nn.Module, gates: Gates, rows: Tensor, recipe: Recipe, folder: Path, plan: Any, team: Team = ALONE
) -> Progress:
    """Train gates and adapters, in place, on rows of token ids `[rows, length]`.

    Leaves a checkpoint in `folder` every so many steps and continues from one that has the same `plan`, which is
    anything that JSON can hold and that determines the training. A `team` ends up with the same gates in each process.
    """
    if recipe.steps * recipe.batch < len(rows):  # the full model runs only on what will be used
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
        rows = rows[order[: recipe.steps * recipe.batch]]
    return distil(model, gates, teach(model, rows, recipe.batch), recipe, folder, plan, team)


def prices(
    model: nn.Module, gates: Gates, rows: Tensor, recipe: Recipe, progress: Progress
) -> tuple[list[float], list[float]]:
    """log λ for each budget, without noise, on some of the training text; and what it saves there."""
    every = max(1, len(rows) // (PRICE_BATCHES * recipe.batch))
    some = rows[::every][: PRICE_BATCHES * recipe.batch].split(recipe.batch)
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in some]
    return prices_for_saved(model, gates, batches, recipe.budgets, progress.log_lambda.tolist())


def distil(
    model: nn.Module, gates: Gates, teacher: Teacher, recipe: Recipe, folder: Path, plan: Any, team: Team
) -> Progress:
    """Steps 3 and 4, after `prepare`'s 1 and 2."""
    path = folder / CHECKPOINT
    saved = torch.load(path, map_location=model.device, weights_only=True) if path.exists() else {}
    saved = saved if saved.get("plan") == plan else {}
    if not saved:
        progress = prepare(model, gates, teacher, recipe, team)
    adapters = AdamW(gates.banks.parameters(), recipe.lr, recipe.steps, team)
    deciders = AdamW(gates.gates.parameters(), recipe.gate_lr, recipe.steps, team)
    if saved:
        progress = Progress(**saved["progress"])
        gates.load_state_dict(saved["gates"])
        for gate, scale in zip(gates.gates.values(), saved["scales"], strict=True):
            gate.scale = scale
        for optimiser, state in zip((adapters, deciders), saved["optimisers"], strict=True):
            optimiser.inner.load_state_dict(state)
            optimiser.steps = progress.step
        print(f"continuing after step {progress.step}", file=sys.stderr)

    run = Pass(gates, Pointwise(recipe.compile))
    if recipe.compile:
        for module in decoder(model).modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.compile(dynamic=False)
    position, budgets = gates.position, torch.tensor(recipe.budgets, device=model.device)
    clock = Clock(recipe, progress, team, model.device)
    total, counted, tenth = torch.zeros((), device=model.device), 0, max(1, recipe.steps // 10)
    ids, states = teacher.batch(torch.arange(recipe.batch // team.size) % len(teacher.rows), model.device)
    run.noise, run.log_lambda = torch.zeros((), device=model.device), torch.zeros(len(ids), device=model.device)

    def compute() -> tuple[Tensor, Tensor]:
        """Loss of the batch in `ids`, its gradients added to the parameters', and what each sequence saved `[batch]`."""
        student = final_states(model, ids).flatten(0, 1)
        loss = KLToTeacher.apply(student, states, teacher.head, run.pointwise.kl).mean()
        with torch.autograd.set_multithreading_enabled(False):  # compiled code runs where it was compiled
            loss.backward()
        return loss.detach(), saved_by_sequence(run)

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
            run.noise.fill_(NOISE[0] + (NOISE[1] - NOISE[0]) * done)
            run.log_lambda.copy_(progress.log_lambda[budget])
            loss, saved = compute()
            adapters.step(done)
            deciders.step(done)
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
                save_tensor({**state, "optimisers": [adapters.inner.state_dict(), deciders.inner.state_dict()]}, path)
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
