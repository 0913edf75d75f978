"""What the patched vLLM model calls.

`attach` builds a `Runtime` beside a Qwen2 model; `Runtime.run_layer` is traced by torch.compile in place of the call of a
decoder layer. In the graph stand opaque operators that carry nothing but activations and indices, and find the rest through vLLM's forward
context: for a cascade `sedac::checkpoint` and `sedac::mlp` (on a CPU checkpoints are traced, and `sedac::rules` and `sedac::count` stand around
them), for gates `sedac::gate` (on a GPU `sedac::gated_mlp`) and `sedac::narrowed_mlp`. No graph holds a threshold.
"""

import functools
import itertools
import json
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.library import Library, infer_schema
from torch.nn import functional as F
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from . import vllm_patch, vllm_plugin
from ._rust import ThresholdController
from .cli import SedacError
from .control import BEYOND, Change
from .metrics import Counters, OwnTotals
from .policy import Exits, HardExit, exceed, load_policy
from .policy_gates import GatedWidths, check_gates_supported
from .settings import Settings, check_lengths
from .vllm_requests import PerRequest, follow_batches

if TYPE_CHECKING:
    from .gates_runtime import GatesRuntime
    from .gpu_gates import GpuGates

logger = init_logger("vllm.sedac")

# Above this many rows, a gathered MLP runs for a multiple of it: each new row count costs oneDNN a compilation.
ROW_STEP = 16


def attach(model: nn.Module, vllm_config: Any, prefix: str) -> "Runtime | GatesRuntime | GpuGates":
    """Make the runtime of a Qwen2Model under construction, or stop vLLM's start with a sentence that says why not."""
    settings = Settings.from_env()
    vllm_plugin.require_registered()
    check_supported(model, vllm_config)
    policy = load_policy(settings, model.config)
    key = {**policy.graph_key(), "prefix": prefix, "patch": vllm_patch.fingerprint()}
    vllm_config.additional_config["sedac"] = json.dumps(key, sort_keys=True)  # part of the compile cache's key
    runtime = make_runtime(f"{prefix}.sedac", model, policy, settings, vllm_config)
    sizes = (
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.compilation_config.max_cudagraph_capture_size,
    )
    runtime.make_room(max(size or 0 for size in sizes), next(model.parameters()).device)
    follow_batches(vllm_config)
    vllm_config.compilation_config.static_forward_context[runtime.name] = runtime
    if policy.warning:
        logger.warning("SEDAC: %s", policy.warning)
    logger.info("SEDAC on: %s, from %s", policy.describe(settings), settings.probe_dir)
    return runtime


def make_runtime(
    name: str, model: nn.Module, policy: HardExit | GatedWidths, settings: Settings, vllm_config: Any
) -> "Runtime | GatesRuntime | GpuGates":
    """The runtime of this policy on this device."""
    cpu = vllm_config.device_config.device_type == "cpu"
    if isinstance(policy, GatedWidths):
        check_gates_supported(vllm_config)
        if cpu:
            from .gates_runtime import GatesRuntime

            return GatesRuntime(name, model, policy, settings)
    elif cpu:
        return CpuRuntime(name, model, policy, settings, vllm_config)
    from .gpu_gates import GpuGates  # the only way to Triton
    from .gpu_runtime import GpuRuntime

    runtime = GpuGates if isinstance(policy, GatedWidths) else GpuRuntime
    return runtime(name, model, policy, settings, vllm_config)


def check_supported(model: nn.Module, vllm_config: Any) -> None:
    """Refuse what SEDAC cannot run rightly yet: other decoder layers, pipeline parallel, speculation, DBO."""
    from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer

    off = "or unset SEDAC_ENABLED"
    layers = {type(layer) for layer in model.layers}
    if layers != {Qwen2DecoderLayer}:
        names = ", ".join(sorted(layer.__name__ for layer in layers))
        raise SedacError(f"SEDAC runs Qwen2 and Qwen2.5 decoder layers, found {names}: choose such a model {off}")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise SedacError(f"SEDAC does not support pipeline parallelism yet: set --pipeline-parallel-size 1 {off}")
    if vllm_config.speculative_config is not None:
        raise SedacError(f"SEDAC does not support speculative decoding yet: start without it {off}")
    if not isinstance(vllm_config.additional_config, dict):
        raise SedacError(f"SEDAC needs vLLM's additional_config to be a dict: start without your own class {off}")
    if vllm_config.parallel_config.enable_dbo:
        raise SedacError(f"SEDAC does not support micro-batched steps: start without --enable-dbo {off}")


def log_change(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Every change of a running server stands in its log, old and new."""
    for name in [*before, *(name for name in now if name not in before)]:
        if before.get(name) != now.get(name):
            logger.info("SEDAC changed by an admin call: %s was %s, is %s", name, before.get(name), now.get(name))


class Runtime(PerRequest):
    """One model's exits: the traced half, `run_layer`; what the operators do is the business of a subclass a device."""

    taken: Tensor | None = None  # on a GPU, [1]: its `phase`

    def __init__(self, name: str, model: nn.Module, policy: HardExit, settings: Settings):
        self.name = name
        self.policy = policy.to(next(model.parameters()).device)
        self.checkpoints = policy.checkpoints
        self.window = policy.window
        bounds = [*self.checkpoints[1:], self.window.stop - 1]
        self.layers_ahead = [last - layer for layer, last in zip(self.checkpoints, bounds, strict=True)]
        self.choices = tuple(policy.choices)
        self.mlps = {layer: model.layers[layer].mlp for layer in self.window}
        mlp = self.mlps[self.window[0]]
        weights = sum(weight.numel() * weight.element_size() for weight in mlp.parameters())
        counts = Counters if get_tensor_model_parallel_rank() == 0 else OwnTotals
        self.counters = counts(policy.checkpoints, policy.num_layers, weights)
        self.log_every = settings.log_every
        self.settings = settings
        self.enabled = True  # an admin call can switch SEDAC off: nothing exits then
        self.lock = threading.Lock()  # for whoever writes the policy's table
        self.settled = policy.table.cpu().clone()  # the table while SEDAC is on, adaptive thresholds apart
        self.source = policy.threshold_source
        self.rates = settings.exit_rates
        self.controller: ThresholdController | None = None
        self.warm_up = settings.calibration_steps
        if settings.adaptive:
            self.controller = self.new_controller()
        self.counters.thresholds([0.0] * len(self.checkpoints) if self.watching else policy.thresholds.tolist())
        self.counters.state(self.calibration)
        self.counters.certify(policy.bounds)

    @property
    def watching(self) -> bool:
        """Adaptive and still warming up: exits are decided, so that later checkpoints see who is left, but not taken."""
        return self.controller is not None and self.counters.steps < self.warm_up

    @property
    def phase(self) -> int:
        """The same as a GPU's kernels have it: step_counters.OBSERVING, TAKEN or OFF."""
        return 2 if not self.enabled else 0 if self.watching else 1

    @property
    def calibration(self) -> str:
        """Where the thresholds in force come from, in a word."""
        if not self.enabled:
            return "switched off"
        return "observing" if self.watching else "adaptive" if self.controller is not None else self.source

    def new_controller(self) -> ThresholdController:
        settings, now = self.settings, self.settled[0].tolist()
        return ThresholdController(list(self.rates), settings.adaptive_alpha, settings.adaptive_window, now)

    def steer(self) -> None:
        """Move adaptive thresholds to what was observed."""
        self.controller.update()
        if self.policy.certified is not None:
            self.publish(self.controller.thresholds())

    def publish(self, thresholds: list[float]) -> None:
        """Put adaptive thresholds in force; they never exceed certified ones."""
        limits = self.policy.certified or (torch.inf,) * len(thresholds)
        self.controller.publish(list(map(min, thresholds, limits)))

    # What an admin call asks of it (control.py), between two steps.

    def state(self) -> dict[str, Any]:
        """What is in force, as JSON."""
        thresholds = self.controller.thresholds() if self.controller is not None else self.settled[0].tolist()
        found = {"policy": "hard", "enabled": self.enabled, "adaptive": self.controller is not None}
        if self.controller is not None:
            found["exit_rates"] = list(self.rates)
        return found | {"thresholds": ["inf" if value == torch.inf else value for value in thresholds]}

    def change(self, change: Change) -> None:
        """Put other settings in force; `SedacError` and nothing changed where they do not fit."""
        if change.log_lambda is not None:
            raise SedacError("log_lambda is for gates, and this server runs a cascade: give thresholds or exit_rates")
        check_lengths(self.checkpoints, thresholds=change.thresholds, exit_rates=change.exit_rates)
        adaptive = change.adaptive or change.exit_rates is not None
        rates = change.exit_rates or self.rates
        if adaptive:
            check_lengths(self.checkpoints, exit_rates=rates)
            if self.controller is None and not self.policy.table.is_cpu:
                raise SedacError("on a GPU adaptive thresholds must be on from the start: SEDAC_ADAPTIVE=1")
        certified, beyond = self.policy.certified, False
        if change.thresholds is not None and certified is not None:
            beyond = exceed(change.thresholds, certified)
            if beyond and not change.beyond_certificate:
                limits = ", ".join(f"{limit:g}" for limit in certified)
                raise SedacError(f"thresholds exceed the certified {limits}: {BEYOND}")
        before = self.state()
        with self.lock:
            if self.controller is not None and self.controller.tokens(0):
                self.settled[0] = torch.tensor(self.controller.thresholds())
            self.rates = rates
            if adaptive:
                self.controller = self.new_controller()
                self.publish(self.settled[0].tolist())  # what is in force moves on from where it is
                self.settled[0] = torch.tensor(self.controller.thresholds())
            elif change.thresholds is not None or change.adaptive is False:
                self.controller, self.source = None, "admin"
            if change.thresholds is not None:
                self.settled[0] = torch.tensor(change.thresholds)
            if change.enabled is not None:
                self.enabled = change.enabled
            if not self.policy.table.is_cpu:
                torch.accelerator.synchronize()  # what the poll's stream was given before
            self.policy.table.copy_(self.settled if self.enabled else torch.zeros_like(self.settled))
            if self.taken is not None:
                self.taken.fill_(self.phase)
        self.counters.state(self.calibration)
        if adaptive or change.thresholds is not None:
            self.counters.certify([] if beyond else self.policy.bounds)
        self.counters.thresholds(self.policy.thresholds.tolist())
        log_change(before, self.state())

    # Traced by torch.compile: branches on layer indices only.

    def run_layer(
        self,
        idx: int,
        layer: nn.Module,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        exits: Exits | None,
    ) -> tuple[Tensor, Tensor, Exits | None]:
        """Run decoder layer `idx`, its MLP for the running tokens alone, and the checkpoint after it if there is one."""
        if exits is not None and idx in self.window:
            mlp = functools.partial(self.skipping, idx, layer.mlp, exits)
            hidden, residual = layer(positions, hidden, residual, mlp)
        else:
            hidden, residual = layer(positions, hidden, residual)
        if idx in self.checkpoints:
            exits = self.decide(self.checkpoints.index(idx), hidden, residual, exits)
        return hidden, residual, exits

    def decide(self, index: int, hidden: Tensor, residual: Tensor, exits: Exits | None) -> Exits:
        """Checkpoint `index` decides, `hidden + residual` `[tokens, hidden]` being the residual stream."""
        margin = None if exits is None else exits.margin
        return Exits(*torch.ops.sedac.checkpoint(hidden, residual, margin, index, self.name))

    def skipping(self, layer: int, mlp: nn.Module, exits: Exits, x: Tensor) -> Tensor:
        """What stands in the graph in place of `mlp(x)`."""
        return torch.ops.sedac.mlp(x, exits.rows, exits.n_running, layer, self.name)

    # Behind the operators.

    def mlp(self, x: Tensor, rows: Tensor, n_running: Tensor, layer: int) -> Tensor:
        """The MLP of `layer` for the first `n_running` of `rows`; zeros `[tokens, hidden]` elsewhere."""
        raise NotImplementedError

    def report(self, thresholds: list[float], steps_before: int) -> None:
        """After the counters moved on: publish the thresholds in force, and log once every so many steps."""
        if self.controller is not None and self.enabled and not self.watching:
            self.counters.thresholds(thresholds)
        self.counters.log(self.log_every, steps_before, thresholds)


class CpuExits(NamedTuple):
    """`Exits` on a CPU, with what the step's counting wants to know at its end."""

    margin: Tensor
    rows: Tensor
    n_running: Tensor
    rules: tuple[Tensor, Tensor]  # what `sedac::rules` found
    decided: tuple[Tensor, ...]  # risk [tokens] and margin [tokens] of each checkpoint so far


class CpuRuntime(Runtime):
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


def _runtime(name: str) -> Any:
    return get_forward_context().no_compile_layers[name]


def checkpoint(
    hidden: Tensor, residual: Tensor, margin: Tensor | None, index: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    exits = _runtime(name).checkpoint(index, hidden, residual, margin)
    return exits.margin, exits.rows, exits.n_running


def checkpoint_fake(
    hidden: Tensor, residual: Tensor, margin: Tensor | None, index: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty(tokens, dtype=torch.int64),
        hidden.new_empty(1, dtype=torch.int32),
    )


def rules(hidden: Tensor, checkpoints: int, name: str) -> tuple[Tensor, Tensor]:
    return _runtime(name).rules(len(hidden))


def rules_fake(hidden: Tensor, checkpoints: int, name: str) -> tuple[Tensor, Tensor]:
    thresholds = hidden.new_empty(checkpoints, hidden.shape[0], dtype=torch.float32)
    return thresholds, hidden.new_empty(1, dtype=torch.bool)


def count(decided: Tensor, n_running: Tensor, name: str) -> Tensor:
    """Returns n_running, which the layers behind it need: nothing else would keep this in the graph."""
    _runtime(name).count(decided)
    return n_running.clone()


def count_fake(decided: Tensor, n_running: Tensor, name: str) -> Tensor:
    return torch.empty_like(n_running)


def mlp(x: Tensor, rows: Tensor, n_running: Tensor, layer: int, name: str) -> Tensor:
    return _runtime(name).mlp(x, rows, n_running, layer)


def mlp_fake(x: Tensor, rows: Tensor, n_running: Tensor, layer: int, name: str) -> Tensor:
    return torch.empty_like(x)


def gate(x: Tensor, leader: int, name: str) -> Tensor:
    return _runtime(name).gate(x, leader)


def gate_fake(x: Tensor, leader: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def gated_mlp(x: Tensor, least: Tensor | None, layer: int, name: str) -> tuple[Tensor, Tensor]:
    return _runtime(name).gated_mlp(x, least, layer)


def gated_mlp_fake(x: Tensor, least: Tensor | None, layer: int, name: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int32)


def narrowed_mlp(x: Tensor, level: Tensor, layer: int, name: str) -> Tensor:
    return _runtime(name).narrowed_mlp(x, level, layer)


def narrowed_mlp_fake(x: Tensor, level: Tensor, layer: int, name: str) -> Tensor:
    return torch.empty_like(x)


_library = Library("sedac", "DEF")  # torch.library.custom_op costs tens of microseconds more a call
for _name, _op, _fake in (
    ("checkpoint", checkpoint, checkpoint_fake),
    ("rules", rules, rules_fake),
    ("count", count, count_fake),
    ("mlp", mlp, mlp_fake),
    ("gate", gate, gate_fake),
    ("gated_mlp", gated_mlp, gated_mlp_fake),
    ("narrowed_mlp", narrowed_mlp, narrowed_mlp_fake),
):
    _library.define(_name + infer_schema(_op, mutates_args=()))
    _library.impl(_name, _op, "CompositeExplicitAutograd")
    _library._register_fake(_name, _fake)
