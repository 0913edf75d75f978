"""The Rust core. Settings out of their domain and arrays that do not fit are a ValueError with what was found."""

from collections.abc import Sequence
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["RiskHistogram", "ThresholdController", "certify", "evaluate", "evaluate_soft", "sweep"]

# float32, float16, or the bits of bfloat16 as uint16; aligned, contiguous or strided, read without a copy
_Risks = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]

def evaluate(
    risks: _Risks,
    thresholds: Sequence[float],
    weights: Sequence[float] | None = None,
    gamma: float = 0.0,
    level: float = 0.5,
    out: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Exit checkpoint (the number of checkpoints if never) and accumulated confidence, `[tokens]`, of risks
    `[checkpoints, tokens]`. Bit for bit what `cascade.decide` gives. `out` are arrays to write them into: over millions
    of tokens new memory costs more than the decisions."""

def evaluate_soft(
    risks: _Risks,
    thresholds: Sequence[float],
    weights: Sequence[float] | None = None,
    gamma: float = 0.0,
    level: float = 0.5,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], int]:
    """The same, with each token's soft width, and how many risks were NaN, negative or infinite."""

def sweep(
    risks: _Risks,
    thresholds: NDArray[np.float32],
    gammas: Sequence[float],
    levels: Sequence[float],
    weights: Sequence[float] | None = None,
    target: NDArray[np.float32] | None = None,
    skipped: Sequence[float] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Every combination of thresholds `[rows, checkpoints]`, γ and level over one set of risks.

    Gives cumulative exit rates `[rows, γ, levels, checkpoints]`, the share of MLP rows saved `[rows, γ, levels]`, and
    the mean of `target [checkpoints, tokens]` among exits `[rows, γ, levels]` (NaN without exits or target). `skipped`
    is the share of all MLP rows that an exit at each checkpoint saves; without it the second result is NaN.
    """

def certify(
    mean_losses: NDArray[np.float64], samples: int, tolerated_loss: float, delta: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Learn then Test: certified settings and p-values, both `[chains, settings]`.

    Each chain is tested in order, the most careful setting first, at delta / chains, until one fails: one chain is
    fixed-sequence testing, chains of one setting are Bonferroni's correction. Losses lie in [0, 1]; `samples` are
    independent ones.
    """

@final
class RiskHistogram:
    """Counts of risks in log-spaced bins: 26 kB whatever it has seen."""

    RELATIVE_ERROR: ClassVar[float]
    def __new__(cls) -> RiskHistogram: ...
    def add(self, risks: NDArray[np.float32]) -> None:
        """Count risks `[tokens]`. NaN and negative ones are part of the population as tokens that never exit."""

    def merge(self, other: RiskHistogram) -> None:
        """Add another's counts, as if its risks had been counted here."""

    def quantile(self, share: float) -> float:
        """The risk that this share lies under, within RELATIVE_ERROR of the exact one between 2⁻²⁴ and 2²⁴."""

    @property
    def total(self) -> int: ...
    @property
    def unusable(self) -> int: ...

@final
class ThresholdController:
    """Thresholds that follow cumulative exit rates. `thresholds` and `publish` take no lock; all methods may be called
    from any thread."""

    def __new__(
        cls, exit_rates: Sequence[float], alpha: float, window: int, initial_thresholds: Sequence[float]
    ) -> ThresholdController: ...
    def observe(self, checkpoint: int, critical_thresholds: NDArray[np.float32]) -> None:
        """Count the critical thresholds of the tokens that reached this checkpoint in this step."""

    def update(self) -> None:
        """Once a forward step: move the thresholds towards the quantiles; the first time they take them over."""

    def thresholds(self) -> list[float]:
        """The thresholds in force, one whole set."""

    def publish(self, thresholds: Sequence[float]) -> None:
        """Put other thresholds in force at once; later updates go on from them."""

    def tokens(self, checkpoint: int) -> int:
        """How many tokens have reached this checkpoint."""

    def unusable(self, checkpoint: int) -> int:
        """How many of their risks were NaN or negative."""
