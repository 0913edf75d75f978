"""SEDAC's counters: summed in the worker, logged, and handed to prometheus-client.

Worker and API server are different processes: the server's /metrics shows these once PROMETHEUS_MULTIPROC_DIR names a
folder before vLLM starts (sedac_start_server.py sees to that). Where that folder's disk is full, counting goes on in memory
(`survive_a_full_folder`).
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import Counter, Gauge, Histogram, values
from prometheus_client.mmap_dict import MmapedDict

from .gates import GateShape

logger = logging.getLogger("vllm.sedac")

STEPS = Counter("sedac_forward_steps", "Forward steps of the patched model that carried tokens")
TOKENS = Counter("sedac_tokens", "Tokens that went through the patched model")
EXITS = Counter("sedac_exits", "Tokens that exited, by checkpoint", ["checkpoint"])
ROWS_COMPUTED = Counter("sedac_mlp_rows_computed", "MLP rows (token x layer) computed")
ROWS_SAVED = Counter("sedac_mlp_rows_saved", "MLP rows (token x layer) not computed")
DECISIONS = Counter(
    "sedac_decisions",
    "Tokens that reached a checkpoint, by what it decided: exit, run, or not_finite (run, as the risk was NaN or infinite)",
    ["checkpoint", "decision"],
)
RISK_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BUCKETS = len(RISK_BUCKETS) + 1  # with the one to infinity
RISK = Histogram("sedac_risk", "Finite risks of the tokens at a checkpoint", ["checkpoint"], buckets=RISK_BUCKETS)
PATHS = Counter(
    "sedac_steps_by_path",
    "Forward steps by the way through their MLPs: predicated, conditional, dense, gather",
    ["path"],
)
FALLBACKS = Counter("sedac_fallback_tokens", "Tokens that saved nothing, by reason", ["reason"])
CALIBRATION = Gauge(
    "sedac_calibration", "1 for where the thresholds in force come from", ["state"], multiprocess_mode="mostrecent"
)
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


class Told:
    """What both policies' counters tell besides tokens."""

    steps: int
    _state: str | None = None
    _certified: Sequence[Mapping[str, Any]] = ()

    def summary(self, in_force: Any) -> str:
        """One line for the log, given the thresholds or the price in force."""
        raise NotImplementedError

    def path(self, name: str, steps: int = 1) -> None:
        """Forward steps that took this way through their MLPs: predicated, conditional, dense or gather."""
        if steps:
            PATHS.labels(path=name).inc(steps)

    def fallback(self, reason: str, tokens: int) -> None:
        """Tokens that saved nothing: 'request', 'switched off', 'observing', or 'dense', as the step's size ran all rows whole."""
        if tokens:
            FALLBACKS.labels(reason=reason).inc(tokens)

    def state(self, name: str) -> None:
        """Where the thresholds in force come from."""
        if name != self._state:
            if self._state is not None:
                CALIBRATION.labels(state=self._state).set(0)
            CALIBRATION.labels(state=name).set(1)
            self._state = name

    def log(self, every: int, steps_before: int, in_force: Any) -> None:
        """The summary, once every so many steps (0: never): where the counters moved past one of them since `steps_before`."""
        if every and self.steps // every > steps_before // every:
            logger.info(self.summary(in_force))

    def certify(self, bounds: Sequence[Mapping[str, Any]]) -> None:
        """The bounds that are certified for what is in force; those that hold no more are told as NaN."""
        for bound in self._certified:
            CERTIFIED_BOUND.labels(loss=bound["loss"], confidence=bound["confidence"]).set(float("nan"))
        self._certified = bounds
        for bound in bounds:
            CERTIFIED_BOUND.labels(loss=bound["loss"], confidence=bound["confidence"]).set(bound["bound"])


@dataclasses.dataclass
class Counters(Told):
    """Totals since the start, and their way to Prometheus."""

    checkpoints: tuple[int, ...]
    num_layers: int
    mlp_bytes: int = 0  # of one MLP's weights

    def __post_init__(self) -> None:
        self.steps = self.tokens = self.rows_computed = 0
        self.exits = [0] * len(self.checkpoints)
        self._exits = [EXITS.labels(checkpoint=layer) for layer in self.checkpoints]
        self._decisions = [
            [DECISIONS.labels(checkpoint=layer, decision=name) for name in ("exit", "run", "not_finite")]
            for layer in self.checkpoints
        ]
        self._bytes = [MLP_BYTES.labels(part=part) for part in ("stock", "read")]
        self._risks = [RISK.labels(checkpoint=layer) for layer in self.checkpoints]
        self._first_buckets = BUCKETS * np.arange(len(self.checkpoints))[:, None]
        self._thresholds = [THRESHOLD.labels(checkpoint=layer) for layer in self.checkpoints]

    def add(self, steps: int, tokens: int, rows_computed: int, exits: Sequence[int], not_finite: Sequence[int]) -> None:
        """What forward steps did: tokens that went through them, MLP rows computed for those, and by checkpoint the
        tokens that exited and those that reached it with a risk that was NaN or infinite."""
        self.steps += steps
        self.tokens += tokens
        self.rows_computed += rows_computed
        STEPS.inc(steps)
        TOKENS.inc(tokens)
        saved = max(0, tokens * self.num_layers - rows_computed)
        ROWS_COMPUTED.inc(rows_computed)
        ROWS_SAVED.inc(saved)
        self._bytes[0].inc((rows_computed + saved) * self.mlp_bytes)
        self._bytes[1].inc(rows_computed * self.mlp_bytes)
        reached = tokens
        for i, (exited, odd) in enumerate(zip(exits, not_finite, strict=True)):
            self.exits[i] += exited
            if exited:
                self._exits[i].inc(exited)
            for counter, count in zip(self._decisions[i], (exited, reached - exited - odd, odd), strict=True):
                if count > 0:
                    counter.inc(count)
            reached -= exited

    def risks(self, risk: np.ndarray, reached: np.ndarray) -> list[int]:
        """Risks `[checkpoints, tokens]` of the tokens that reached each checkpoint, as a mask of the same shape says.
        Those that are not finite are left out; returns how many they were, by checkpoint."""
        finite = np.isfinite(risk) & reached
        bucket = np.searchsorted(RISK_BUCKETS, risk) + self._first_buckets
        counts = np.bincount(bucket[finite], minlength=len(risk) * BUCKETS)
        sums = np.where(finite, risk, 0).sum(1, dtype=np.float64)
        for index, (row, total) in enumerate(zip(counts.reshape(-1, BUCKETS).tolist(), sums.tolist(), strict=True)):
            self.risk_counts(index, row, total)
        return (reached.sum(1) - finite.sum(1)).tolist()

    def risk_counts(self, index: int, buckets: Sequence[int], total: float) -> None:
        """The same of one checkpoint, counted elsewhere: by bucket, and their sum."""
        histogram = self._risks[index]
        for bucket, count in zip(histogram._buckets, buckets, strict=True):
            if count:
                bucket.inc(count)
        histogram._sum.inc(total)

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


class OwnTotals(Counters):
    """Of a worker whose tokens another one counts (tensor parallelism): totals for itself, nothing for Prometheus."""

    def add(self, steps: int, tokens: int, rows_computed: int, exits: Sequence[int], not_finite: Sequence[int]) -> None:
        self.steps += steps
        self.tokens += tokens
        self.rows_computed += rows_computed
        self.exits = [before + exited for before, exited in zip(self.exits, exits, strict=True)]

    def path(self, name: str, steps: int = 1) -> None: ...

    def fallback(self, reason: str, tokens: int) -> None: ...

    def state(self, name: str) -> None: ...

    def certify(self, bounds: Sequence[Mapping[str, Any]]) -> None: ...

    def risks(self, risk: np.ndarray, reached: np.ndarray) -> list[int]:
        return (reached.sum(1) - (np.isfinite(risk) & reached).sum(1)).tolist()

    def risk_counts(self, index: int, buckets: Sequence[int], total: float) -> None: ...

    def thresholds(self, values: Sequence[float]) -> None: ...


@dataclasses.dataclass
class GateCounters(Told):
    """The same under gates: each token counts in each layer, at the level it ran at there.

    A narrowed row is not computed by the share of its MLP's bytes that its level does not read, adapters counted
    against. Bytes count the gates as well, so that saved bytes are below 0 where nothing narrows.
    """

    shape: GateShape
    mlp_bytes: int  # of one MLP's weights

    def __post_init__(self) -> None:
        self.steps = self.tokens = 0
        self.levels = [0] * len(self.shape.levels)
        self._source: str | None = None

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
        """The price in force, where it comes from, and what is certified for it."""
        if self._source not in (None, source):
            LOG_LAMBDA.labels(source=self._source).set(float("nan"))
        self._source = source
        LOG_LAMBDA.labels(source=source).set(log_lambda)
        self.state(source)
        self.certify(bounds)

    def summary(self, log_lambda: float) -> str:
        """One line for the log."""
        rows = max(1, sum(self.levels))
        shares = ", ".join(
            f"{count / rows:.1%} at {name}" for name, count in zip(self.shape.names, self.levels, strict=True)
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


RESERVED = 1 << 20  # bytes of a metrics file that are there before anything is counted in it


class ReservedDict(MmapedDict):
    """prometheus-client's file of values, whose blocks are on the disk before they are mapped: a mapped page that a full disk
    has no room for would end the process when it is written. Where there is no room, or no file may be made, the values
    live in memory, and /metrics does not show them.
    """

    warned = False

    def __init__(self, filename: str, read_mode: bool = False):
        if not read_mode:
            try:
                with open(filename, "a+b") as file:
                    os.posix_fallocate(file.fileno(), 0, RESERVED)
            except OSError as error:
                self.warn(filename, error)
                with contextlib.suppress(OSError):
                    os.unlink(filename)  # an empty one would break every scrape
                filename = f"/proc/self/fd/{os.memfd_create('sedac-metrics')}"
        super().__init__(filename, read_mode)

    @classmethod
    def warn(cls, filename: str, error: OSError) -> None:
        if not cls.warned:
            logger.warning(
                "SEDAC: metrics cannot be kept in %s (%s), so this process's are missing on /metrics: serving goes on without "
                "them; set PROMETHEUS_MULTIPROC_DIR to a folder with room",
                os.path.dirname(filename),
                error.strerror,
            )
        cls.warned = True


def survive_a_full_folder() -> None:
    """Have prometheus-client keep this process's values so that a folder that fills up does not end it."""
    values.MmapedDict = ReservedDict
    for path in Path(os.environ.get("PROMETHEUS_MULTIPROC_DIR", "/nowhere")).glob(f"*_{os.getpid()}.db"):
        with contextlib.suppress(OSError), open(path, "r+b") as file:  # what vLLM opened on import
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
