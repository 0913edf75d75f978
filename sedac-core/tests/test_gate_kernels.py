"""Gates' decisions on a GPU against their torch twins, in the norm before the MLP and in a launch of their own."""

import dataclasses

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES_HERE,
    FUSED,
    TILED,
    TOLERANCE,
    WHOLE,
    a_gate,
    error,
    gated,
    narrowed,
    normed,
    padding,
    price,
    random,
    some_rows,
)

from sedac_core import gate_kernels, kernels, step_counters

pytestmark = pytest.mark.usefixtures("interpreter")

DECIDING = pytest.mark.parametrize("kernel", [FUSED, WHOLE, TILED], ids=["split", "unsplit", "tiled"])


@DECIDING
@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize("log_lambda", [-20.0, -0.5, 0.5, 20.0])
@pytest.mark.parametrize(("tokens", "padded"), [(1, 0), (4, 1), (33, 7), (8, 8)])
def test_gates_decide_count_and_narrow_as_the_twin_does(tokens, padded, log_lambda, dtype, kernel):
    x, weights, gate = random(tokens, 64, dtype=dtype), narrowed(dtype), a_gate(dtype=dtype, group=2)
    slots, log_lambda = padding(tokens, padded), price(log_lambda)
    found, wanted = (step_counters.new_counters(4, x.device) for _ in range(2))
    out, level = gated(x, weights, gate, log_lambda, slots, found, kernel)
    twin = gate_kernels.levels_twin(normed(x), gate, log_lambda, slots, wanted)
    assert torch.equal(level, twin.int()) and (twin[tokens - padded :] == 4).all()
    assert error(out, kernels.mlp_twin(normed(x), weights, twin)) < TOLERANCE[dtype]
    assert torch.equal(found, wanted)
    steps, seen, *rest = found.tolist()
    rows = rest[step_counters.BY_LEVEL - 2 :]
    assert (steps, seen, sum(rows)) == (int(padded < tokens), tokens - padded, 2 * (tokens - padded))
    assert rest[: len(step_counters.PATHS)] == [steps, 0, 0, 0], "predicated"
    following = kernels.narrowed_mlp(normed(x), weights, level, kernel)
    assert torch.equal(following, out)


@DECIDING
def test_each_token_decides_at_the_price_that_its_request_chose(kernel):
    x, weights, gate = random(33, 64), narrowed(), a_gate()
    prices = torch.tensor([0.5, -torch.inf, -1.5, 20.0], device=DEVICE)
    chosen = some_rows(48).int() % 4  # the buffer is longer than the step
    slots, (found, wanted) = padding(33, 5), (step_counters.new_counters(4, DEVICE) for _ in range(2))
    out, level = gated(x, weights, gate, prices, slots, found, kernel, chosen)
    twin = gate_kernels.levels_twin(normed(x), gate, prices, slots, wanted, chosen)
    assert torch.equal(level, twin.int()) and torch.equal(found, wanted)
    assert error(out, kernels.mlp_twin(normed(x), weights, twin)) < 1e-5
    own = [gate_kernels.levels_twin(normed(x), gate, each, slots, None) for each in prices]
    assert torch.equal(twin, torch.stack(own)[chosen[:33].long(), torch.arange(33, device=DEVICE)])
    real = slots >= 0
    off = real & (chosen[:33] == 1)
    assert not twin[off].any() and (twin[real & ~off] > 0).any()
    assert found[step_counters.BY_PATH :][:4].tolist() == [1, 0, 0, 0]
    assert found[step_counters.BY_REASON :][:4].tolist() == [0, 0, int(off.sum()), 0]


@DECIDING
def test_under_a_latch_no_token_goes_below_the_level_of_the_gate_before(kernel):
    x, weights, gate = random(33, 64), narrowed(), dataclasses.replace(a_gate(group=2), outside=3)
    least, slots = some_rows(33).int() % 4, padding(33, 5)
    least[slots < 0] = 4  # as an earlier gate left it
    found, wanted = (step_counters.new_counters(4, DEVICE) for _ in range(2))
    out, level = gated(x, weights, gate, price(0.5), slots, found, kernel, least=least)
    twin = gate_kernels.levels_twin(normed(x), gate, price(0.5), slots, wanted, least=least)
    free = gate_kernels.levels_twin(normed(x), gate, price(0.5), slots, None)
    assert torch.equal(level, twin.int()) and torch.equal(found, wanted)
    assert torch.equal(twin, torch.maximum(free, least)) and not torch.equal(twin, free)
    assert error(out, kernels.mlp_twin(normed(x), weights, twin)) < 1e-5
    assert found[step_counters.BY_LEVEL :].sum() == 28 * (2 + 3), "its group's rows, and those outside of all groups"


@DECIDING
def test_gates_that_are_switched_off_say_so_and_nobody_narrows(kernel):
    x, counters = random(5, 64), step_counters.new_counters(4, DEVICE)
    prices, chosen = torch.full((3,), -torch.inf, device=DEVICE), torch.arange(5, device=DEVICE).int() % 3
    _, level = gated(x, narrowed(), a_gate(), prices, None, counters, kernel, chosen)
    assert not level.any() and counters[step_counters.BY_REASON :].tolist() == [0, 5, 0, 0, 5, 0, 0, 0]


@DECIDING
def test_a_second_launch_finds_all_as_the_first_one_did(kernel):
    x, weights, gate, counters = random(5, 64), narrowed(), a_gate(first=False), step_counters.new_counters(4, DEVICE)
    first, _ = gated(x, weights, gate, price(0.0), None, counters, kernel)
    again, _ = gated(x, weights, gate, price(0.0), None, counters, kernel)
    assert torch.equal(first, again) and counters[:2].tolist() == [0, 0] and counters.sum() == 10


@DECIDING
def test_a_token_decides_alike_beside_any_neighbours(kernel):
    x, weights, gate = random(6, 64), narrowed(), a_gate()
    levels = [
        gated(part, weights, gate, price(0.0), None, step_counters.new_counters(4, DEVICE), kernel)[1]
        for part in (x, *x.split(1))
    ]
    assert torch.equal(levels[0], torch.cat(levels[1:])) and len(levels[0].unique()) > 1


@DECIDING
def test_at_a_gates_border_the_kernel_takes_the_twins_side(kernel):
    """A little above the price at which a level starts to pay, and a little below."""
    x, weights, gate = random(8, 64), narrowed(), a_gate()
    inner = torch.nn.functional.silu(normed(x) @ gate.proj.T + gate.proj_bias)
    border = (inner @ gate.head.T + gate.head_bias - gate.gain.log()).min(1).values  # [tokens], log λ
    for token in (0, 3, 6):
        for side, narrow in ((-1e-4, False), (1e-4, True)):
            log_lambda = border[token] + side
            counters = step_counters.new_counters(4, DEVICE)
            _, level = gated(x, weights, gate, log_lambda, None, counters, kernel)
            assert bool(level[token] > 0) is narrow
            assert torch.equal(level, gate_kernels.levels_twin(normed(x), gate, log_lambda, None, None).int())


@DECIDING
def test_an_input_that_is_not_finite_runs_whole(kernel):
    x = random(3, 64)
    x[1, 5] = torch.nan
    counters = step_counters.new_counters(4, DEVICE)
    out, level = gated(x, narrowed(), a_gate(), price(20.0), None, counters, kernel)
    assert level.tolist() == [3, 0, 3] and out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 16, 100, 700, 2049, 4160])
def test_tokens_are_sorted_by_level_and_keep_their_order_within_one(tokens):
    x, gate, slots = random(tokens, 96), a_gate(96), padding(tokens, tokens // 3)
    counters = step_counters.new_counters(4, DEVICE)
    level, rows, ends = gate_kernels.levels_of(x, gate, price(0.0), slots, counters)
    twin = gate_kernels.levels_twin(x, gate, price(0.0), slots, None)
    assert torch.equal(level, twin.int())
    wanted = gate_kernels.sorted_twin(twin, 4)
    for found in ((rows, ends), gate_kernels.sorted_by_level(level, 4)):
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_a_step_that_runs_whole_is_counted_as_such():
    counters = step_counters.new_counters(3, DEVICE)
    for slots, tokens in ((padding(40, 4), 40), (padding(8, 8), 8), (None, 2)):
        gate_kernels.count_whole(slots, tokens, 6, counters, price(0.0))
    paths, reasons = [0, 0, 2, 0], [0, 0, 0, 38]
    assert counters.tolist() == [2, 38, *paths, *reasons, 38 * 6, 0, 0]
    prices, chosen = torch.tensor([0.0, -torch.inf, -3.0], device=DEVICE), torch.arange(8, device=DEVICE).int() % 3
    gate_kernels.count_whole(padding(7, 2), 7, 6, counters, prices, chosen)
    assert counters[step_counters.BY_REASON :].tolist() == [0, 0, 2, 38 + 3, 43 * 6, 0, 0], "two of five opted out"
    gate_kernels.count_whole(None, 2, 6, counters, torch.full((3,), -torch.inf, device=DEVICE), chosen)
    assert counters[step_counters.BY_REASON :].tolist() == [0, 2, 2, 41, 45 * 6, 0, 0], "switched off"
