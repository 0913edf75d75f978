"""The norm before an MLP on a GPU, with a gate and without, against its torch twins."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES_HERE, TOLERANCE, a_gate, error, padding, random, some_rows

from sedac_core import norm_kernels

pytestmark = pytest.mark.usefixtures("interpreter")


def states(tokens: int, hidden: int, dtype=torch.float32):
    """Hidden states, a residual, and a norm whose epsilon counts."""
    norm = norm_kernels.Norm(random(hidden, dtype=dtype, seed=3), 0.1)
    return random(tokens, hidden, dtype=dtype, seed=1), random(tokens, hidden, dtype=dtype, seed=2), norm


@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (7, 96), (33, 1536)])
def test_the_norm_of_a_sum_is_the_twins_and_torchs_own(tokens, hidden, dtype):
    before = states(tokens, hidden, dtype)
    x, summed = norm_kernels.normed(*before)
    for found, wanted in zip((x, summed), norm_kernels.normed_twin(*before), strict=True):
        assert found.dtype == dtype and error(found, wanted) < TOLERANCE[dtype]
    weight, epsilon = before[2]
    own = torch.nn.functional.rms_norm(before[0] + before[1], (hidden,), weight, epsilon)
    assert error(x, own) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize(("tokens", "padded", "hidden"), [(1, 0, 64), (1, 1, 64), (16, 5, 96)])
@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("latched", [False, True])
def test_the_norm_decides_as_the_gate_on_what_it_made(tokens, padded, hidden, dtype, chooses, latched):
    before, gate, slots = states(tokens, hidden, dtype), a_gate(hidden, dtype=dtype), padding(tokens, padded)
    prices = torch.tensor([0.5, -torch.inf, -1.5, 20.0], device=DEVICE)
    chosen, least = (some_rows(tokens).int() % 4 if asked else None for asked in (chooses, latched))
    rest = (gate, prices if chooses else prices[:1], slots, chosen, least)
    x, summed, level = norm_kernels.gated_norm(*before, *rest)
    plain = norm_kernels.normed(*before)
    assert error(x, plain[0]) < TOLERANCE[dtype] / 10 and torch.equal(summed, plain[1])
    wanted = norm_kernels.gated_norm_twin(*before, *rest)
    assert level.dtype == torch.int32 and torch.equal(level, wanted[2])
    assert (level[slots < 0] == 4).all() and (tokens < 16 or len(level.unique()) > 2)


def test_a_step_of_vllms_own_has_no_slots():
    before, gate, price = states(3, 64), a_gate(), torch.tensor(20.0, device=DEVICE)
    assert norm_kernels.gated_norm(*before, gate, price, None)[2].tolist() == [3, 3, 3]
