"""What the tests of Triton kernels share: where they run, settings, and random MLPs and gates."""

import pytest
import torch

from sedac_core.gates import Gate

kernels = pytest.importorskip("sedac_core.kernels", reason="Triton is not installed")
gate_parts = pytest.importorskip("sedac_core.gate_parts")
norm_kernels = pytest.importorskip("sedac_core.norm_kernels")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES_HERE = DTYPES if CUDA else DTYPES[:2]  # the interpreter knows no bfloat16 dot
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
FUSED = kernels.Fused(block_n=32, block_k=32, down_n=32, down_k=32, splits=3, programs_per_sm=1)
WHOLE = kernels.Fused(block_n=32, block_k=16, down_n=16, down_k=32, splits=1, programs_per_sm=2)
TILED = kernels.Tiled((16, 32, 32, 4, 2), (32, 32, 32, 4, 2), 2)
ONE_PASS = kernels.Tiled((16, 32, 32, 4, 2), (32, 32, 32, 4, 2), 1)


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


WIDTHS = (256, 192, 64, 0)


def narrowed(dtype=torch.float32, rank=32) -> kernels.Weights:
    """Random weights of 256 neurons at four widths, with adapters or (rank 0) without, as soft exits have them."""
    neurons = 256 + 3 * rank
    gate_up = random(2 * neurons, 64, dtype=dtype, seed=1, scale=0.2)
    down = random(64, neurons, dtype=dtype, seed=2, scale=0.2)
    bias = random(3, 64, dtype=dtype, seed=3, scale=0.2) if rank else None
    return kernels.Weights(gate_up, down, WIDTHS, rank, bias)


def a_gate(hidden=64, levels=4, dtype=torch.float32, spread=1.0, first=True, group=1) -> gate_parts.DeviceGate:
    torch.manual_seed(0)
    gate = Gate(hidden, levels - 1)
    gate.proj.weight.data *= 3  # so that tokens differ
    gate.head.weight.data.normal_(std=spread)
    gate.proj.bias.data.normal_()
    gain = torch.linspace(0.3, 0.95, levels - 1)
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    return gate_parts.DeviceGate.make(gate, gain, group, first, like)


NORM = norm_kernels.Norm(random(64, seed=9), 1e-3)


def gated(x, *rest, **named):
    """`kernels.gated_mlp` of states before a norm that add up to x: output and level."""
    norm = NORM._replace(weight=NORM.weight.to(x.dtype))
    out, summed, level = kernels.gated_mlp(0.75 * x, 0.25 * x, norm, *rest, **named)
    assert torch.allclose(summed, x, rtol=1e-2, equal_nan=True)
    return out, level


def normed(x):
    """What the norm makes of these states."""
    return norm_kernels.normed(0.75 * x, 0.25 * x, NORM._replace(weight=NORM.weight.to(x.dtype)))[0]


def price(log_lambda: float):
    return torch.tensor(log_lambda, device=DEVICE)


def padding(tokens: int, padded: int):
    slots = torch.arange(tokens, device=DEVICE)
    slots[tokens - padded :] = -1
    return slots
