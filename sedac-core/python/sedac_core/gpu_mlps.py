"""The model's own MLPs on a GPU, outside of vLLM's compiled graph: whole, on some of a step's rows, or with zeros for the others."""

import weakref
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import default_unquantized_gemm

from . import kernels


class WholeMlps(dict):
    """By layer, `whole(x)` `[tokens, hidden]`: the model's own MLP in a step that is not captured, made when it is first asked
    for, which is after the weights were loaded."""

    def __init__(self, mlps: Mapping[int, nn.Module]):
        super().__init__()
        self.mlps = mlps

    def __missing__(self, layer: int) -> Callable[[Tensor], Tensor]:
        mlp = self.mlps[layer]
        both = (mlp.gate_up_proj, mlp.down_proj)
        if all(map(is_plain, both)):
            found = partial(plain_mlp, *(linear.weight.data.t() for linear in both))
        else:
            found = partial(dense, mlp)
        self[layer] = found
        return found


def plain_mlp(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """The MLP of x `[tokens, hidden]` by torch's products and vLLM's activation; gate_up `[hidden, 2 · neurons]`, down
    `[neurons, hidden]`. vLLM's own layers do the same in five times as many calls of Python."""
    both = torch.mm(x, gate_up)
    act = both.new_empty(both.shape[0], down.shape[0])
    torch.ops._C.silu_and_mul.default(act, both)
    return torch.mm(act, down)


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer is a product with its weight and nothing else, so that torch's may stand in for it."""
    if hasattr(layer, "base_layer"):  # a LoRA adapter may add to it
        return False
    method = layer.quant_method
    product = getattr(method, "_gemm_impl", default_unquantized_gemm)  # newer versions let it be chosen
    unquantised = type(method) is UnquantizedLinearMethod and product is default_unquantized_gemm
    return unquantised and layer.bias is None and layer.tp_size == 1 and not envs.VLLM_BATCH_INVARIANT


def first_of(rows: Tensor, count: Tensor) -> Callable[[], Tensor]:
    """The first of the rows, as many as there are in count `[1]`, to be asked for once the GPU has been given more to do: the host waits
    for that number alone, and what it launches next finds the GPU at work."""
    number, copied = count.to("cpu", non_blocking=True), torch.cuda.Event() if count.is_cuda else None
    if copied is not None:
        copied.record()

    @cache
    def found() -> Tensor:
        if copied is not None:
            copied.synchronize()
        return rows[: int(number)]

    return found


def gather(x: Tensor, computed: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
    """`whole` of the rows `computed`, zeros `[tokens, hidden]` elsewhere."""
    if len(computed) == len(x):
        return whole(x)
    out = torch.zeros_like(x)
    return out.index_copy_(0, computed, whole(x.index_select(0, computed))) if len(computed) else out


def dense(mlp: nn.Module, x: Tensor, rows: Tensor | None = None, n_running: Tensor | None = None) -> Tensor:
    """vLLM's own MLP of `x` `[tokens, hidden]`, outside of the compiled graph; where rows `[tokens]` and n_running `[1]` are
    given, zeros for the rows after the first n_running.

    The activation gives zeros for them, and so does a plain last product. A quantised one may divide a row by its greatest
    number, and one with a bias adds it: where it gives no zeros, a launch of its own sets rows to zero.
    """
    both = linear(mlp.gate_up_proj, x)
    inside = rows is not None and gives_zeros_for_zeros(mlp.down_proj, both)
    out = linear(mlp.down_proj, kernels.silu_mul(both, *((rows, n_running) if inside else ())))
    return out if inside or rows is None else kernels.zero_exited(out, rows, n_running)


# Of quantised linear layers, whether they give zeros for zeros.
tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def gives_zeros_for_zeros(layer: nn.Module, both: Tensor) -> bool:
    """Whether an MLP's last product is zero for rows of zeros, alone and among others; `both` `[tokens, 2 · inputs]` is what its
    activation takes. Quantised ones are tried once, and not while a graph is captured: vLLM runs each size before that."""
    layer = getattr(layer, "base_layer", layer)  # what a LoRA adapter adds is zero for zeros
    if isinstance(layer.quant_method, UnquantizedLinearMethod):
        return layer.bias is None
    if layer not in tried:
        if both.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        rows = both.new_ones(3, both.shape[1] // 2)
        rows[1] = 0
        found = linear(layer, rows)[1], linear(layer, torch.zeros_like(rows))
        tried[layer] = not any(out.isnan().any() or out.any() for out in found)
    return tried[layer]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """vLLM's linear layer of `x`, beside which it returns no bias here."""
    return layer(x)[0]


def without_sum(mlp: nn.Module, x: Tensor) -> Tensor:
    """vLLM's own MLP before its output is summed over the workers, which a conditional node leaves to all of them: a worker
    that waited in one for another would wait for ever if the two ever disagreed."""
    down = mlp.down_proj
    sums, down.reduce_results = down.reduce_results, False
    try:
        return dense(mlp, x)
    finally:
        down.reduce_results = sums
