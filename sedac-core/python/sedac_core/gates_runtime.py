"""Gates beside a model, on whatever device: what torch.compile traces, and the price, which an admin call changes."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from .cli import SedacError
from .control import BEYOND, Change
from .metrics import GateCounters
from .operators import layer_numbers
from .policy_gates import GatedWidths
from .settings import Settings
from .vllm_requests import PerRequest


class GatesRuntime(PerRequest):
    """The part of a runtime of gates that is the same on every device: the traced half, and its price, which an admin call may
    change."""

    def __init__(self, name: str, model: nn.Module, policy: GatedWidths, settings: Settings):
        self.name, self.policy = name, policy
        self.choices = tuple(policy.choices)
        self.numbers = layer_numbers(policy.shape.num_layers)
        down = model.layers[0].mlp.down_proj.weight
        policy.move_prices(down.device)  # in place from here on: captured graphs read them
        self.counters = GateCounters(policy.shape, 3 * down.numel() * down.element_size())
        self.counters.price(policy.log_lambda.item(), policy.source, policy.bounds)
        self.enabled, self.settled = True, policy.prices.cpu().clone()  # the prices while SEDAC is on
        self.source, self.bounds = policy.source, policy.bounds
        self.lock = threading.Lock()  # for whoever writes the prices
        self.log_every = settings.log_every
        self.leaders, self.window = policy.shape.leaders, policy.shape.window

    # Traced by torch.compile: branches on layer indices only.

    def run_layer(
        self,
        idx: int,
        layer: nn.Module,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        level: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run decoder layer `idx`; the level `[tokens]` is the latest leader's, and this layer's own where it leads."""

        def mlp(x: Tensor) -> Tensor:
            nonlocal level
            if idx in self.leaders:
                level = torch.ops.sedac.gate(x, idx, self.name)
            return self.narrowed(idx, layer.mlp, level, x)

        hidden, residual = layer(positions, hidden, residual, *([mlp] if idx in self.window else []))
        return hidden, residual, level

    def narrowed(self, layer: int, mlp: nn.Module, level: Tensor, x: Tensor) -> Tensor:
        """What stands in the graph in place of `mlp(x)`, at levels that were decided."""
        return torch.ops.sedac.narrowed_mlp(x, level, self.numbers[layer], self.name)

    # What an admin call asks of it (control.py), between two steps.

    def state(self) -> dict[str, Any]:
        """What is in force, as JSON."""
        return {
            "policy": self.policy.name,
            "enabled": self.enabled,
            "log_lambda": self.settled[0].item(),
            "source": self.source,
        }

    def change(self, change: Change) -> None:
        """Put another price in force, or switch SEDAC off and on; `SedacError` and nothing changed where it does not fit or lies
        beyond the certificate."""
        if (change.adaptive, change.thresholds, change.exit_rates) != (None, None, None):
            raise SedacError("gates have one knob, log_lambda, besides enabled; thresholds and rates are a cascade's")
        before, certified = self.state(), self.policy.certified
        if change.log_lambda is not None:
            price = torch.tensor(change.log_lambda, dtype=torch.float32).item()
            beyond = certified is not None and price > certified  # a lower price does no more damage
            if beyond and not change.beyond_certificate:
                raise SedacError(f"log_lambda {price:.6g} lies above the certified {certified:.6g}: {BEYOND}")
            self.source, self.settled[0] = "admin", price
            self.bounds = [] if beyond else self.policy.bounds
        if change.enabled is not None:
            self.enabled = change.enabled
        with self.lock:
            self.policy.prices.copy_(self.settled if self.enabled else torch.full_like(self.settled, -torch.inf))
        source = self.source if self.enabled else "switched off"
        self.counters.price(self.policy.log_lambda.item(), source, self.bounds)
        self.log_change(before)

    def report(self, log_lambda: float, steps_before: int) -> None:
        """After the counters moved on: log once every so many steps."""
        self.counters.log(self.log_every, steps_before, log_lambda)


def before_packing(mlp: nn.Module, build: Any) -> None:
    """Call `build()` once this MLP's weights are loaded and before vLLM packs them, which on CPUs takes them away.

    vLLM packs a model's linear layers in their order, so the first of an MLP comes while both still have their weights.
    """
    method = mlp.gate_up_proj.quant_method
    pack = method.process_weights_after_loading

    def build_and_pack(linear: nn.Module) -> None:
        build()
        pack(linear)

    method.process_weights_after_loading = build_and_pack
