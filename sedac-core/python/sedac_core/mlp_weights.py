"""An MLP's weights as its kernels read them: its neurons by importance, and behind them those of its adapters."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import AdapterBank
from .precision import GROUP, Planes, planes_of


@dataclasses.dataclass(frozen=True)
class Weights:
    """An MLP's weights, its adapters' neurons behind its own."""

    gate_up: Tensor  # [2 · neurons + 2 · adapters, hidden]: the MLP's gate and up rows, then all adapters'
    down: Tensor  # [hidden, neurons + adapters]
    widths: tuple[int, ...] = ()  # neurons that each level runs; () is one level, the whole MLP
    rank: int = 0  # neurons of one adapter; every level but the first has one
    bias: Tensor | None = None  # [levels - 1, hidden], the adapters'
    # Of the gate and up rows, then of down: the neurons by importance, all of which every level but the first reads, its width of
    # them by both planes. Without adapters.
    planes: tuple[Planes, Planes] | None = None

    def __post_init__(self) -> None:
        if not self.widths:
            object.__setattr__(self, "widths", (self.down.shape[1],))
        hidden_size, adapters = len(self.down), self.adapters
        assert self.gate_up.shape == (2 * (self.neurons + adapters), hidden_size)
        assert self.down.shape == (hidden_size, self.neurons + adapters)
        assert self.gate_up.is_contiguous() and self.down.is_contiguous() and self.gate_up.dtype == self.down.dtype
        assert (self.bias is None) == (self.rank == 0)
        if self.bias is not None:
            assert self.bias.shape == (self.levels - 1, hidden_size) and self.bias.is_contiguous()
        if self.planes is not None:
            assert self.rank == 0 and all(width % GROUP == 0 for width in self.widths), self.widths
            for own, (rows, depth) in zip(self.planes, (self.gate_up.shape, self.down.shape), strict=True):
                assert own.high.shape == own.low.shape == (rows, depth // 2)
                assert own.scale.shape == (rows, depth // GROUP, 2) and depth % GROUP == 0
                assert all(part.is_contiguous() for part in (own.high, own.low, own.scale))

    @property
    def levels(self) -> int:
        return len(self.widths)

    @property
    def neurons(self) -> int:
        return self.widths[0]

    @property
    def adapters(self) -> int:
        """Neurons of all adapters."""
        return self.rank * (self.levels - 1)

    @classmethod
    def narrowed(
        cls, gate_up: Tensor, down: Tensor, order: Tensor, bank: AdapterBank, widths: Sequence[int], multiple: int = 128
    ) -> "Weights":
        """New weights with the neurons in this order, `[neurons]`, and a bank's adapters.

        gate_up `[2 · neurons, hidden]`, down `[hidden, neurons]`: an MLP's own, its neurons in their natural order. An
        adapter's rank is rounded up to `multiple` with neurons of zeros.
        """
        neurons, hidden_size, levels = down.shape[1], len(down), len(widths)
        rank = -(-bank.rank // multiple) * multiple
        adapters = rank * (levels - 1)
        both = gate_up.new_zeros(2 * (neurons + adapters), hidden_size)
        across = down.new_zeros(hidden_size, neurons + adapters)
        torch.index_select(gate_up[:neurons], 0, order, out=both[:neurons])
        torch.index_select(gate_up[neurons:], 0, order, out=both[neurons : 2 * neurons])
        across[:, :neurons] = down[:, order]
        for level in range(1, levels):
            gate, up, out, _ = bank.own(level)
            start = 2 * neurons + (level - 1) * rank
            both[start : start + bank.rank] = gate
            both[start + adapters : start + adapters + bank.rank] = up
            start = neurons + (level - 1) * rank
            across[:, start : start + bank.rank] = out
        return cls(both, across, tuple(widths), rank, bank.bias.to(down).contiguous())

    @classmethod
    def rounded(cls, gate_up: Tensor, down: Tensor, order: Tensor, widths: Sequence[int]) -> "Weights":
        """An MLP's own weights, as they are, and new planes of them with the neurons in this order, `[neurons]`.

        gate_up `[2 · neurons, hidden]`, down `[hidden, neurons]`; widths: the neurons that each level reads by both planes.
        """
        return cls(gate_up, down, tuple(widths), planes=planes_of(gate_up, down, order))
