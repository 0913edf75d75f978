"""What the operators do on a GPU: nothing that a captured CUDA graph could not replay, and host work apart from it.

Four ways through an MLP, chosen by the size of the step alone. Predicated: up to the largest captured size no value may
be read back, and Triton kernels skip on the device. Conditional: at captured sizes where cuBLAS beats them, and for weights
that they cannot read, a node in the graph chooses how many rows the model's own MLP runs for (conditional.py). Gather: steps of
so many tokens that skipping pays for it are not captured; what a checkpoint decided is read back once, and the model's own MLP
runs on the gathered rows. Dense, where none would be faster: the model's own MLP on all rows, and the exited ones set to zero
in its activation, so that a token means the same in every batch. Uncaptured steps run as fast as the host launches, so there an
MLP is as few and as plain calls of torch as can be. Where skipping costs more than dense while nothing is skipped,
a captured step of that size is recorded both ways, and the host picks before each replay (recordings.py).

Gates have all but the second. Their kernels decide, too; a step or a recording that does not skip runs no gate, and each of its
tokens the whole MLP, which is never worse for the answer. Neurons are put in the order of their importance when the model
loads, with the adapters' behind them in the same tensor: vLLM's own MLP runs on views of it.
"""

import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import default_unquantized_gemm

from . import gate_kernels, kernels, polling
from .checkpoint_kernels import ROWS_SAVED, Rule, checkpoint
from .cli import SedacError
from .conditional import Switches, Unavailable
from .control import Change
from .gate_kernels import DeviceGate
from .gates_runtime import PricedGates, before_packing
from .kernels import MlpSettings, Weights
from .policy import Exits, HardExit
from .policy_gates import HOPPER, GatedWidths
from .polling import Seen, SeenLevels
from .recordings import LOOK_EVERY, Pick, record_twice
from .settings import Settings
from .vllm_runtime import Runtime, linear

logger = init_logger("vllm.sedac")

EAGER_STATIC = 64  # without captured graphs: up to here a read-back costs more than it can save
# Floating-point operations of one MLP from which on gathering pays: below, the host cannot launch as fast as the GPU
# computes, and what gathering launches besides costs time (docs/results/gpu_h200.json: 2,048 tokens of 3B against 7B).
GATHER_FROM = 5e11
# The same for gates, which are read back in every layer. 8,192 tokens of 3B, 1.1e12 operations an MLP, gain by gathering once half of
# them are saved; 2,048 take up to twice as long as dense (docs/results/gpu_gates_h200.json, gathered whatever it saves).
GATES_GATHER_FROM = 1e12
# What deciding, reading back and gathering cost in every layer then, in operations of its MLP. Of 8,192 tokens that takes 13 ms of 7B's
# 28 layers and 6 ms of 3B's 36 where nothing narrows; the 3.2e11 that a width of 0.7 saves each of 3B's MLPs do not pay for it, and
# the 5.5e11 of half the tokens do (same file). Steps gather while more than that is saved.
GATES_GATHER_COST = 3.5e11
# Of the tokens whose gates ran, how many later ones make one count half in what the host picks recordings by. Where narrowing pays
# from a share s of rows on, a text that narrows all is followed after 16 · log2(1 / (1 - s)) tokens seen, and back after
# 16 · log2(1 / s): at one token a step and s = 22 % after 6 looks, one every 32 steps (recordings.py), and after 35 steps.
REMEMBERED = 16
# Operations of one worker's share of an MLP from which on a conditional node is used where nobody has measured. A node costs 8 to
# 15 µs (kernel_settings.json); at 2.1e11 operations, 512 tokens of 7B, that is 4.5 % of the MLP, and at 2.5e11 under the 4 % that
# may cost a step 2 %. On slower GPUs and with weights to dequantise an MLP takes longer; newer GPUs than Hopper may be
# faster, and stay dense.
CONDITIONAL_FROM = 2.5e11


class GpuRuntime(Runtime):
    """Exits inside CUDA graphs."""

    def __init__(self, name: str, model: nn.Module, policy: HardExit, settings: Settings, vllm_config: Any):
        super().__init__(name, model, policy, settings)
        tensor_parallel = get_tensor_model_parallel_world_size()
        if self.controller is not None and tensor_parallel > 1:
            raise SedacError(
                "adaptive thresholds with tensor parallelism are not supported yet on GPUs: set SEDAC_ADAPTIVE=0 and "
                "SEDAC_THRESHOLDS, or calibrate (python sedac_calibrate.py)"
            )
        policy = self.policy
        adaptive = self.controller is not None
        self.rule = Rule.make(policy.table, policy.weights, policy.gamma, policy.level, adaptive)
        self.taken = self.rule.taken
        self.taken.fill_(self.phase)
        self.static_limit = static_limit(vllm_config)
        bounds = itertools.pairwise([*self.checkpoints, self.window.stop - 1])
        self.alike = {layer: range(layer, last + 1) for first, last in bounds for layer in range(first + 1, last + 1)}
        size = 6 * model.config.hidden_size * model.config.intermediate_size // tensor_parallel
        self.tensor_parallel = tensor_parallel > 1
        # What the last checkpoint of an uncaptured step left: the rows that run, of which the host knows how many, where the step
        # gathers, else which rows do not run, [tokens, 1].
        self.computed: Tensor | None = None
        self.exited: Tensor | None = None
        self.whole = WholeMlps(self.mlps)
        self.why_dense = why = why_no_kernels(vllm_config)
        self.paths = kernels.Paths(
            self.static_limit,
            max(self.static_limit + 1, int(GATHER_FROM / size)),
            -int(-CONDITIONAL_FROM // size),
            None if why else tuple(self.mlps[self.window[0]].down_proj.weight.shape),
            switches=captures(vllm_config)
            and torch.cuda.get_device_capability() <= HOPPER
            and vllm_config.lora_config is None,
            twice=captures(vllm_config),
        )
        sizes = range(1, self.static_limit + 1)
        if any(map(self.paths.second, sizes)):
            self.paths.twice = record_twice()
        self.pick = Pick(self.gains, [1.0] * len(self.checkpoints))
        self.switches: Switches | None = None
        if "conditional" in map(self.paths, sizes):
            try:
                self.switches = Switches(self.rule.counters.device, len(self.window))
            except Unavailable as error:
                self.do_without_switches(error)
        self.log_paths(why)
        if get_tensor_model_parallel_rank() == 0:  # the others would count the same tokens again
            polling.start(self, Seen)

    def do_without_switches(self, reason: Unavailable) -> None:
        """Captured steps that would have had conditional nodes run dense from now on."""
        self.paths.switches, self.switches = False, None
        logger.warning(
            "SEDAC: no conditional nodes in CUDA graphs: %s; steps that want them run every MLP whole", reason
        )

    def log_paths(self, why_no_kernels: str | None) -> None:
        """Which steps skip, and what keeps the others from it."""
        ways = {
            "predicated": "by kernels",
            "conditional": "by conditional nodes in the graph",
            "second": "by a second recording while enough of their rows exit",
        }
        by_way: dict[str, list[int]] = {}
        for tokens in range(1, self.static_limit + 1):
            by_way.setdefault("second" if self.paths.second(tokens) else self.paths(tokens), []).append(tokens)
        found = [f"of {spans(by_way[way])} tokens {words}" for way, words in ways.items() if way in by_way]
        found.append(f"of {self.paths.gather_from} or more by gathering rows")
        logger.log(
            logging.WARNING if why_no_kernels else logging.INFO,
            "SEDAC: %sMLPs are skipped in steps %s; in steps of other sizes every MLP runs whole and nothing is saved",
            f"{why_no_kernels}: " if why_no_kernels else "",
            ", ".join(found),
        )

    def gains(self, tokens: int, running: Sequence[float]) -> float | None:
        """Microseconds that the kernels save a step of so many tokens, if it is recorded twice and this share of its tokens runs
        on after each checkpoint."""
        second = self.paths.second(tokens)
        if second is None:
            return None
        return sum(
            layers * second.gains(share, tokens) for layers, share in zip(self.layers_ahead, running, strict=True)
        )

    def path(self, tokens: int) -> str:
        """The way of the step that is being captured, or runs without a graph, through its MLPs."""
        found = "predicated" if self.pick.captured and self.paths.second(tokens) else self.paths(tokens)
        return "dense" if found == "gather" and self.some_adapted else found

    def skips(self, tokens: int) -> bool:
        """Whether the next step of so many tokens, captured if it is small, saves anything where rows exit."""
        return self.paths(tokens) != "dense" or self.pick.pays(tokens)

    def checkpoint(self, index: int, hidden: Tensor, residual: Tensor, margin: Tensor | None) -> Exits:
        path = self.path(len(hidden))
        # Of what a node skips, the node's own kernel keeps count.
        ahead = self.layers_ahead[index] if path in ("predicated", "gather") else 0
        rest = (slots(), self.rule, index, ahead, self.token_rows, path)
        exits = Exits(*checkpoint(self.policy.probes[index], hidden, residual, margin, *rest))
        if path == "gather":
            self.computed = exits.rows[: int(exits.n_running)]
        elif path == "conditional":
            self.switches.checkpoint()
        elif len(hidden) > self.static_limit:
            self.exited = not_running(exits.rows, exits.n_running)
        return exits

    def mlp(self, x: Tensor, rows: Tensor, n_running: Tensor, layer: int) -> Tensor:
        tokens, mlp = len(x), self.mlps[layer]
        path = self.path(tokens)
        if path == "gather":
            return gather(x, self.computed, self.whole[layer])
        if tokens > self.static_limit:
            return self.whole[layer](x).masked_fill_(self.exited, 0)
        if path == "predicated":
            return kernels.mlp(x, Weights(mlp.gate_up_proj.weight, mlp.down_proj.weight), rows, n_running)
        if path == "conditional" and torch.cuda.is_current_stream_capturing():
            own = partial(without_sum, mlp)
            saved = self.rule.counters[ROWS_SAVED : ROWS_SAVED + 1]
            out = self.switches.mlp(x, rows, n_running, self.alike[layer], own, slots(), saved)
            return tensor_model_parallel_all_reduce(out) if self.tensor_parallel else out
        if path == "conditional":  # vLLM runs every size once before it captures it
            try:
                self.switches.prepare(x, partial(without_sum, mlp))
            except Unavailable as error:
                self.do_without_switches(error)
        return dense(mlp, x, rows, n_running)


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
        self.gather_from = max(self.static_limit + 1, int(GATES_GATHER_FROM / self.mlp_operations))
        self.gather_cost = GATES_GATHER_COST
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
        sizes = range(1, self.static_limit + 1)
        inside = spans([tokens for tokens in sizes if self.tuned(tokens).path == "predicated"])
        second = spans([tokens for tokens in sizes if self.second(tokens)])
        found = [f"of {inside} tokens by kernels"] if inside else []
        found += [f"of {second} tokens by a second recording while enough of their rows narrow"] if second else []
        found.append(f"of {self.gather_from} or more by gathering rows while enough of them narrow")
        logger.info(
            "SEDAC: gates narrow MLPs in steps %s; in steps of other sizes, where the kernels do not win or were never timed, "
            "every MLP runs whole and nothing is saved",
            ", ".join(found),
        )

    def narrow(self, layer: int) -> None:
        """Put one loaded MLP's neurons in their order and its adapters behind them; vLLM's own layers become views."""
        mlp, gates, shape = self.mlps[layer], self.policy.gates, self.policy.shape
        gate_up, down = mlp.gate_up_proj.weight, mlp.down_proj.weight
        order, bank = gates.order[layer].to(down.device), gates.banks[layer].to(down.device)
        weights = Weights.narrowed(gate_up.data, down.data, order, bank, shape.widths)
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
        return kernels.mlp_settings(tokens, shape.hidden_size, shape.intermediate_size, gated=True)

    def second(self, tokens: int) -> MlpSettings | None:
        """The settings of a captured step that has a second recording, by the kernels (recordings.py); else None."""
        found, widths = self.tuned(tokens), self.policy.shape.widths
        if not self.twice or tokens > self.static_limit or not found.us:
            return None
        narrowest = [0.0] * (len(widths) - 1) + [1.0]
        return found if found.gains_narrowed(narrowest, widths, tokens) > 0 else None

    def gains(self, tokens: int, shares: Sequence[float]) -> float | None:
        """Microseconds that the kernels save an MLP of a step of so many tokens, if it is recorded twice and these shares of its
        rows run at each level."""
        second = self.second(tokens)
        return None if second is None else second.gains_narrowed(shares, self.policy.shape.widths, tokens)

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


def not_running(rows: Tensor, n_running: Tensor) -> Tensor:
    """Which tokens do not run, `[tokens, 1]`, bool, where the first n_running `[1]` of rows `[tokens]` do."""
    after = torch.arange(len(rows), device=rows.device) >= n_running
    return torch.empty_like(after).scatter_(0, rows, after)[:, None]


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


def why_no_kernels(vllm_config: Any) -> str | None:
    """Why this package's kernels cannot run the MLPs of a model, or should not."""
    if vllm_config.quant_config is not None:
        return f"weights are quantised ({vllm_config.quant_config.get_name()})"
    if vllm_config.lora_config is not None:
        return "LoRA adapters may add to weights"
    if get_tensor_model_parallel_world_size() > 1:
        return "weights are split by tensor parallelism"
    if vllm_config.model_config.dtype not in (torch.bfloat16, torch.float16):
        return f"the model runs in {vllm_config.model_config.dtype}"
    if torch.cuda.get_device_capability() != HOPPER:
        return "the kernels were only tuned on Hopper GPUs"
    return None


def without_sum(mlp: nn.Module, x: Tensor) -> Tensor:
    """vLLM's own MLP before its output is summed over the workers, which a conditional node leaves to all of them: a worker
    that waited in one for another would wait for ever if the two ever disagreed."""
    down = mlp.down_proj
    sums, down.reduce_results = down.reduce_results, False
    try:
        return dense(mlp, x)
    finally:
        down.reduce_results = sums


def captures(vllm_config: Any) -> bool:
    """Whether vLLM captures CUDA graphs."""
    compilation = vllm_config.compilation_config
    return not vllm_config.model_config.enforce_eager and bool(compilation.max_cudagraph_capture_size)


def static_limit(vllm_config: Any) -> int:
    """Tokens of a step up to which nothing may be read back."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size if captures(vllm_config) else 0
    return max(EAGER_STATIC, captured)


def slots() -> Tensor | None:
    """Each token's slot in the KV cache `[tokens]`, negative for padding; None in vLLM's own dummy runs."""
    return next(iter(get_forward_context().slot_mapping.values()), None)


def spans(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> '1 to 3, 7'."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in found)
