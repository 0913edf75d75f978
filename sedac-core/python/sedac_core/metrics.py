"""SEDAC's counters: summed in the worker, logged, and handed to prometheus-client.

Worker and API server are different processes: the server's /metrics shows these once PROMETHEUS_MULTIPROC_DIR names a
folder before vLLM starts (sedac_start_server.py sees to that).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from prometheus_client import Counter, Gauge

from .gates import GateShape

STEPS = Counter("sedac_forward_steps", "Forward steps of the patched model that carried tokens")
TOKENS = Counter("sedac_tokens", "Tokens that went through the patched model")
EXITS = Counter("sedac_exits", "Tokens that exited, by checkpoint", ["checkpoint"])
ROWS_COMPUTED = Counter("sedac_mlp_rows_computed", "MLP rows (token x layer) computed")
ROWS_SAVED = Counter("sedac_mlp_rows_saved", "MLP rows (token x layer) not computed")
NOT_FINITE = Counter("sedac_not_finite", "Tokens whose risk was NaN or infinite, by checkpoint", ["checkpoint"])
THRESHOLD = Gauge(
    "sedac_threshold", "Threshold in force, by checkpoint", ["checkpoint"], multiprocess_mode="mostrecent"
)

LEVEL_ROWS = Counter("sedac_mlp_level_rows", "MLP rows (token x layer) by level; level 0 is the whole MLP", ["level"])
MLP_BYTES = Counter(
    "sedac_mlp_bytes",
    "Bytes of MLP weights that each token needed (read: adapters and gates counted in) and would need in stock (stock)",
    ["part"],
)
LOG_LAMBDA = Gauge(
    "sedac_log_lambda", "Logarithm of the price in force, and its source", ["source"], multiprocess_mode="mostrecent"
)
CERTIFIED_BOUND = Gauge(
    "sedac_certified_bound", "Certified bound on a loss", ["loss", "confidence"], multiprocess_mode="mostrecent"
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


@dataclasses.dataclass
class GateCounters:
    """The same under gates: each token counts in each layer, at the level it ran at there.

    A narrowed row is not computed by the share of its MLP's bytes that its level does not read, adapters counted
    against. Bytes count the gates as well, so that saved bytes are below 0 where nothing narrows.
    """

    shape: GateShape
    mlp_bytes: int  # of one MLP's weights

    def __post_init__(self) -> None:
        self.steps = self.tokens = 0
        self.levels = [0] * len(self.shape.levels)

    def add(self, tokens: int, levels: Sequence[int], steps: int = 1) -> None:
        """What forward steps did: their tokens, and by level the MLP rows (token × layer) that ran at it."""
        self.steps += steps
        self.tokens += tokens
        STEPS.inc(steps)
        TOKENS.inc(tokens)
        for level, rows in enumerate(levels):
            self.levels[level] += rows
            LEVEL_ROWS.labels(level=level).inc(rows)
        rows = sum(levels)
        saved = sum(share * count for share, count in zip(self.shape.saved, levels, strict=True))
        ROWS_SAVED.inc(saved)
        ROWS_COMPUTED.inc(rows - saved)
        MLP_BYTES.labels(part="stock").inc(rows * self.mlp_bytes)
        MLP_BYTES.labels(part="read").inc(rows * self.mlp_bytes * (1 - saved_share(self.shape, levels)))

    def price(self, log_lambda: float, source: str, bounds: Sequence[Mapping[str, Any]]) -> None:
        LOG_LAMBDA.labels(source=source).set(log_lambda)
        for bound in bounds:
            CERTIFIED_BOUND.labels(loss=bound["loss"], confidence=bound["confidence"]).set(bound["bound"])

    def summary(self, log_lambda: float) -> str:
        """One line for the log."""
        rows = max(1, sum(self.levels))
        shares = ", ".join(
            f"{count / rows:.1%} at width {width}" for width, count in zip(self.shape.widths, self.levels, strict=True)
        )
        saved = saved_share(self.shape, self.levels)
        return (
            f"SEDAC: {self.steps} steps, {self.tokens} tokens; MLP rows {shares}; "
            f"MLP bytes saved {saved:.1%}; log λ {log_lambda:.4g}"
        )


def saved_share(shape: GateShape, levels: Sequence[int]) -> float:
    """Share of all MLP weight bytes not read, adapters and gates counted against, given the rows at each level."""
    shares = torch.tensor(levels, dtype=torch.float64) / max(1, sum(levels))
    return shape.saved_share(shares[None]).item()
