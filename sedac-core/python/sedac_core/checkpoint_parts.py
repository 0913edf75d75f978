"""What a checkpoint's kernels read and count: a probe, the exit rule, and where each count is."""

import dataclasses
import functools

import torch
from torch import Tensor

from .metrics import RISK_BUCKETS
from .probe import LREProbe
from .step_counters import OWN, TAKEN

# The bins of src/histogram.rs: the upper bits of a float32, from 2^-24 on, 128 an octave; infinity has the last one.
HISTOGRAM_BINS = 48 * 128 + 1
_BIN_SHIFT, _BIN_FIRST = 16, (127 - 24) << 7

# Where a checkpoint's kernel counts, int64, after what is counted of each step (step_counters.py): MLP rows saved; then for each
# checkpoint the tokens that exited, those whose risk was not finite, and a histogram of the finite risks.
ROWS_SAVED, BY_CHECKPOINT = OWN, OWN + 1
PER_CHECKPOINT = 2 + len(RISK_BUCKETS) + 1


@dataclasses.dataclass(frozen=True)
class DeviceProbe:
    """One probe as a checkpoint's kernels read it, float32: as few tensors as can be, for each takes the host time in each launch."""

    proj: Tensor  # [rank, hidden]
    small: Tensor  # [4 · rank + 1]: the first layer's bias, the norm's weight and bias, the head's weight and bias
    eps: float

    @classmethod
    def make(cls, probe: LREProbe) -> "DeviceProbe":
        """A copy where the probe is, but for its greatest tensor, which stays the probe's own."""
        small = (probe.proj.bias, probe.norm.weight, probe.norm.bias, probe.head.weight[0], probe.head.bias)
        return cls(probe.proj.weight.detach(), torch.cat(small).detach(), probe.norm.eps)


@dataclasses.dataclass
class Rule:
    """The exit rule as a checkpoint's kernel reads it: device buffers, all of which may change under a captured graph."""

    table: Tensor  # [1 + choices, checkpoints], float32: the thresholds in force, all 0, and others
    weights: Tensor  # [checkpoints], float32
    gamma_level: Tensor  # [2], float32
    taken: Tensor  # [1], int32: OBSERVING decides exits without taking them, TAKEN, or OFF
    counters: Tensor  # [BY_CHECKPOINT + PER_CHECKPOINT · checkpoints], int64
    risk_sums: Tensor  # [checkpoints], float64: of the finite risks
    histogram: Tensor | None  # [checkpoints, HISTOGRAM_BINS], int32, of critical thresholds; None if nobody reads it

    @classmethod
    def make(cls, table: Tensor, weights, gamma: float, level: float, adaptive: bool) -> "Rule":
        """Fresh counters beside a table that stays the caller's own buffer."""
        device, checkpoints = table.device, table.shape[1]
        bins = torch.zeros(checkpoints, HISTOGRAM_BINS, dtype=torch.int32, device=device) if adaptive else None
        return cls(
            table,
            torch.tensor(weights, dtype=torch.float32, device=device),
            torch.tensor([gamma, level], dtype=torch.float32, device=device),
            torch.full((1,), TAKEN, dtype=torch.int32, device=device),
            torch.zeros(BY_CHECKPOINT + PER_CHECKPOINT * checkpoints, dtype=torch.int64, device=device),
            torch.zeros(checkpoints, dtype=torch.float64, device=device),
            bins,
        )

    def counting_apart(self) -> "Rule":
        """The same rule, whatever becomes of it, with counters of its own."""
        own = {
            name: torch.zeros_like(counted)
            for name in ("counters", "risk_sums", "histogram")
            if (counted := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **own)


def histogram_bins(critical: Tensor) -> Tensor:
    """The bin `[n]`, int64, of each critical threshold `[n]`; what no threshold lets exit has the last one."""
    column = (critical.view(torch.int32) >> _BIN_SHIFT) - _BIN_FIRST
    column = column.clamp(0, HISTOGRAM_BINS - 2).long()
    return torch.where((critical >= 0) & (critical < float("inf")), column, HISTOGRAM_BINS - 1)


@functools.cache
def bin_centres() -> Tensor:
    """A value inside each bin, `[HISTOGRAM_BINS]`, float32: what the host's controller counts in its place."""
    bits = (torch.arange(HISTOGRAM_BINS - 1, dtype=torch.int32) + _BIN_FIRST) << _BIN_SHIFT
    centres = (bits + (1 << (_BIN_SHIFT - 1))).view(torch.float32)
    return torch.cat([centres, torch.tensor([float("inf")])])
