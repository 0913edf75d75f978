"""The probe: a small network that reads a token's residual stream and estimates the risk of exiting there."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LREProbe(nn.Module):
    """Low-rank entropy probe: Linear(hidden → rank), LayerNorm(rank), Linear(rank → 1), Softplus.

    Reads the residual stream after a layer, `[..., hidden]`, any dtype; returns the risk `[...]` in float32,
    non-negative, in the unit of its target (nats for entropy and damage alike).
    """

    def __init__(self, hidden_size: int, rank: int = 64):
        super().__init__()
        self.proj = nn.Linear(hidden_size, rank)
        self.norm = nn.LayerNorm(rank)
        self.head = nn.Linear(rank, 1)

    @property
    def hidden_size(self) -> int:
        return self.proj.in_features

    @property
    def rank(self) -> int:
        return self.proj.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        # Functions, not the modules: on a CPU a module's call takes longer than a few tokens do.
        low = F.linear(hidden.float(), self.proj.weight, self.proj.bias)
        low = F.layer_norm(low, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        return F.softplus(F.linear(low, self.head.weight, self.head.bias).squeeze(-1))


def probe_from_state(state: dict[str, Tensor]) -> LREProbe:
    """Build a probe from its state dict, sizes read off its tensors; ValueError names an odd tensor."""
    weight = state.get("proj.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError("it has no two-dimensional proj.weight")
    rank, hidden_size = weight.shape
    with torch.device("meta"):
        probe = LREProbe(hidden_size, rank)
    wanted = {name: tensor.shape for name, tensor in probe.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if wanted != found:
        raise ValueError(f"its tensors {found} are not a probe's {wanted}")
    odd = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if odd:
        raise ValueError(f"{odd[0]} holds NaN or infinity")
    probe.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return probe.eval().requires_grad_(False)


def risks_of(probe: LREProbe, hidden: Tensor, chosen: Tensor) -> Tensor:
    """The risks `[chosen tokens]`, float32, of the tokens chosen by a mask `[num_tokens]` from hidden states
    `[num_tokens, hidden]`, which may be memory-mapped: they are read in pieces."""
    with torch.inference_mode():
        return torch.cat([probe(hidden[rows]) for rows in chosen.nonzero().squeeze(1).split(8192)])
