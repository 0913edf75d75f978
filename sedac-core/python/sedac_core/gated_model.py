"""A transformers model under gates: the twin of what is served, which training, reports and calibration run.

Each MLP is replaced by one that asks a gate for every token's level and runs it there: the obvious way, all tokens by all weights and
what a level leaves out set to zero, or gathered, each level's tokens by the weights that it reads.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import AdapterBank
from .cli import SedacError
from .collection import decoder, replaced_mlps
from .gates import Gates, by_level, choose
from .precision import RoundedMLP

AT_ONCE = 1 << 15  # tokens whose neurons an MLP under gates holds at once


def masked_mlp(mlp: nn.Module, bank: AdapterBank, position: Tensor, widths: Tensor, x: Tensor, level: Tensor) -> Tensor:
    """A narrowed MLP for each token, the obvious way: all neurons, those past the token's width set to zero.

    x `[tokens, hidden]`, level `[tokens]`, position `[intermediate]`: each neuron's place in the order of importance,
    widths `[levels]`. Returns `[tokens, hidden]`.
    """
    inner = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)  # [tokens, intermediate]
    kept = position < widths[level][:, None]
    return mlp.down_proj(inner * kept) + bank(x, level)


def gathered_mlp(
    mlp: nn.Module, bank: AdapterBank, order: Tensor, widths: Sequence[int], x: Tensor, level: Tensor
) -> Tensor:
    """The same, really reading only the weights it needs: the tokens of each level gathered, a prefix of the neurons.

    order `[intermediate]`: the neurons, the most important first.
    """

    def narrowed(index: int, own: Tensor) -> Tensor:  # [rows, hidden]
        result = bank.alone(own, index)
        if width := widths[index]:
            kept = order[:width]
            inner = F.silu(F.linear(own, mlp.gate_proj.weight[kept])) * F.linear(own, mlp.up_proj.weight[kept])
            result = result + F.linear(inner, mlp.down_proj.weight[:, kept])
        return result

    return by_level([mlp, *(partial(narrowed, index) for index in range(1, len(widths)))], x, level)


def masked_bits(mlp: nn.Module, rounded: RoundedMLP, widths: Tensor, x: Tensor, level: Tensor) -> Tensor:
    """An MLP at each token's level in bits, the obvious way: every token by the MLP's own weights, by eight bits and by four.

    x `[tokens, hidden]`, level `[tokens]`, widths `[levels]`. Returns `[tokens, hidden]`.
    """
    return torch.where(level[:, None] > 0, rounded.masked(x, widths[level]), mlp(x))


def gathered_bits(mlp: nn.Module, rounded: RoundedMLP, widths: Sequence[int], x: Tensor, level: Tensor) -> Tensor:
    """The same, reading only the weights it needs: the tokens of each level gathered."""
    return by_level([mlp, *(partial(rounded, width=width) for width in widths[1:])], x, level)


def check_mlps(model: nn.Module) -> None:
    """Refuse a model whose MLPs are not the SwiGLU that adapters imitate."""
    for layer in decoder(model).layers:
        linears = [getattr(layer.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        plain = all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears)
        if not plain or getattr(model.config, "hidden_act", "silu") not in ("silu", "swish"):
            raise SedacError(
                f"the MLPs of {type(model).__name__} are no plain SwiGLU: use an unquantised model like Qwen2"
            )


@contextlib.contextmanager
def fp32_stream(model: nn.Module) -> Iterator[None]:
    """Inside the block a bf16 or fp16 model keeps its residual stream in float32 and multiplies in its own type.

    Rounding of the stream would otherwise add damage of its own, about what gates do at small savings.
    """
    if model.dtype == torch.float32:
        yield
        return
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.float())
    try:
        with torch.autocast(model.device.type, model.dtype):
            yield
    finally:
        hook.remove()


def final_states(model: nn.Module, ids: Tensor) -> Tensor:
    """The states that the LM head reads, `[batch, seq, hidden]`, in the model's type; padding stands on the right."""
    with fp32_stream(model):
        return decoder(model)(input_ids=ids, use_cache=False).last_hidden_state.to(model.dtype)


def logits(states: Tensor, head: Tensor) -> Tensor:
    """float32 logits `[tokens, vocabulary]` of states `[tokens, hidden]`; head `[vocabulary, hidden]`.

    On a GPU the product is not rounded to bf16 on its way: that alone would cost about 0.001 nats of KL.
    """
    if states.is_cuda and states.dtype != torch.float32:
        return torch.mm(states, head.t(), out_dtype=torch.float32)
    return (states @ head.t()).float()


class GatedMLP(nn.Module):
    """Stands in for one MLP of a transformers model and decides for each token; asks `decide` for the level."""

    def __init__(self, layer: int, mlp: nn.Module, gates: Gates, decide: Callable[[int, Tensor], Tensor], gather: bool):
        super().__init__()
        self.layer, self.mlp, self.bank, self.decide = layer, mlp, gates.banks[layer], decide
        self.order, self.widths = gates.order[layer], gates.shape.widths
        self.gather = gather or layer not in gates.shape.window
        self.rounded = gates.rounded(layer, mlp) if gates.shape.bits else None
        if not self.gather:
            self.position = self.order.argsort()
            self.width_of = torch.tensor(self.widths, device=self.order.device)  # [levels]

    def forward(self, x: Tensor) -> Tensor:  # [batch, seq, hidden]
        level = self.decide(self.layer, x).flatten()
        rows = x.flatten(0, 1).to(self.mlp.down_proj.weight.dtype)
        pieces = [self.run(*piece) for piece in zip(rows.split(AT_ONCE), level.split(AT_ONCE), strict=True)]
        out = torch.cat(pieces) if len(pieces) > 1 else pieces[0]  # no copy of most steps
        return out.view(x.shape).to(x.dtype)

    def run(self, rows: Tensor, level: Tensor) -> Tensor:  # [tokens, hidden] and [tokens]
        if self.rounded is not None and self.gather:
            return gathered_bits(self.mlp, self.rounded, self.widths, rows, level)
        if self.rounded is not None:
            return masked_bits(self.mlp, self.rounded, self.width_of, rows, level)
        if self.gather:
            return gathered_mlp(self.mlp, self.bank, self.order, self.widths, rows, level)
        return masked_mlp(self.mlp, self.bank, self.position, self.width_of, rows, level)


@contextlib.contextmanager
def gated(
    model: nn.Module,
    gates: Gates,
    log_lambda: Tensor | float,
    *,
    gather: bool | None = None,
    decide: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[list[Tensor]]:
    """Make a transformers model run under its gates inside the block; yields the latest pass's levels by layer.

    Each entry is `[batch, seq]`, int64. `log_lambda` is one number or one for each sequence `[batch]`; `decide(layer,
    x)`, for controls, gives levels in the gates' place. `gather`, or every token runs all neurons and those past its width
    count as zero; by default on CPUs, as on a GPU gathering waits at each layer.
    """
    shape = gates.shape
    gather = model.device.type == "cpu" if gather is None else gather
    price = torch.as_tensor(log_lambda, dtype=torch.float32, device=model.device)
    price = price[:, None] if price.ndim else price
    levels: list[Tensor] = [torch.empty(0)] * shape.num_layers
    gains = shape.gains(model.device)

    def by_gates(layer: int, x: Tensor) -> Tensor:
        leader = shape.leader_of(layer)
        if layer != leader:
            return levels[leader]
        level = choose(gates.gates[str(leader)](x), price.expand(x.shape[:2]), gains[leader])
        before = shape.leader_before(leader)
        return level if before is None else torch.maximum(level, levels[before])

    def keep(layer: int, x: Tensor) -> Tensor:
        inside = layer in shape.window
        levels[layer] = (decide or by_gates)(layer, x) if inside else x.new_zeros(x.shape[:2], dtype=torch.int64)
        return levels[layer]

    with replaced_mlps(model, lambda layer, mlp: GatedMLP(layer, mlp, gates, keep, gather)):
        yield levels
