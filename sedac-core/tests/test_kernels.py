"""The MLP's Triton kernels against their torch twins: in Triton's interpreter here, on the GPU where there is one."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES_HERE,
    FUSED,
    NORM,
    ONE_PASS,
    TILED,
    TOLERANCE,
    WHOLE,
    WIDTHS,
    a_gate,
    counts,
    error,
    levels_of,
    narrowed,
    padding,
    price,
    random,
    some_rows,
)

from sedac_core import bench_tune, fused_kernel, kernels, step_counters, tiled_kernels
from sedac_core.adapter import AdapterBank
from sedac_core.cli import SedacError
from sedac_core.gated_model import masked_mlp

tl, triton = kernels.tl, kernels.triton
pytestmark = pytest.mark.usefixtures("interpreter")

_activate, _activate_alone = fused_kernel._activate, fused_kernel._activate_alone
_activate_pairs = fused_kernel._activate_pairs


def _first_half(
    x, gate_up, act, level_of, tokens, programs, needed, reach, present, hidden_size, neurons, adapters,
    LEVELS: tl.constexpr, WIDTHS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, 16)
    level = tl.load(level_of + i, mask=i < tokens, other=LEVELS)
    width = tl.zeros((16,), tl.int32)
    for j in tl.static_range(LEVELS):
        width = tl.where(level == j, WIDTHS[j], width)
    _activate(
        x, gate_up, act, i.to(tl.int64), i < tokens, level, width, tl.program_id(0), programs, needed, reach, present,
        hidden_size, neurons, adapters, LEVELS, RANK, 16, 16, 32,
    )  # fmt: skip


def _first_half_of_one(
    x, gate_up, act, programs, needed, reach, present, hidden_size, neurons, adapters,
    LEVELS: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if PAIRS:
        _activate_pairs(
            x, gate_up, act, program, programs, needed, reach, present, hidden_size, neurons, adapters, LEVELS, RANK, 128,
        )  # fmt: skip
    else:
        _activate_alone(
            x, gate_up, act, program, programs, needed, reach, present, hidden_size, neurons, adapters, LEVELS, RANK, 16, 32, 3,
        )  # fmt: skip


KERNELS = pytest.mark.parametrize(
    "kernel", [FUSED, WHOLE, TILED, ONE_PASS], ids=["fused", "unsplit", "tiled", "tiled once"]
)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "neurons", "running"),
    [(1, 64, 256, 1), (1, 64, 256, 0), (5, 96, 192, 3), (33, 64, 256, 17), (33, 64, 256, 33), (20, 128, 64, 20)],
)
def test_the_mlp_computes_the_running_rows_and_zeros(tokens, hidden, neurons, running, dtype, kernel):
    x, gate_up = random(tokens, hidden, dtype=dtype), random(2 * neurons, hidden, dtype=dtype, seed=1, scale=0.2)
    down, rows = random(hidden, neurons, dtype=dtype, seed=2, scale=0.2), some_rows(tokens)
    weights, n_running = kernels.Weights(gate_up, down), counts(running)
    found = kernels.mlp(x, weights, rows, n_running, kernel)
    wanted = kernels.mlp_twin(x, weights, levels_of(rows, n_running))
    assert error(found, wanted) < TOLERANCE[dtype]
    assert not found[rows[running:]].any() and found[rows[:running]].any(-1).all()


ENDS = pytest.mark.parametrize(
    "ends",
    [(9, 9, 9, 9), (0, 0, 0, 9), (0, 9, 9, 9), (2, 5, 5, 9), (1, 2, 3, 4), (0, 3, 3, 7), (0, 0, 0, 0)],
    ids=str,
)


@KERNELS
@pytest.mark.parametrize("rank", [0, 32, 64])
@ENDS
def test_each_level_runs_its_neurons_and_its_adapter(ends, rank, kernel):
    x, weights, rows = random(9, 64), narrowed(rank=rank), some_rows(9)
    found = kernels.mlp(x, weights, rows, counts(*ends), kernel)
    assert error(found, kernels.mlp_twin(x, weights, levels_of(rows, counts(*ends)))) < 1e-5
    assert not found[rows[ends[-1] :]].any()


@KERNELS
def test_levels_spread_over_several_tiles_of_rows(kernel):
    x, weights, rows, ends = random(75, 64), narrowed(), some_rows(75), counts(20, 40, 52, 70)
    found = kernels.mlp(x, weights, rows, ends, kernel)
    assert error(found, kernels.mlp_twin(x, weights, levels_of(rows, ends))) < 1e-5


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("kernel", [TILED, ONE_PASS], ids=["tiled", "tiled once"])
def test_groups_of_tiles_are_an_order_and_nothing_else(kernel, group, monkeypatch):
    """Five tiles of rows and eleven of neurons: the last group is a smaller one."""
    x, weights, rows, ends = random(75, 64), narrowed(), some_rows(75), counts(20, 40, 52, 70)
    wanted = kernels.mlp(x, weights, rows, ends, kernel)
    monkeypatch.setattr(tiled_kernels, "GROUP", group)
    assert torch.equal(kernels.mlp(x, weights, rows, ends, kernel), wanted)


@KERNELS
@pytest.mark.parametrize(
    ("ends", "reach", "adapters"), [((0, 2, 2, 4), 192, (1, 3)), ((0, 0, 4, 4), 64, (2,)), ((0, 0, 0, 3), 0, (3,)), ((4, 4, 4, 4), 256, ())]
)  # fmt: skip
def test_weights_that_no_row_needs_are_not_read(ends, reach, adapters, kernel):
    x, weights, rows = random(4, 64), narrowed(), some_rows(4)
    wanted = kernels.mlp_twin(x, weights, levels_of(rows, counts(*ends)))
    needed = torch.zeros(256 + 96, dtype=torch.bool)
    needed[:reach] = True
    for level in adapters:
        needed[256 + 32 * (level - 1) : 256 + 32 * level] = True
    gate_up, down = weights.gate_up.clone(), weights.down.clone()
    gate_up[torch.cat([needed[:256], needed[:256], needed[256:], needed[256:]]).logical_not()] = torch.nan
    down[:, ~needed] = torch.nan
    poisoned = kernels.Weights(gate_up, down, WIDTHS, 32, weights.bias)
    assert error(kernels.mlp(x, poisoned, rows, counts(*ends), kernel), wanted) < 1e-5


def running(x, weights, reach, adapters):
    """The neurons of narrowed() that run, in their order, and gate and up of each row of x."""
    own = (torch.arange(256 + 32 * (j - 1), 256 + 32 * j) for j in adapters)
    place = torch.cat([torch.arange(reach), *own]).to(DEVICE)
    gate_row = torch.where(place < 256, place, place + 256)
    up_row = gate_row + torch.where(place < 256, 256, 96)
    return place, x @ weights.gate_up[gate_row].T, x @ weights.gate_up[up_row].T


@pytest.mark.parametrize("programs", [1, 3, 7, 200])
@pytest.mark.parametrize("ends", [(9, 9, 9, 9), (0, 9, 9, 9), (2, 5, 5, 9), (0, 0, 0, 9)], ids=str)
def test_programs_share_out_all_neurons_that_run(ends, programs):
    """The first half alone: none of its programs waits for another, so the interpreter can run several."""
    x, weights, level = random(9, 64), narrowed(), levels_of(torch.arange(9, device=DEVICE), counts(*ends))
    act, present = torch.full((16, 352), torch.nan, device=DEVICE), set(level.tolist()) - {4}
    reach, own = max(WIDTHS[j] for j in present), [j for j in sorted(present) if j]
    needed = reach + 32 * len(own)
    triton.jit(_first_half)[(programs,)](
        x, weights.gate_up, act, level, 9, programs, needed, reach, sum(1 << j for j in present), 64, 256, 96, 4, WIDTHS, 32
    )  # fmt: skip
    place, gate, up = running(x, weights, reach, own)
    runs = torch.where(
        place < 256, place < torch.tensor([*WIDTHS, 0], device=DEVICE)[level.long()][:, None],
        (place - 256) // 32 + 1 == level[:, None],
    )  # fmt: skip
    wanted = torch.where(runs, torch.nn.functional.silu(gate) * up, 0.0)
    assert error(act[:9, :needed], wanted) < 1e-5 and act[:9, needed:].isnan().all()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("programs", [1, 7, 200])
@pytest.mark.parametrize("level", [0, 2, 3])
def test_programs_share_out_the_neurons_of_one_token(level, programs, pairs):
    x, weights, reach = random(1, 64), narrowed(), WIDTHS[level]
    needed, act = reach + 32 * bool(level), torch.full((352,), torch.nan, device=DEVICE)
    triton.jit(_first_half_of_one)[(programs,)](
        x, weights.gate_up, act, programs, needed, reach, 1 << level, 64, 256, 96, 4, 32, pairs
    )
    _, gate, up = running(x, weights, reach, [level] if level else [])
    assert error(act[:needed], (torch.nn.functional.silu(gate) * up)[0]) < 1e-5 and act[needed:].isnan().all()


@pytest.mark.parametrize("multiple", [1, 32])
def test_weights_in_order_with_their_adapters_are_the_gates_own_mlp(multiple):
    """Against the obvious twin of `gates`, on a real MLP's weights; the whole MLP is unchanged."""
    torch.manual_seed(0)
    mlp, bank, order = torch.nn.Module(), AdapterBank(64, 20, 3), torch.randperm(256)
    for name, shape in (("gate_proj", (64, 256)), ("up_proj", (64, 256)), ("down_proj", (256, 64))):
        setattr(mlp, name, torch.nn.Linear(*shape, bias=False))
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mlp, bank, order = mlp.requires_grad_(False).to(DEVICE), bank.requires_grad_(False).to(DEVICE), order.to(DEVICE)
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    weights = kernels.Weights.narrowed(gate_up, mlp.down_proj.weight, order, bank, WIDTHS, multiple)
    x, level = random(40, 64), torch.arange(40, device=DEVICE) % 4
    wanted = masked_mlp(mlp, bank, order.argsort(), torch.tensor(WIDTHS, device=DEVICE), x, level)
    assert error(kernels.mlp_twin(x, weights, level), wanted) < 1e-5

    def whole(x):
        own = kernels.Weights(weights.gate_up[:512], weights.down[:, :256].contiguous())
        return kernels.mlp_twin(x, own, torch.zeros(len(x), device=DEVICE))

    plain = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    assert error(whole(x), mlp.down_proj(plain)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize(("tokens", "neurons", "block"), [(1, 64, 1024), (7, 1504, 1024), (33, 96, 64)])
@pytest.mark.parametrize("running", [None, 0, 5, 33])
def test_the_activation_computes_the_running_rows_and_zeros(tokens, neurons, block, running, dtype):
    gate_up, rows = random(tokens, 2 * neurons, dtype=dtype), some_rows(tokens)
    if running is None:
        given, stay = (), rows
    else:
        given, stay = (rows, counts(min(running, tokens))), rows[:running]
        gate_up[rows[running:]] = torch.nan  # what an exited row holds is never read
    found = kernels.silu_mul(gate_up, *given, block=block)
    gate, up = gate_up[stay].float().chunk(2, 1)
    wanted = torch.zeros(tokens, neurons, device=DEVICE)
    wanted[stay] = torch.nn.functional.silu(gate) * up
    assert error(found, wanted) < TOLERANCE[dtype] / 2 and not found[rows[len(stay) :]].any()
    assert error(found, kernels.silu_mul_twin(gate_up, *given)) < TOLERANCE[dtype] / 2


@pytest.mark.parametrize("running", [0, 3, 7])
def test_the_rows_of_exited_tokens_are_set_to_zero(running):
    out, rows = random(7, 1500), some_rows(7)
    wanted = out.clone()
    wanted[rows[running:]] = 0
    kernels.zero_exited(out, rows, torch.tensor([running], dtype=torch.int32, device=DEVICE))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("running", [0, 3, 7])
@pytest.mark.parametrize("gathered", [True, False])
def test_running_rows_go_to_their_places_and_zeros_to_the_others(gathered, running):
    part, rows, out = random(7, 1500), some_rows(7), torch.full((7, 1500), torch.nan, device=DEVICE)
    wanted = torch.zeros(7, 1500, device=DEVICE)
    wanted[rows[:running]] = part[:running] if gathered else part[rows[:running]]
    n_running = torch.tensor([running], dtype=torch.int32, device=DEVICE)
    assert kernels.place(part, rows, n_running, out, gathered) is out and torch.equal(out, wanted)


def test_settings_of_large_steps_hold_for_larger_ones_and_for_no_small_one(monkeypatch):
    rows = {size: kernels.MlpSettings(TILED, "dense", {"dense": size}) for size in (16, 2048, 8192)}
    monkeypatch.setattr(kernels, "_tuned", lambda policy: {"64x128": rows})
    found = {tokens: kernels.mlp_settings(tokens, 64, 128, gated=True).us for tokens in (9, 17, 512, 513, 2049, 9999)}
    assert [us and us["dense"] for us in found.values()] == [16, None, None, 2048, 8192, 8192]


def test_settings_cover_every_size_and_shapes_nobody_tuned_have_no_measured_way():
    for tokens in (1, 16, 17, 512, 8192):
        for gated in (False, True):
            assert kernels.mlp_settings(tokens, 999, 777, gated).path is None
        rounded = kernels.mlp_settings(tokens, 999, 777, gated=True, rounded=True)
        assert rounded.path == (None if tokens <= 16 else "dense")
    with pytest.raises(AssertionError):
        kernels.Weights(random(512, 64), random(64, 128))


@pytest.mark.parametrize("gated", [False, True])
def test_tuning_keeps_no_setting_that_leaves_something_out(gated, monkeypatch):
    """On a kernel that drops what half of the neurons add, which is faster."""
    problem = bench_tune.Problem.__new__(bench_tune.PROBLEMS["gates"] if gated else bench_tune.Problem)
    problem.hidden, problem.neurons, problem.copies = 64, 256, 1
    problem.x, problem.rows, problem.ends = random(9, 64), some_rows(9), counts(9)
    plain = kernels.Weights(random(512, 64, seed=1, scale=0.2), random(64, 256, seed=2, scale=0.2))
    problem.weights = [narrowed() if gated else plain]
    if gated:
        monkeypatch.setattr(type(problem), "shape", SimpleNamespace(widths=WIDTHS))
        problem.gates, problem.price, problem.chosen, problem.norm = [a_gate()], price(0.0), None, NORM
        problem.slots, problem.counters = padding(9, 0), step_counters.new_counters(4, DEVICE)
    bench_tune.check(problem, FUSED)
    name = "gated_mlp" if gated else "mlp"
    right = getattr(kernels, name)

    def half(*arguments):
        (weights,) = (each for each in arguments if isinstance(each, kernels.Weights))
        down = weights.down.clone()
        down[:, :128] = 0
        other = dataclasses.replace(weights, down=down)
        return right(*(other if each is weights else each for each in arguments))

    monkeypatch.setattr(kernels, name, half)
    with pytest.raises(SedacError, match="64 x 256, 9 tokens, all rows: relative error 0"):
        bench_tune.check(problem, FUSED)
