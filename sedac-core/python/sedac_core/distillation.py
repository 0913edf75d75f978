"""What distilling against a frozen full model takes: a recipe, rows of text, what the full model makes of them, the loss,
the optimiser, and the processes that share the work.

Under torchrun each process runs its share of every batch on a GPU of its own; gradients are averaged, so that all take the
same steps.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from .cli import SedacError
from .gated_model import final_states, logits
from .quality import BETWEEN

BUDGETS = (0.06, 0.125, 0.19, 0.25, 0.32, 0.4, 0.5, 0.6)
LOSS_VOCABULARY = 49152  # the training loss looks at the tokens most likely under the full model only
LOGIT_BYTES = 1 << 30  # the largest piece of logits held at once


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training is asked for."""

    steps: int
    batch: int  # sequences a step
    lr: float = 5e-4  # of the adapters
    gate_lr: float = 1e-3
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

    def leave(self) -> None:
        """Part when all have come this far: a process that ended first could break off what another still reads."""
        if self.size > 1:
            distributed.barrier()
            distributed.destroy_process_group()

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


def kl_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) `[tokens]` of logits `[tokens, vocabulary]`, and its gradient to the student's."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), log_q.exp() - p


class KLToTeacher(torch.autograd.Function):
    """KL in nats `[tokens]` of two sets of states `[tokens, hidden]`; logits are never kept, a piece at a time."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, head: Tensor, kl: Callable = kl_and_gradient) -> Tensor:
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


# ---------------------------------------------------------------- steps


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


def logistic(shape: tuple[int, ...], device: Any) -> Tensor:
    uniform = torch.rand(shape, device=device).clamp(1e-6, 1 - 1e-6)
    return uniform.log() - (-uniform).log1p()
