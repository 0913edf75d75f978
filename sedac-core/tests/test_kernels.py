"""The Triton kernels against their torch twins: in Triton's interpreter here, on the GPU where there is one."""

import dataclasses
import itertools

import pytest
import torch

from sedac_core._rust import RiskHistogram
from sedac_core.adapter import AdapterBank
from sedac_core.gated_model import masked_mlp
from sedac_core.gates import Gate
from sedac_core.metrics import RISK_BUCKETS
from sedac_core.precision import RoundedMLP
from sedac_core.probe import LREProbe

CUDA = torch.cuda.is_available()
kernels = pytest.importorskip("sedac_core.kernels", reason="Triton is not installed")
checkpoint_kernels = pytest.importorskip("sedac_core.checkpoint_kernels")
gate_kernels = pytest.importorskip("sedac_core.gate_kernels")
gate_parts = pytest.importorskip("sedac_core.gate_parts")
step_counters = pytest.importorskip("sedac_core.step_counters")
fused_kernel = pytest.importorskip("sedac_core.fused_kernel")
rounded_kernel = pytest.importorskip("sedac_core.rounded_kernel")
tiled_kernels = pytest.importorskip("sedac_core.tiled_kernels")
tl, triton = kernels.tl, kernels.triton


_activate, _activate_alone = fused_kernel._activate, fused_kernel._activate_alone
_activate_pairs = fused_kernel._activate_pairs
rounded_activate_alone, rounded_down_alone = rounded_kernel.rounded_activate_alone, rounded_kernel.rounded_down_alone
rounded_activate, rounded_values = rounded_kernel.rounded_activate, rounded_kernel.rounded_values


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


def _rounded_half_of_one(
    x, high, low, scale, act, programs, fine, needed, hidden_size, neurons, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    rounded_activate_alone(
        rounded_values(x, hidden_size, CHUNKS, False), (high, low, scale), act, tl.program_id(0), programs, fine, needed, hidden_size, neurons, CHUNKS, BLOCK_N, 3
    )  # fmt: skip


def _rounded_rest_of_one(
    act, high, low, scale, partial, out, arrived, programs, fine, needed, hidden_size, neurons,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rounded_down_alone(
        act, (high, low, scale), partial, out, arrived, tl.program_id(0), programs, fine, needed, hidden_size, neurons,
        PARTS, CHUNKS, BLOCK_N, 3, 0, False,
    )  # fmt: skip


def _rounded_half(
    x, high, low, scale, act, tokens, programs, fine, needed, hidden_size, neurons, BLOCK_N: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, 16)
    rounded_activate(
        x, (high, low, scale), act, i.to(tl.int64), i < tokens, i != 1, tl.program_id(0), programs, fine, needed,
        hidden_size, neurons, 16, BLOCK_N, 2,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a GPU, Triton's interpreter: conftest.py loaded the kernels for it, and running them asks again."""
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def as_with_planes(monkeypatch):
    """As many columns without planes as with them: the interpreter adds up another number in another order."""
    columns = fused_kernel.columns
    monkeypatch.setattr(fused_kernel, "columns", lambda tokens, rounded: columns(tokens, True))


DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES_HERE = DTYPES if CUDA else DTYPES[:2]  # the interpreter knows no bfloat16 dot
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FUSED = kernels.Fused(block_n=32, block_k=32, down_n=32, down_k=32, splits=3, programs_per_sm=1)
WHOLE = kernels.Fused(block_n=32, block_k=16, down_n=16, down_k=32, splits=1, programs_per_sm=2)
TILED = kernels.Tiled((16, 32, 32, 4, 2), (32, 32, 32, 4, 2), 2)
ONE_PASS = kernels.Tiled((16, 32, 32, 4, 2), (32, 32, 32, 4, 2), 1)
KERNELS = pytest.mark.parametrize(
    "kernel", [FUSED, WHOLE, TILED, ONE_PASS], ids=["fused", "unsplit", "tiled", "tiled once"]
)


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DEVICE, dtype)


def error(found, wanted):
    """Relative in the norm; NaN never passes."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)).item()


def some_rows(tokens: int):
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    return order.to(DEVICE)


def counts(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def levels_of(rows, ends):
    """The level of each token, given its place in `rows` and where the levels end."""
    place = torch.arange(len(rows), device=DEVICE)
    return (place[:, None] >= ends).sum(1, dtype=torch.int32)[rows.argsort()]


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


WIDTHS = (256, 192, 64, 0)


def narrowed(dtype=torch.float32, rank=32) -> kernels.Weights:
    """Random weights of 256 neurons at four widths, with adapters or (rank 0) without, as soft exits have them."""
    neurons = 256 + 3 * rank
    gate_up = random(2 * neurons, 64, dtype=dtype, seed=1, scale=0.2)
    down = random(64, neurons, dtype=dtype, seed=2, scale=0.2)
    bias = random(3, 64, dtype=dtype, seed=3, scale=0.2) if rank else None
    return kernels.Weights(gate_up, down, WIDTHS, rank, bias)


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


# ---------------------------------------------------------------- gates

PARTED = dataclasses.replace(FUSED, share_gate=False)
DECIDING = pytest.mark.parametrize(
    "kernel", [FUSED, PARTED, WHOLE, TILED], ids=["shared", "parted", "unsplit", "tiled"]
)


def a_gate(hidden=64, levels=4, dtype=torch.float32, spread=1.0, first=True, group=1) -> gate_parts.DeviceGate:
    torch.manual_seed(0)
    gate = Gate(hidden, levels - 1)
    gate.proj.weight.data *= 3  # so that tokens differ
    gate.head.weight.data.normal_(std=spread)
    gate.proj.bias.data.normal_()
    gain = torch.linspace(0.3, 0.95, levels - 1)
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    return gate_parts.DeviceGate.make(gate, gain, group, first, like)


def price(log_lambda: float):
    return torch.tensor(log_lambda, device=DEVICE)


def padding(tokens: int, padded: int):
    slots = torch.arange(tokens, device=DEVICE)
    slots[tokens - padded :] = -1
    return slots


@DECIDING
@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize("log_lambda", [-20.0, -0.5, 0.5, 20.0])
@pytest.mark.parametrize(("tokens", "padded"), [(1, 0), (4, 1), (33, 7), (8, 8)])
def test_gates_decide_count_and_narrow_as_the_twin_does(tokens, padded, log_lambda, dtype, kernel):
    x, weights, gate = random(tokens, 64, dtype=dtype), narrowed(dtype), a_gate(dtype=dtype, group=2)
    slots, log_lambda = padding(tokens, padded), price(log_lambda)
    found, wanted = (step_counters.new_counters(4, x.device) for _ in range(2))
    out, level = kernels.gated_mlp(x, weights, gate, log_lambda, slots, found, kernel)
    twin = gate_kernels.levels_twin(x, gate, log_lambda, slots, wanted)
    assert torch.equal(level, twin.int()) and (twin[tokens - padded :] == 4).all()
    assert error(out, kernels.mlp_twin(x, weights, twin)) < TOLERANCE[dtype]
    assert torch.equal(found, wanted)
    steps, seen, *rest = found.tolist()
    rows = rest[step_counters.BY_LEVEL - 2 :]
    assert (steps, seen, sum(rows)) == (int(padded < tokens), tokens - padded, 2 * (tokens - padded))
    assert rest[: len(step_counters.PATHS)] == [steps, 0, 0, 0], "predicated"
    following = kernels.narrowed_mlp(x, weights, level, kernel)
    assert torch.equal(following, out)


@DECIDING
def test_each_token_decides_at_the_price_that_its_request_chose(kernel):
    x, weights, gate = random(33, 64), narrowed(), a_gate()
    prices = torch.tensor([0.5, -torch.inf, -1.5, 20.0], device=DEVICE)
    chosen = some_rows(48).int() % 4  # the buffer is longer than the step
    slots, (found, wanted) = padding(33, 5), (step_counters.new_counters(4, DEVICE) for _ in range(2))
    out, level = kernels.gated_mlp(x, weights, gate, prices, slots, found, kernel, chosen)
    twin = gate_kernels.levels_twin(x, gate, prices, slots, wanted, chosen)
    assert torch.equal(level, twin.int()) and torch.equal(found, wanted)
    assert error(out, kernels.mlp_twin(x, weights, twin)) < 1e-5
    own = [gate_kernels.levels_twin(x, gate, each, slots, None) for each in prices]
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
    out, level = kernels.gated_mlp(x, weights, gate, price(0.5), slots, found, kernel, least=least)
    twin = gate_kernels.levels_twin(x, gate, price(0.5), slots, wanted, least=least)
    free = gate_kernels.levels_twin(x, gate, price(0.5), slots, None)
    assert torch.equal(level, twin.int()) and torch.equal(found, wanted)
    assert torch.equal(twin, torch.maximum(free, least)) and not torch.equal(twin, free)
    assert error(out, kernels.mlp_twin(x, weights, twin)) < 1e-5
    assert found[step_counters.BY_LEVEL :].sum() == 28 * (2 + 3), "its group's rows, and those outside of all groups"


@DECIDING
def test_gates_that_are_switched_off_say_so_and_nobody_narrows(kernel):
    x, counters = random(5, 64), step_counters.new_counters(4, DEVICE)
    prices, chosen = torch.full((3,), -torch.inf, device=DEVICE), torch.arange(5, device=DEVICE).int() % 3
    _, level = kernels.gated_mlp(x, narrowed(), a_gate(), prices, None, counters, kernel, chosen)
    assert not level.any() and counters[step_counters.BY_REASON :].tolist() == [0, 5, 0, 0, 5, 0, 0, 0]


@DECIDING
def test_a_second_launch_finds_all_as_the_first_one_did(kernel):
    x, weights, gate, counters = random(5, 64), narrowed(), a_gate(first=False), step_counters.new_counters(4, DEVICE)
    first, _ = kernels.gated_mlp(x, weights, gate, price(0.0), None, counters, kernel)
    again, _ = kernels.gated_mlp(x, weights, gate, price(0.0), None, counters, kernel)
    assert torch.equal(first, again) and counters[:2].tolist() == [0, 0] and counters.sum() == 10


@DECIDING
def test_a_token_decides_alike_beside_any_neighbours(kernel):
    x, weights, gate = random(6, 64), narrowed(), a_gate()
    levels = [
        kernels.gated_mlp(part, weights, gate, price(0.0), None, step_counters.new_counters(4, DEVICE), kernel)[1]
        for part in (x, *x.split(1))
    ]
    assert torch.equal(levels[0], torch.cat(levels[1:])) and len(levels[0].unique()) > 1


@DECIDING
def test_at_a_gates_border_the_kernel_takes_the_twins_side(kernel):
    """A little above the price at which a level starts to pay, and a little below."""
    x, weights, gate = random(8, 64), narrowed(), a_gate()
    inner = torch.nn.functional.silu(x @ gate.proj.T + gate.proj_bias)
    border = (inner @ gate.head.T + gate.head_bias - gate.gain.log()).min(1).values  # [tokens], log λ
    for token in (0, 3, 6):
        for side, narrow in ((-1e-4, False), (1e-4, True)):
            log_lambda = border[token] + side
            counters = step_counters.new_counters(4, DEVICE)
            _, level = kernels.gated_mlp(x, weights, gate, log_lambda, None, counters, kernel)
            assert bool(level[token] > 0) is narrow
            assert torch.equal(level, gate_kernels.levels_twin(x, gate, log_lambda, None, None).int())


@DECIDING
def test_an_input_that_is_not_finite_runs_whole(kernel):
    x = random(3, 64)
    x[1, 5] = torch.nan
    counters = step_counters.new_counters(4, DEVICE)
    out, level = kernels.gated_mlp(x, narrowed(), a_gate(), price(20.0), None, counters, kernel)
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


# ---------------------------------------------------------------- levels in bits

BITS = (1024, 1024, 512, 256, 0)  # neurons at eight bits of levels 16, 8, 6, 5, 4
SPLIT = kernels.Fused(block_n=32, block_k=64, down_n=32, down_k=64, splits=3, programs_per_sm=1)
ONCE = kernels.Fused(block_n=64, block_k=64, down_n=64, down_k=128, splits=1, programs_per_sm=1, share_gate=False)
ROUNDED = pytest.mark.parametrize("kernel", [SPLIT, ONCE], ids=["split", "unsplit"])


def in_bits(dtype=torch.float32, hidden=64) -> kernels.Weights:
    """Random weights of 1,024 neurons and their planes, in a random order."""
    gate_up = random(2048, hidden, dtype=dtype, seed=1, scale=0.2)
    down = random(hidden, 1024, dtype=dtype, seed=2, scale=0.2)
    return kernels.Weights.rounded(gate_up, down, some_rows(1024), BITS)


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
    out, level = kernels.gated_mlp(x, weights, gate, log_lambda, slots, found, kernel)
    twin = kernels.rounded_levels_twin(x, gate, log_lambda, slots, wanted)
    own = gate_kernels.levels_twin(x, gate, log_lambda, slots, None)
    real = slots >= 0
    assert torch.equal(level, twin.int()) and torch.equal(found, wanted)
    assert (twin[real] == own.min()).all() and (twin[~real] == 5).all()
    assert found[step_counters.BY_LEVEL :].tolist() == [
        2 * (tokens - padded) * (number == own.min().item()) for number in range(5)
    ]
    assert error(out, kernels.rounded_twin(x, weights, twin)) < TOLERANCE[dtype] and not out[~real].any()
    assert torch.equal(kernels.narrowed_mlp(x, weights, level, kernel), out)


@ROUNDED
def test_tokens_that_want_different_bits_get_the_most_of_them(kernel):
    x, weights, gate = random(16, 64), in_bits(), a_gate(levels=5)
    prices = [p / 4 for p in range(-12, 12)]
    levels = [gate_kernels.levels_twin(x, gate, price(p), None, None) for p in prices]
    at = next(i for i, level in enumerate(levels) if level.min() > 0 and len(level.unique()) > 1)
    counters = step_counters.new_counters(5, DEVICE)
    out, level = kernels.gated_mlp(x, weights, gate, price(prices[at]), None, counters, kernel)
    assert (level == levels[at].min()).all() and counters[step_counters.BY_LEVEL + level[0]] == 16
    assert error(out, kernels.rounded_twin(x, weights, levels[at])) < 1e-5


@ROUNDED
@pytest.mark.parametrize("row", [0, 7])
def test_one_token_that_opted_out_has_all_run_whole_and_padding_does_not(row, kernel, as_with_planes):
    x, weights, gate = random(8, 64), in_bits(), a_gate(levels=5)
    prices, chosen = torch.tensor([20.0, -torch.inf], device=DEVICE), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    chosen[row], slots = 1, padding(8, 1)
    found, wanted = (step_counters.new_counters(5, DEVICE) for _ in range(2))
    out, level = kernels.gated_mlp(x, weights, gate, prices, slots, found, kernel, chosen)
    assert torch.equal(level, kernels.rounded_levels_twin(x, gate, prices, slots, wanted, chosen).int())
    assert torch.equal(found, wanted) and (level[:7] == (0 if row == 0 else 4)).all()
    assert error(out, kernels.rounded_twin(x, weights, level)) < 1e-5
    if row == 0:
        whole = kernels.Weights(weights.gate_up, weights.down, (1024, 1024))
        levels = counts(*[0] * 7, 2)
        assert torch.equal(out, kernels.narrowed_mlp(x, whole, levels, kernel))


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
    eight, four = (weights.planes[0].values(bits).chunk(2) for bits in (8, 4))
    gate, up = (x @ torch.cat([a[:fine], b[fine:]]).T for a, b in zip(eight, four, strict=True))
    wanted = torch.nn.functional.silu(gate) * up
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


# ---------------------------------------------------------------- checkpoints


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


def a_rule(checkpoints=2, gamma=0.5, level=0.5, adaptive=True, thresholds=(0.7, 0.6)) -> checkpoint_kernels.Rule:
    in_force = torch.tensor(thresholds[:checkpoints], dtype=torch.float32, device=DEVICE)
    table = torch.stack([in_force, torch.zeros_like(in_force), in_force * 1.5])  # in force, off, and a preset
    return checkpoint_kernels.Rule.make(table, [1.0, 2.0][:checkpoints], gamma, level, adaptive)


@pytest.mark.parametrize("dtype", DTYPES_HERE, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 150])
@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("choices", [False, True], ids=["nobody chose", "some chose"])
def test_two_checkpoints_decide_count_and_compact_as_the_twin_does(tokens, rank, choices, dtype):
    torch.manual_seed(0)
    probes = [LREProbe(96, rank).to(DEVICE).requires_grad_(False) for _ in range(2)]
    for probe in probes:
        probe.head.weight.mul_(4)
        probe.norm.weight.add_(torch.rand_like(probe.norm.weight))
        probe.norm.bias.add_(torch.rand_like(probe.norm.bias))
    slots = torch.arange(tokens, device=DEVICE)
    slots[tokens - tokens // 4 :] = -1  # padding
    hidden, residual = random(tokens, 96, dtype=dtype), random(tokens, 96, dtype=dtype, seed=1)
    found, wanted = a_rule(), a_rule()
    chosen = some_rows(160).int() % 3 if choices else None  # the buffer is longer than the step
    path = "gather" if choices else "predicated"
    left = right = first = None
    for index, probe in enumerate(probes):
        last = index == 1
        rest = (index, 3 + last, chosen, path)
        one = checkpoint_kernels.checkpoint(probe, hidden, residual, left, slots, found, *rest)
        two = checkpoint_kernels.checkpoint_twin(probe, hidden, residual, right, slots, wanted, *rest)
        assert torch.equal(one[0].isinf(), two[0].isinf())
        assert torch.allclose(one[0], two[0], atol=1e-5)
        n = int(one[2])
        assert n == int(two[2]) and torch.equal(one[1][:n], two[1][:n])
        assert torch.equal(one[1].sort().values, torch.arange(tokens, device=DEVICE))
        first = one[0] if first is None else first
        left, right = one[0], two[0]
        if choices:
            assert not one[0][: tokens - tokens // 4][chosen[: tokens - tokens // 4] == 1].isinf().any(), "opted out"
    assert torch.equal(found.counters, wanted.counters)
    assert torch.allclose(found.risk_sums, wanted.risk_sums)
    real = tokens - tokens // 4
    assert found.counters[[step_counters.STEPS, step_counters.TOKENS]].tolist() == [1, real]
    seen = [found.counters[checkpoint_kernels.BY_CHECKPOINT + 13 * i :][:13] for i in range(2)]
    assert [int(each[2:].sum()) for each in seen] == [real, real - int(seen[0][0])], "risks of those that got there"
    assert found.histogram.sum(1).tolist() == (
        [int((chosen[:real] == 0).sum()), int(((chosen[:real] == 0) & ~first[:real].isinf()).sum())]
        if choices
        else [real, real - int(seen[0][0])]
    )
    near = (found.histogram.cumsum(1) - wanted.histogram.cumsum(1)).abs()  # a rounding may move a token one bin on
    assert near.max() <= 1 and torch.equal(found.histogram.sum(1), wanted.histogram.sum(1))


def test_exits_that_are_only_watched_are_counted_nowhere_and_skip_nothing():
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    rule = a_rule(1, 0.0, thresholds=(float("inf"),))
    rule.taken.fill_(step_counters.OBSERVING)
    margin, rows, n_running = checkpoint_kernels.checkpoint(probe, random(6, 64), random(6, 64), None, None, rule, 0, 4)
    assert margin.isinf().all() and n_running.item() == 6 and rows.tolist() == list(range(6))
    steps, tokens, *rest = rule.counters.tolist()
    assert (steps, tokens) == (1, 6) and rest[4:8] == [6, 0, 0, 0], "observing"
    assert rest[8:11] == [0, 0, 0] and sum(rest[11:]) == 6
    assert rule.histogram.sum() == 6


def test_a_stream_that_is_not_finite_never_exits_and_is_counted():
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    hidden = random(4, 64)
    hidden[1, 3], hidden[2, 0] = torch.nan, torch.inf
    rule = a_rule(1, 0.0, thresholds=(float("inf"),))
    margin, rows, n_running = checkpoint_kernels.checkpoint(probe, hidden, random(4, 64), None, None, rule, 0, 1)
    assert rows[: int(n_running)].tolist() == [1, 2] and margin.isinf().tolist() == [True, False, False, True]
    saved, exited, odd, *risks = rule.counters[checkpoint_kernels.ROWS_SAVED :].tolist()
    assert (saved, exited, odd, sum(risks)) == (2, 2, 2, 2) and rule.risk_sums.isfinite().all()


def test_risks_are_counted_in_the_buckets_of_the_metrics():
    probe, rule = LREProbe(64, 16).to(DEVICE).requires_grad_(False), a_rule(1, 0.0, adaptive=False)
    hidden, residual = random(300, 64, scale=3.0), random(300, 64, seed=1)
    probe.head.weight.mul_(20)
    checkpoint_kernels.checkpoint(probe, hidden, residual, None, padding(300, 50), rule, 0, 1)
    risks = probe(hidden + residual)[:250].tolist()
    buckets = rule.counters[checkpoint_kernels.BY_CHECKPOINT + 2 :].tolist()
    assert buckets == [
        sum(low < risk <= high for risk in risks) for low, high in itertools.pairwise((-1, *RISK_BUCKETS, float("inf")))
    ]
    assert min(buckets[4:]) > 0 and rule.risk_sums.item() == pytest.approx(sum(risks), rel=1e-5)


def test_a_cascade_that_is_switched_off_or_runs_dense_says_so():
    probe, rule = LREProbe(64, 16).to(DEVICE).requires_grad_(False), a_rule(1, 0.0, adaptive=False)
    chosen = torch.tensor([0, 1, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    for phase, path in (
        (step_counters.TAKEN, "dense"),
        (step_counters.OFF, "dense"),
        (step_counters.OBSERVING, "conditional"),
    ):
        rule.taken.fill_(phase)
        checkpoint_kernels.checkpoint(probe, random(5, 64), random(5, 64), None, None, rule, 0, 1, chosen, path)
    paths, reasons = rule.counters[2:6].tolist(), rule.counters[6:10].tolist()
    assert (paths, reasons) == ([0, 1, 2, 0], [5, 5, 2, 3])


@pytest.mark.parametrize("threshold", [0.0, 0.5, float("inf")])
def test_at_gamma_0_and_level_a_half_a_token_exits_just_where_its_risk_is_under_the_threshold(threshold):
    probe = LREProbe(64, 16).to(DEVICE).requires_grad_(False)
    rule = a_rule(1, 0.0, thresholds=(threshold,))
    hidden, residual = random(40, 64), random(40, 64, seed=1)
    margin, _, _ = checkpoint_kernels.checkpoint(probe, hidden, residual, None, None, rule, 0, 1)
    assert torch.equal(margin.isinf(), probe(hidden + residual) < threshold)


def test_the_bins_are_the_rust_histograms():
    risks = torch.cat([torch.rand(500) * 3, torch.tensor([0.0, 2.0**-30, 2.0**-24, 1.0, 2.0**23, 2.0**30])])
    histogram = RiskHistogram()
    histogram.add(risks.numpy())
    again = RiskHistogram()
    again.add(checkpoint_kernels.bin_centres()[checkpoint_kernels.histogram_bins(risks)].numpy())
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert again.quantile(share) == histogram.quantile(share)


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
