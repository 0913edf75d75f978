"""MLPs on planes of their weights against their torch twins."""

import dataclasses
import itertools
import json

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES_HERE,
    TOLERANCE,
    a_gate,
    counts,
    error,
    gated,
    normed,
    padding,
    price,
    random,
    some_rows,
)

from sedac_core import fused_kernel, gate_kernels, kernels, rounded_kernel, step_counters
from sedac_core.precision import RoundedMLP
from sedac_core.tune_problems import PROCESSORS

tl, triton = kernels.tl, kernels.triton
pytestmark = pytest.mark.usefixtures("interpreter")

rounded_activate_alone, rounded_down_alone = rounded_kernel.rounded_activate_alone, rounded_kernel.rounded_down_alone
rounded_activate, rounded_values = rounded_kernel.rounded_activate, rounded_kernel.rounded_values


def _rounded_half_of_one(
    x, high, low, scale, act, programs, fine, needed, hidden_size, neurons, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    rounded_activate_alone(
        rounded_values(x, hidden_size, CHUNKS), (high, low, scale), act, tl.program_id(0), programs, fine, needed, hidden_size, neurons, CHUNKS, BLOCK_N, 3
    )  # fmt: skip


def _rounded_rest_of_one(
    act, high, low, scale, partial, out, arrived, programs, fine, needed, hidden_size, neurons,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rounded_down_alone(
        act, (high, low, scale), partial, out, arrived, tl.program_id(0), programs, fine, needed, hidden_size, neurons,
        PARTS, CHUNKS, BLOCK_N, 3,
    )  # fmt: skip


def _rounded_half(
    x, high, low, scale, act, tokens, programs, fine, needed, hidden_size, neurons, BLOCK_N: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, 16)
    rounded_activate(
        x, (high, low, scale), act, i.to(tl.int64), i < tokens, i != 1, tl.program_id(0), programs, fine, needed,
        hidden_size, neurons, 16, BLOCK_N, 2,
    )  # fmt: skip


@pytest.fixture
def as_with_planes(monkeypatch):
    """As many columns without planes as with them: the interpreter adds up another number in another order."""
    columns = fused_kernel.columns
    monkeypatch.setattr(fused_kernel, "columns", lambda tokens, rounded: columns(tokens, True))


BITS = (1024, 1024, 512, 256, 0)  # neurons at eight bits of levels 16, 8, 6, 5, 4
SPLIT = kernels.Fused(block_n=32, block_k=64, down_n=32, down_k=64, splits=3, programs_per_sm=1)
ONCE = kernels.Fused(block_n=64, block_k=64, down_n=64, down_k=128, splits=1, programs_per_sm=1)
ROUNDED = pytest.mark.parametrize("kernel", [SPLIT, ONCE], ids=["split", "unsplit"])


def in_bits(dtype=torch.float32, hidden=64) -> kernels.Weights:
    """Random weights of 1,024 neurons and their planes, in a random order."""
    gate_up = random(2048, hidden, dtype=dtype, seed=1, scale=0.2)
    down = random(hidden, 1024, dtype=dtype, seed=2, scale=0.2)
    return kernels.Weights.rounded(gate_up, down, some_rows(1024), BITS)


def activated(x, weights, fine):
    """silu(gate) · up of each row of x, the first `fine` neurons at eight bits and the others at four."""
    eight, four = (weights.planes[0].values(bits).chunk(2) for bits in (8, 4))
    gate, up = (x @ torch.cat([a[:fine], b[fine:]]).T for a, b in zip(eight, four, strict=True))
    return torch.nn.functional.silu(gate) * up


def with_planes(weights, change):
    """The same weights with each of the two planes changed."""
    return dataclasses.replace(weights, planes=tuple(change(own, place) for place, own in enumerate(weights.planes)))


@ROUNDED
@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (1, 192), (4, 128), (16, 192)])
def test_a_level_in_bits_reads_its_planes(tokens, hidden, dtype, kernel):
    x, weights, seen = random(tokens, hidden, dtype=dtype), in_bits(dtype, hidden), []
    for level in range(5):
        levels = counts(*[level] * tokens)
        seen.append(kernels.narrowed_mlp(x, weights, levels, kernel))
        assert error(seen[-1], kernels.rounded_twin(x, weights, levels)) < TOLERANCE[dtype]
    assert not any(torch.equal(more, fewer) for more, fewer in itertools.pairwise(seen))


@ROUNDED
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_at_16_bits_the_mlp_is_what_it_is_without_planes(tokens, kernel, as_with_planes):
    x, weights = random(tokens, 64), in_bits()
    whole, levels = (
        kernels.Weights(weights.gate_up, weights.down),
        torch.zeros(tokens, dtype=torch.int32, device=DEVICE),
    )
    poisoned = with_planes(weights, lambda own, _: dataclasses.replace(own, scale=own.scale * torch.nan))
    found = kernels.narrowed_mlp(x, poisoned, levels, kernel)
    assert torch.equal(found, kernels.narrowed_mlp(x, whole, levels, kernel)) and found.isfinite().all()


@ROUNDED
@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 4])
def test_planes_that_a_level_does_not_need_are_not_read(tokens, level, kernel):
    """Nor are the MLP's own weights; a low plane cannot hold NaN, so there it is random."""
    x, weights, levels = random(tokens, 64), in_bits(), counts(*[level] * tokens)
    wanted, width = kernels.narrowed_mlp(x, weights, levels, kernel), BITS[level]

    def other(own, place):
        low, noise = own.low.clone(), torch.randint_like(own.low, 256)
        for kept, changed in zip(low.chunk(2 - place), noise.chunk(2 - place), strict=True):
            if place:
                changed[:, : width // 2] = kept[:, : width // 2]
            else:
                changed[:width] = kept[:width]
        return dataclasses.replace(own, low=noise)

    poisoned = with_planes(weights, other)
    poisoned = dataclasses.replace(poisoned, gate_up=weights.gate_up * torch.nan, down=weights.down * torch.nan)
    assert torch.equal(kernels.narrowed_mlp(x, poisoned, levels, kernel), wanted)


@ROUNDED
@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize("log_lambda", [0.5, 20.0])
@pytest.mark.parametrize(("tokens", "padded"), [(1, 0), (1, 1), (4, 1), (16, 5)])
def test_a_step_runs_at_the_most_bits_that_one_of_its_tokens_needs(tokens, padded, log_lambda, dtype, kernel):
    x, weights, gate = random(tokens, 64, dtype=dtype), in_bits(dtype), a_gate(levels=5, dtype=dtype, group=2)
    slots, log_lambda = padding(tokens, padded), price(log_lambda)
    found, wanted = (step_counters.new_counters(5, x.device) for _ in range(2))
    out, level = gated(x, weights, gate, log_lambda, slots, found, kernel)
    twin = kernels.rounded_levels_twin(normed(x), gate, log_lambda, slots, wanted)
    own = gate_kernels.levels_twin(normed(x), gate, log_lambda, slots, None)
    real = slots >= 0
    assert torch.equal(level, twin.int()) and torch.equal(found, wanted)
    assert (twin[real] == own.min()).all() and (twin[~real] == 5).all()
    assert found[step_counters.BY_LEVEL :].tolist() == [
        2 * (tokens - padded) * (number == own.min().item()) for number in range(5)
    ]
    assert error(out, kernels.rounded_twin(normed(x), weights, twin)) < TOLERANCE[dtype] and not out[~real].any()
    assert torch.equal(kernels.narrowed_mlp(normed(x), weights, level, kernel), out)


@ROUNDED
def test_tokens_that_want_different_bits_get_the_most_of_them(kernel):
    x, weights, gate = random(16, 64, seed=2), in_bits(), a_gate(levels=5)
    prices = [p / 4 for p in range(-16, 16)]
    levels = [gate_kernels.levels_twin(normed(x), gate, price(p), None, None) for p in prices]
    at = next(i for i, level in enumerate(levels) if level.min() > 0 and len(level.unique()) > 1)
    counters = step_counters.new_counters(5, DEVICE)
    out, level = gated(x, weights, gate, price(prices[at]), None, counters, kernel)
    assert (level == levels[at].min()).all() and counters[step_counters.BY_LEVEL + level[0]] == 16
    assert error(out, kernels.rounded_twin(normed(x), weights, levels[at])) < 1e-5


@ROUNDED
@pytest.mark.parametrize("row", [0, 7])
def test_one_token_that_opted_out_has_all_run_whole_and_padding_does_not(row, kernel, as_with_planes):
    x, weights, gate = random(8, 64), in_bits(), a_gate(levels=5)
    prices, chosen = torch.tensor([20.0, -torch.inf], device=DEVICE), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    chosen[row], slots = 1, padding(8, 1)
    found, wanted = (step_counters.new_counters(5, DEVICE) for _ in range(2))
    out, level = gated(x, weights, gate, prices, slots, found, kernel, chosen)
    assert torch.equal(level, kernels.rounded_levels_twin(normed(x), gate, prices, slots, wanted, chosen).int())
    assert torch.equal(found, wanted) and (level[:7] == (0 if row == 0 else 4)).all()
    assert error(out, kernels.rounded_twin(normed(x), weights, level)) < 1e-5
    if row == 0:
        whole = kernels.Weights(weights.gate_up, weights.down, (1024, 1024))
        levels = counts(*[0] * 7, 2)
        assert torch.equal(out, kernels.narrowed_mlp(normed(x), whole, levels, kernel))


@pytest.mark.parametrize(
    ("programs", "parts", "chunks", "block"), [(1, 1, 32, 8), (3, 3, 16, 16), (7, 5, 8, 32), (100, 3, 16, 16)]
)
@pytest.mark.parametrize("level", [1, 3, 4])
def test_programs_share_out_the_planes_of_one_token(level, programs, parts, chunks, block):
    """Both halves, one after the other: within a half none of the programs waits for another."""
    hidden, fine = 192, BITS[level]
    x, weights = random(1, hidden), in_bits(hidden=hidden)
    gate_up, down = map(fused_kernel._planes, weights.planes)
    act, out = torch.full((1024,), torch.nan, device=DEVICE), torch.full((hidden,), torch.nan, device=DEVICE)
    partial, arrived = torch.full((2 * parts, hidden), torch.nan, device=DEVICE), counts(*[0] * hidden)
    triton.jit(_rounded_half_of_one)[(programs,)](x, *gate_up, act, programs, fine, 1024, hidden, 1024, 8, 8)
    triton.jit(_rounded_rest_of_one)[(programs,)](
        act, *down, partial, out, arrived, programs, fine, 1024, hidden, 1024, parts, chunks, block
    )
    assert error(out, kernels.rounded_twin(x, weights, counts(level))[0]) < 1e-5 and not arrived.any()


@pytest.mark.parametrize("programs", [1, 7, 100])
@pytest.mark.parametrize("level", [1, 3, 4])
def test_programs_share_out_the_planes_of_few_tokens(level, programs):
    x, weights, fine = random(4, 192), in_bits(hidden=192), BITS[level]
    act, planes = torch.full((16, 1024), torch.nan, device=DEVICE), fused_kernel._planes(weights.planes[0])
    triton.jit(_rounded_half)[(programs,)](x, *planes, act, 4, programs, fine, 1024, 192, 1024, 32)
    wanted = activated(x, weights, fine)
    wanted[1] = 0  # does not run
    assert error(act[:4], wanted) < 1e-5 and act[4:].isnan().all()


def test_planes_are_the_rounded_mlps_and_leave_the_weights_as_they_are():
    mlp, order = torch.nn.Module(), some_rows(1024)
    for name, shape in (("gate_proj", (64, 1024)), ("up_proj", (64, 1024)), ("down_proj", (1024, 64))):
        setattr(mlp, name, torch.nn.Linear(*shape, bias=False))
    mlp = mlp.requires_grad_(False).to(DEVICE)
    gate_up, down = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight.data
    weights = kernels.Weights.rounded(gate_up, down, order, BITS)
    assert weights.gate_up is gate_up and weights.down is down
    x, rounded = random(3, 64), RoundedMLP(mlp, order)
    for level in range(1, 5):
        assert error(kernels.rounded_twin(x, weights, counts(*[level] * 3)), rounded(x, BITS[level])) < 1e-5


def test_a_recording_in_bits_gains_what_steps_at_those_bits_took():
    us = {"dense": 40.0, "all rows": 42.0, "all at 8 bits": 22.0, "all at 4 bits": 12.0, "mixed": 30.0}
    settings = kernels.MlpSettings(SPLIT, "dense", us)
    for tokens in (1, 16):
        assert settings.gains_narrowed((0.5, 0.25, 0.25), (16.0, 8.0, 4.0), tokens) == pytest.approx(40 - 29.5)
        assert settings.gains_narrowed((0, 1), (16.0, 6.0), tokens) == pytest.approx(40 - 17), "between those timed"


ONE_TOKEN = {
    f"{shape} {gpu}": kernels.kernel_of(rows["1"])
    for gpu, tables in json.loads(kernels.SETTINGS_FILE.read_text()).items()
    for shape, rows in tables.get("rounded", {}).items()
}


@pytest.mark.parametrize("tuned", ONE_TOKEN)
def test_the_tiles_of_every_tuned_shape_leave_no_neuron_out(tuned):
    """Those of the settings in the table on the chip that they were timed on, for fewer neurons than the model's."""
    settings, (hidden, neurons) = ONE_TOKEN[tuned], map(int, tuned.split()[0].split("x"))
    tile = fused_kernel._rounded_tile(1, hidden, neurons, settings.programs_per_sm * PROCESSORS, settings)
    x, weights = random(1, hidden, scale=0.1), in_bits(hidden=hidden)
    act, planes = torch.full((1024,), torch.nan, device=DEVICE), fused_kernel._planes(weights.planes[0])
    triton.jit(_rounded_half_of_one)[(50,)](x, *planes, act, 50, 512, 1024, hidden, 1024, *tile[:2])
    assert error(act, activated(x, weights, 512)[0]) < 1e-4
