"""Thresholds from a target, offline and exact: exit rates to be met, or a loss to be bounded with confidence.

The twin of src/threshold.rs (there on streaming quantiles, here on sorted risks) and of src/certify.rs.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import special, stats

from .cascade import Array, critical_threshold, margin_step


def thresholds_for_rates(
    risks: Array,
    exit_rates: Sequence[float],
    gamma: float = 0.0,
    weights: Sequence[float] | None = None,
    level: float = 0.5,
) -> list[float]:
    """Thresholds by checkpoint under which these shares of tokens exit, cumulative, on risks `[checkpoints, tokens]`.

    Each checkpoint's threshold lies half-way between the critical thresholds of the last token that is to exit and of
    the first that is not, among the tokens that reach it, so the rates are met to one token where critical thresholds
    differ. A rate that does not rise gives 0, a rate of 1 infinity. ValueError for shapes that do not fit, rates that
    fall, or no tokens.
    """
    risks = torch.as_tensor(risks).float()
    if risks.ndim != 2 or not risks.shape[1]:
        raise ValueError(f"risks must be [checkpoints, tokens] with at least one token, found {tuple(risks.shape)}")
    checkpoints, tokens = risks.shape
    rates = list(exit_rates)
    if len(rates) != checkpoints or any(not 0 <= rate <= 1 for rate in rates) or rates != sorted(rates):
        raise ValueError(f"exit_rates must be {checkpoints} shares from 0 to 1 that do not fall, found {rates}")
    weights = torch.ones(checkpoints) if weights is None else torch.tensor(weights, dtype=torch.float32)
    if weights.shape != (checkpoints,):
        raise ValueError(f"weights must be [{checkpoints}], one for each checkpoint, found {tuple(weights.shape)}")
    gamma, level = torch.tensor(gamma), torch.tensor(level)

    margin = torch.zeros(tokens)
    running = torch.ones(tokens, dtype=torch.bool)
    thresholds = []
    for risk, rate, weight in zip(risks, rates, weights, strict=True):
        critical = critical_threshold(risk, margin, gamma, weight, level)[running]
        to_exit = round(rate * tokens) - (tokens - len(critical))
        threshold = math.inf if rate == 1 else _split(critical.sort().values, to_exit)
        thresholds.append(threshold)
        margin = margin_step(risk, torch.tensor(threshold), margin, gamma, weight, level)
        running &= ~(margin > 0)
    return thresholds


def _split(ordered: torch.Tensor, count: int) -> float:
    """A float32 over the first `count` of these sorted numbers and not over the others, or as near as ties allow."""
    if 0 < count < len(ordered) and ordered[count - 1] == ordered[count]:  # take all of the tied ones or none
        first = int(torch.searchsorted(ordered, ordered[count]))
        last = int(torch.searchsorted(ordered, ordered[count], right=True))
        count = first if count - first <= last - count else last
    if count <= 0:
        return 0.0
    if count >= int((ordered < math.inf).sum()):  # all that any threshold lets exit
        return math.inf
    below, above = float(ordered[count - 1]), float(ordered[count])
    middle = float(np.float32((below + above) / 2))
    return middle if middle > below else above


def rate_interval(exited: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval for a rate of which `exited` out of `total` were seen; (0, 1) when none was."""
    if not 0 <= exited <= total or not 0 < confidence < 1:
        raise ValueError(f"cannot give a {confidence} interval for {exited} of {total}")
    if not total:
        return 0.0, 1.0
    interval = stats.binomtest(int(exited), int(total)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def p_values(mean_losses: np.ndarray, samples: int, tolerated_loss: float) -> np.ndarray:
    """Hoeffding–Bentkus p-values of "the mean loss is over `tolerated_loss`", for losses in [0, 1]; any shape.

    Angelopoulos et al., Learn then Test (arXiv 2110.01052), section 3: the smaller of
    exp(-n · h₁(R̂ ∧ α, α)) and e · P(Bin(n, α) ≤ ⌈n R̂⌉).
    """
    below = np.minimum(mean_losses, tolerated_loss)
    divergence = special.rel_entr(below, tolerated_loss) + special.rel_entr(1 - below, 1 - tolerated_loss)
    bentkus = np.e * stats.binom.cdf(np.ceil(samples * mean_losses), samples, tolerated_loss)
    return np.minimum(np.minimum(np.exp(-samples * divergence), bentkus), 1)


def certify(
    mean_losses: np.ndarray, samples: int, tolerated_loss: float, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which settings keep their mean loss under `tolerated_loss`, all of them with probability 1 - delta.

    The twin of `_rust.certify`: `mean_losses [chains, settings]` over `samples` independent held-out losses in [0, 1]
    (documents rather than tokens, whose losses depend on each other), each chain tested in order, the most careful
    setting first, at delta / chains, until one fails. One chain is fixed-sequence testing; chains of one setting are
    Bonferroni's correction. Returns the certified settings and the p-values.
    """
    p = p_values(mean_losses, samples, tolerated_loss)
    return np.logical_and.accumulate(p <= delta / max(1, len(p)), axis=1), p


def certificate_held(
    losses: np.ndarray, tolerated_loss: float, delta: float, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """How often a certificate keeps its word on documents it did not see, and how often there is one.

    `losses [settings, documents]` in [0, 1], the most careful setting first. In each resampling a random half of the
    documents certifies settings in their order (`certify`), and the last certified one is tested on the other half: its
    mean loss there is at most `tolerated_loss`, or not. Returns the share of resamplings in which that held, those
    without a certificate counted as held, and the share of resamplings with one. ValueError for fewer than 4 documents.
    """
    documents = losses.shape[1]
    if documents < 4:
        raise ValueError(f"a certificate cannot be checked on {documents} documents")
    draw, half = np.random.default_rng(seed), documents // 2
    held = found = 0
    for _ in range(resamples):
        order = draw.permutation(documents)
        certified, _ = certify(losses[:, order[:half]].mean(1)[None], half, tolerated_loss, delta)
        last = int(certified[0].sum()) - 1
        found += last >= 0
        held += last < 0 or losses[last, order[half:]].mean() <= tolerated_loss
    return held / resamples, found / resamples
