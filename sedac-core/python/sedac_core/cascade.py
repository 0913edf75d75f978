"""The decision rule in readable torch: the twin of src/accumulator.rs, equal to it bit for bit in float32.

At checkpoint i a token's risk r meets the threshold t. With q = r / t, its confidence is 1 / (1 + q) and its *margin*
is the confidence less the exit level. Margins accumulate, and a token exits at the first checkpoint where they are
positive:

    m_i = ((1 - level) - level · q) / (1 + q)        a risk that is NaN, negative or infinite counts as no confidence
    M_i = γ · M_{i-1} + w_i · m_i                    S_i = γ · S_{i-1} + w_i,   C_i = M_i + level · S_i
    exit at the first i with M_i > 0                 the same as C_i > level · S_i

With γ = 0 and level 0.5 that is V6.0's `risk < threshold`, exactly, in floating point too: the quotient of two floats
is under 1 just where the first is under the second, and 0.5 - 0.5 · q is exact there. A threshold of infinity lets
every finite risk exit, a threshold of 0 none.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the cascade decides for each token."""

    exit_checkpoint: Tensor  # [tokens], int64: index of the checkpoint where it exits, `checkpoints` if it never does
    confidence: Tensor  # [tokens], float32: C at its exit, at the last checkpoint if it never exits
    width: Tensor  # [tokens], float32: share of an MLP that soft exit keeps, 1 if it never exits
    checkpoints: int

    def exit_rates(self) -> Tensor:
        """Share of all tokens that have exited by each checkpoint, `[checkpoints]`, float64; 0 without tokens."""
        exits = torch.bincount(self.exit_checkpoint, minlength=self.checkpoints + 1)[: self.checkpoints]
        return exits.cumsum(0).double() / max(1, self.exit_checkpoint.numel())


def margin_step(
    risk: Tensor,
    threshold: Tensor | float,
    margin: Tensor | float,
    gamma: Tensor | float,
    weight: Tensor | float,
    level: Tensor | float,
) -> Tensor:
    """One checkpoint: the accumulated margin `[tokens]` after it, from the margin before it (0 before the first).

    Element by element and without a branch on data, so eager, compiled and captured code can all run it, on arrays
    too. Give the settings as float32 to be equal to Rust bit for bit; a Python float is rounded a little later.
    """
    q = risk / threshold
    usable = (risk >= 0) & (q < float("inf"))
    where = torch.where if isinstance(risk, Tensor) else np.where
    gain = where(usable, ((1 - level) - level * q) / (1 + q), -level)
    return gamma * margin + weight * gain


def critical_threshold(
    risk: Tensor,
    margin: Tensor | float,
    gamma: Tensor | float,
    weight: Tensor | float,
    level: Tensor | float,
) -> Tensor:
    """The threshold over which a running token would exit, `[tokens]`; infinite where none would let it.

    `margin` is its accumulated margin before this checkpoint, at most 0 while it runs. Solving
    γ · M + w · m(t) > 0 for t gives t > r · (level + a) / (1 - level - a) with a = -γ · M / w, what it has to catch up.
    """
    behind = -gamma * margin / weight
    room = 1 - level - behind
    reachable = (risk >= 0) & (risk < float("inf")) & (room > 0)
    return torch.where(reachable, risk * (level + behind) / room, float("inf"))


def decide(
    risks: Array,
    thresholds: Sequence[float] | Array,
    gamma: float = 0.0,
    weights: Sequence[float] | Array | None = None,
    level: float = 0.5,
) -> Decision:
    """Run the cascade over risks `[checkpoints, tokens]`, float32; thresholds and weights `[checkpoints]`.

    ValueError if the shapes do not fit.
    """
    risks = torch.as_tensor(risks).float()
    if risks.ndim != 2:
        raise ValueError(f"risks must be [checkpoints, tokens], found shape {tuple(risks.shape)}")
    checkpoints, tokens = risks.shape
    scalars = {"dtype": torch.float32, "device": risks.device}
    thresholds = torch.as_tensor(thresholds, **scalars)
    weights = torch.ones(checkpoints, **scalars) if weights is None else torch.as_tensor(weights, **scalars)
    for name, values in (("thresholds", thresholds), ("weights", weights)):
        if values.shape != (checkpoints,):
            raise ValueError(f"{name} must be [{checkpoints}], one for each checkpoint, found {tuple(values.shape)}")
    gamma, level = torch.tensor(gamma, **scalars), torch.tensor(level, **scalars)

    margin = torch.zeros(tokens, **scalars)
    greatest = torch.zeros((), **scalars)  # S, the most that C can be
    confidence = torch.zeros(tokens, **scalars)
    width = torch.ones(tokens, **scalars)
    exit_checkpoint = torch.full((tokens,), checkpoints, device=risks.device)
    for i in range(checkpoints):
        margin = margin_step(risks[i], thresholds[i], margin, gamma, weights[i], level)
        greatest = gamma * greatest + weights[i]
        running = exit_checkpoint == checkpoints
        exits = running & (margin > 0)
        confidence = torch.where(running, margin + level * greatest, confidence)
        width = torch.where(exits, soft_width(margin, greatest, level), width)
        exit_checkpoint = torch.where(exits, i, exit_checkpoint)
    return Decision(exit_checkpoint, confidence, width, checkpoints)


def soft_width(margin: Tensor, greatest: Tensor | float, level: Tensor | float) -> Tensor:
    """Share of an MLP that an exiting token keeps, `[tokens]`: 1 just at the exit level, 0 at full confidence."""
    return (1 - margin / ((1 - level) * greatest)).clamp(0, 1)
