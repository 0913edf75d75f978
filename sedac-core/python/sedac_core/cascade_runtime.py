"""A cascade's exits beside a model, on whatever device: what torch.compile traces, and what an admin call changes."""

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank

from ._rust import ThresholdController
from .cli import SedacError
from .control import BEYOND, Change
from .metrics import Counters, OwnTotals
from .operators import layer_numbers
from .policy import Exits, HardExit, exceed
from .settings import Settings, check_lengths
from .vllm_requests import PerRequest


class CascadeRuntime(PerRequest):
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
        self.numbers = layer_numbers(policy.num_layers)
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
        self.log_change(before)

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
        return torch.ops.sedac.mlp(x, exits.rows, exits.n_running, self.numbers[layer], self.name)

    # Behind the operators.

    def mlp(self, x: Tensor, rows: Tensor, n_running: Tensor, layer: int) -> Tensor:
        """The MLP of `layer` for the first `n_running` of `rows`; zeros `[tokens, hidden]` elsewhere."""
        raise NotImplementedError

    def report(self, thresholds: list[float], steps_before: int) -> None:
        """After the counters moved on: publish the thresholds in force, and log once every so many steps."""
        if self.controller is not None and self.enabled and not self.watching:
            self.counters.thresholds(thresholds)
        self.counters.log(self.log_every, steps_before, thresholds)
