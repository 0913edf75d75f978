"""SEDAC's counters: summed in the worker, logged, and handed to prometheus-client.

Worker and API server are different processes: the server's /metrics shows these once PROMETHEUS_MULTIPROC_DIR names a
folder before vLLM starts (sedac_start_server.py sees to that).
"""

import dataclasses
from collections.abc import Sequence

from prometheus_client import Counter, Gauge

STEPS = Counter("sedac_forward_steps", "Forward steps of the patched model that carried tokens")
TOKENS = Counter("sedac_tokens", "Tokens that went through the patched model")
EXITS = Counter("sedac_exits", "Tokens that exited, by checkpoint", ["checkpoint"])
ROWS_COMPUTED = Counter("sedac_mlp_rows_computed", "MLP rows (token x layer) computed")
ROWS_SAVED = Counter("sedac_mlp_rows_saved", "MLP rows (token x layer) not computed")
NOT_FINITE = Counter("sedac_not_finite", "Tokens whose risk was NaN or infinite, by checkpoint", ["checkpoint"])
THRESHOLD = Gauge(
    "sedac_threshold", "Threshold in force, by checkpoint", ["checkpoint"], multiprocess_mode="mostrecent"
)


@dataclasses.dataclass
class Counters:
    """Totals since the start, and their way to Prometheus."""

    checkpoints: tuple[int, ...]
    num_layers: int

    def __post_init__(self) -> None:
        self.steps = self.tokens = self.rows_computed = 0
        self.exits = [0] * len(self.checkpoints)
        self._exits = [EXITS.labels(checkpoint=layer) for layer in self.checkpoints]
        self._not_finite = [NOT_FINITE.labels(checkpoint=layer) for layer in self.checkpoints]
        self._thresholds = [THRESHOLD.labels(checkpoint=layer) for layer in self.checkpoints]

    def add(self, steps: int, tokens: int, rows_computed: int, exits: Sequence[int], not_finite: Sequence[int]) -> None:
        """What forward steps did: tokens that went through them, MLP rows computed for those, and by checkpoint the
        tokens that exited and those whose risk was NaN or infinite."""
        self.steps += steps
        self.tokens += tokens
        self.rows_computed += rows_computed
        STEPS.inc(steps)
        TOKENS.inc(tokens)
        ROWS_COMPUTED.inc(rows_computed)
        ROWS_SAVED.inc(max(0, tokens * self.num_layers - rows_computed))
        for i, (exited, odd) in enumerate(zip(exits, not_finite, strict=True)):
            self.exits[i] += exited
            self._exits[i].inc(exited)
            self._not_finite[i].inc(odd)

    def thresholds(self, values: Sequence[float]) -> None:
        for gauge, value in zip(self._thresholds, values, strict=True):
            gauge.set(value)

    def summary(self, thresholds: Sequence[float]) -> str:
        """One line for the log."""
        tokens = max(1, self.tokens)
        exited = [sum(self.exits[: i + 1]) / tokens for i in range(len(self.exits))]
        rates = ", ".join(f"{rate:.1%} by layer {layer}" for rate, layer in zip(exited, self.checkpoints, strict=True))
        saved = 1 - self.rows_computed / (tokens * self.num_layers)
        return (
            f"SEDAC: {self.steps} steps, {self.tokens} tokens; exited {rates}; MLP rows saved {saved:.1%}; "
            f"thresholds {', '.join(f'{value:.4g}' for value in thresholds)}"
        )
