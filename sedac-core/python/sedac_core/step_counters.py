"""What GPU kernels of either policy count on the device, which tokens of a step count, and the torch twins."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# What is counted on a device, int64, at the first gate or checkpoint of a forward step: steps, tokens, steps by path, and
# tokens that saved nothing by reason, each token under the first that holds for it. Then what each policy counts itself.
PATHS = ("predicated", "conditional", "dense", "gather")
FALLBACKS = ("observing", "switched off", "request", "dense")  # dense: as the step took this path
STEPS, TOKENS, BY_PATH, BY_REASON, OWN = 0, 1, 2, 2 + len(PATHS), 2 + len(PATHS) + len(FALLBACKS)
BY_LEVEL = OWN  # gates: MLP rows (token × layer) by level

# Whether decisions are taken: only watched, taken, or switched off.
OBSERVING, TAKEN, OFF = 0, 1, 2


def new_counters(levels: int, device: torch.device) -> Tensor:
    return torch.zeros(BY_LEVEL + levels, dtype=torch.int64, device=device)


@triton.jit
def real_rows(slots, i, tokens, HAS_SLOTS: tl.constexpr):
    """Which of rows `i` are tokens of a request: padding has no slot in the KV cache."""
    real = i < tokens
    if HAS_SLOTS:
        real = real & (tl.load(slots + i, mask=real, other=-1) >= 0)
    return real


@triton.jit
def chosen_rows(chosen, i, tokens, BLOCK: tl.constexpr, HAS_CHOICES: tl.constexpr):
    """Each token's row of the policy's table: 0 is what is in force, 1 is off."""
    row = tl.zeros((BLOCK,), tl.int32)
    if HAS_CHOICES:
        row = tl.load(chosen + i, mask=i < tokens, other=0)
    return row


@triton.jit
def count(counters, at, number):
    tl.atomic_add(counters + at, number, sem="relaxed")  # nobody waits for it, unlike for a sum


@triton.jit
def phase(price):
    """Gates are switched off by a price that nothing is worth."""
    return tl.where(tl.load(price) == -float("inf"), 2, 1)  # OFF, TAKEN


@triton.jit
def count_step(counters, some, tokens, off, phase, path):
    """Count a step, if it has some tokens of requests, and so many tokens, of which `off` opted out, on this path."""
    some = some.to(tl.int64)
    taken = phase == 1  # TAKEN
    count(counters, 0, some)  # STEPS
    count(counters, 1, tokens.to(tl.int64))  # TOKENS
    count(counters, 2 + path, some)  # BY_PATH
    count(counters, 6, tl.where(phase == 0, tokens, 0).to(tl.int64))  # BY_REASON
    count(counters, 7, tl.where(phase == 2, tokens, 0).to(tl.int64))
    count(counters, 8, tl.where(taken, off, 0).to(tl.int64))
    count(counters, 9, tl.where(taken & (path == 2), tokens - off, 0).to(tl.int64))  # dense


def step_twin(counters: Tensor, tokens: Tensor, off: Tensor, phase: int, path: str) -> None:
    """Count a step as `count_step` does, in torch."""
    counters[STEPS] += tokens > 0
    counters[TOKENS] += tokens
    counters[BY_PATH + PATHS.index(path)] += tokens > 0
    if phase != TAKEN:
        counters[BY_REASON + (phase == OFF)] += tokens
        return
    counters[BY_REASON + 2] += off
    if path == "dense":
        counters[BY_REASON + 3] += tokens - off
