"""Gates of the tiny model that nobody trained, for the tests of gates."""

import torch

from sedac_core.gates import Gates, GateShape

LEVELS = (1.0, 0.5, 0.25, 0.0)


def random_gates(every=1, seed=0, rank=4, shape=None) -> Gates:
    """Gates of the tiny model that decide and adapt at random."""
    torch.manual_seed(seed)
    gates = Gates(shape or GateShape(64, 128, 6, LEVELS, rank, every))
    with torch.no_grad():
        for parameter in gates.banks.parameters():
            parameter.normal_(std=0.2)
        for gate in gates.gates.values():
            gate.head.weight.normal_()
        gates.order.copy_(torch.rand(6, 128).argsort(1))
    return gates


def cascade(seed=0, levels=LEVELS) -> Gates:
    """A cascade with adapters that decides and adapts at random: checkpoints 0 and 2, the last layer whole."""
    return random_gates(shape=GateShape(64, 128, 6, levels, 4, checkpoints=(0, 2), keep_last=1), seed=seed)
