"""Gates: each layer decides, token by token, how wide or how precise its MLP runs. The readable twin of what is served.

A gate reads the MLP's input and predicts, for each level below the whole MLP, the marginal damage in nats of narrowing
just this MLP to that level. Levels are of one of two kinds. Shares of neurons: level j keeps the `widths[j]` most important
neurons and adds an adapter for the others. Bits a weight: level j reads rounded weights (precision.py), those of the
`widths[j]` most important neurons in eight bits and the others in four. With one price λ, in nats for a whole MLP's
bytes, the same in all layers, a token takes the level with the least

    damage_j - λ · saved_j        saved_j: share of one MLP's bytes that level j does not read; damage_0 = saved_0 = 0

so that in every layer the last byte saved costs the same damage: Lagrange's condition for the least damage at a given
number of bytes. A decision depends on the token alone and is not latched.

A cascade is the special case in which few gates decide, each for all layers up to the window's end: in the layers after
its checkpoints, and no token that narrowed widens again.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import AdapterBank
from .artifacts import Manifest, replacing
from .cli import SedacError
from .precision import COARSE, FINE, GROUP, SCALE_BITS, WHOLE, RoundedMLP

LEVELS = (1.0, 0.7, 0.35, 0.0)  # shares of the neurons
BITS = (16.0, 8.0, 6.0, 5.0, 4.0)  # a weight
GATE_RANK = 16
BLOCK = 128  # neurons that a GPU kernel computes together: widths are whole blocks
LEAST_LOG_DAMAGE, MOST_LOG_DAMAGE = -14.0, 6.0


def in_bits(levels: Sequence[float]) -> bool:
    """Whether levels are bits a weight, not shares of neurons."""
    return levels[0] == WHOLE


@dataclasses.dataclass(frozen=True)
class GateShape:
    """The sizes of all gates and adapters of a model, and what their levels save."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    levels: tuple[float, ...] = LEVELS  # as asked for: shares of the neurons from 1 on, or bits a weight from 16 on
    adapter_rank: int = 128  # 0 for levels in bits, which need none
    gate_every: int = 1
    checkpoints: tuple[int, ...] = ()  # a cascade: gates lead from the layers after these on, and latch
    keep_last: int = 0  # last layers that always run whole

    def __post_init__(self) -> None:
        if self.bits:
            self._check_bits()
            return
        shares = all(0 <= level < 1 for level in self.levels[1:])
        if not 2 <= len(self.levels) <= 8 or self.levels[0] != 1 or not shares:
            raise SedacError(
                "levels are shares of neurons such as 1,0.7,0.35,0, or bits a weight such as 16,8,6,5,4: levels start with "
                f"1 and go on below it, 8 in all at most, found {self.levels}"
            )
        self._check_falls(self.widths)
        if min(self.saved[1:]) <= 0:
            raise SedacError(
                f"adapters of rank {self.adapter_rank} read more than the levels {self.levels} leave out: "
                "lower --adapter-rank or the first level below 1"
            )

    def _check_bits(self) -> None:
        if not 2 <= len(self.levels) <= 8 or not all(COARSE <= bits <= FINE for bits in self.levels[1:]):
            raise SedacError(
                f"levels in bits start with {WHOLE} and go on from {FINE} to {COARSE}, 8 in all at most, such as 16,8,6,5,4, "
                f"found {self.levels}"
            )
        if self.hidden_size % GROUP or self.intermediate_size % GROUP:
            raise SedacError(
                f"weights are rounded in groups of {GROUP}, which rows of {self.hidden_size} and {self.intermediate_size} "
                "values are no multiples of: give levels as shares of neurons"
            )
        if self.adapter_rank or self.checkpoints:
            raise SedacError("levels in bits have no adapters and no checkpoints: train them with --policy gates")
        self._check_falls(self.widths[1:])

    def _check_falls(self, widths: tuple[int, ...]) -> None:
        if any(a <= b for a, b in itertools.pairwise(widths)):
            raise SedacError(
                f"levels must fall by at least one block of {self.block} of the {self.intermediate_size} neurons, "
                f"found {self.levels}"
            )

    @property
    def bits(self) -> tuple[float, ...]:
        """Bits a weight by level, without the scales of its groups; () where levels are shares of neurons."""
        return self.levels if in_bits(self.levels) else ()

    @property
    def names(self) -> tuple[str, ...]:
        """What users call the levels."""
        return tuple(f"{bits:g} bits" for bits in self.bits) or tuple(f"width {width}" for width in self.widths)

    @property
    def block(self) -> int:
        """Widths are multiples of this: 128 neurons, less where an MLP has not eight such blocks."""
        if self.intermediate_size >= 8 * BLOCK:
            return BLOCK
        return GROUP if self.bits else max(1, self.intermediate_size // 8)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons that each level keeps, or, of levels in bits, reads in more than four; all of them at level 0."""
        shares = [(bits - COARSE) / (FINE - COARSE) for bits in self.bits] or self.levels
        blocks = (round(share * self.intermediate_size / self.block) for share in shares[1:])
        return (self.intermediate_size, *(count * self.block for count in blocks))

    @cached_property
    def saved(self) -> tuple[float, ...]:
        """Share of one MLP's weight bytes that each level does not read, its adapter counted against."""
        if self.bits:
            fine = (width / self.intermediate_size for width in self.widths[1:])
            return (0.0, *(1 - (COARSE + (FINE - COARSE) * share + SCALE_BITS) / WHOLE for share in fine))
        adapter = 3 * self.hidden_size * self.adapter_rank + self.hidden_size
        cost = adapter / self._mlp
        return (0.0, *(1 - width / self.intermediate_size - cost for width in self.widths[1:]))

    @property
    def _mlp(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def gate_cost(self) -> float:
        """One gate's weights as a share of one MLP's."""
        count = len(self.levels) - 1
        return (self.hidden_size * GATE_RANK + GATE_RANK + GATE_RANK * count + count) / self._mlp

    def as_json(self) -> dict[str, Any]:
        """What the manifest records; `shape_of` reads the fields of a shape back."""
        given = {"levels": list(self.levels), "adapter_rank": self.adapter_rank, "gate_every": self.gate_every}
        given |= {"checkpoints": list(self.checkpoints), "keep_last": self.keep_last}
        return {**given, "gate_rank": GATE_RANK, "block": self.block, "widths": list(self.widths)}

    @property
    def leaders(self) -> tuple[int, ...]:
        """Layers with a gate, which decides for the layers up to the next; layer 0 is unlike all others and alone."""
        if self.checkpoints:
            return tuple(checkpoint + 1 for checkpoint in self.checkpoints)
        return (0, *range(1, self.num_layers - self.keep_last, self.gate_every))

    @property
    def latch(self) -> bool:
        """Whether a token that narrowed in one group may not run wider in the next."""
        return bool(self.checkpoints)

    @property
    def window(self) -> range:
        """The layers in which MLPs narrow; all others run whole."""
        return range(self.leaders[0], self.num_layers - self.keep_last)

    def leader_of(self, layer: int) -> int | None:
        """The leader that decides for a layer, None outside the window."""
        return max(leader for leader in self.leaders if leader <= layer) if layer in self.window else None

    def leader_before(self, leader: int) -> int | None:
        """The leader whose level is the least that this one may choose; None without a latch."""
        return max([other for other in self.leaders if other < leader], default=None) if self.latch else None

    def group(self, leader: int) -> range:
        """The layers that run at this leader's level."""
        return range(leader, min([other for other in self.leaders if other > leader], default=self.window.stop))

    def span(self, leader: int) -> range:
        """The layers that a decision to narrow binds: the group, under a latch all to the window's end."""
        return range(leader, self.window.stop) if self.latch else self.group(leader)

    def by_layer(self, levels: Mapping[int, Tensor]) -> Tensor:
        """The levels of each layer `[layers, ...]`, given each leader's `[...]`: 0, the whole MLP, outside the window."""
        whole = torch.zeros_like(levels[self.leaders[0]])
        leaders = map(self.leader_of, range(self.num_layers))
        return torch.stack([whole if leader is None else levels[leader] for leader in leaders])

    def saved_share(self, level_shares: Tensor) -> Tensor:
        """Share of all MLP weight bytes of the model not read, `[...]`, adapters and gates counted against.

        `level_shares` `[..., layers, levels]`: the share of tokens that each layer runs at each level.
        """
        by_layer = sum(share * level_shares[..., level] for level, share in enumerate(self.saved))
        return by_layer.mean(-1) - self.gate_cost * len(self.leaders) / self.num_layers

    def gains(self, device: Any = None) -> dict[int, Tensor]:
        """What `choose` weighs: by leader, how many MLPs' bytes its span saves at each level below 0, `[levels - 1]`."""
        saved = torch.tensor(self.saved[1:], dtype=torch.float32, device=device)
        return {leader: len(self.span(leader)) * saved for leader in self.leaders}


class Gate(nn.Module):
    """Linear(hidden → 16), SiLU, Linear → log marginal damage in nats for each level below the whole MLP.

    `scale` is the root mean square of what the gate reads; training divides by it, `fold` puts it into the weights.
    """

    def __init__(self, hidden_size: int, count: int, scale: float = 1.0):
        super().__init__()
        self.proj = nn.Linear(hidden_size, GATE_RANK)
        self.head = nn.Linear(GATE_RANK, count)
        self.scale = scale
        nn.init.normal_(self.proj.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.proj.bias)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., hidden]`, the MLP's input, any dtype → `[..., levels - 1]` float32."""
        with torch.autocast(x.device.type, enabled=False):  # decisions are float32 whatever the model's type
            log_damage = self.head(F.silu(self.proj(x.float() / self.scale)))
        return log_damage.clamp(LEAST_LOG_DAMAGE, MOST_LOG_DAMAGE)

    @torch.no_grad()
    def fold(self) -> None:
        self.proj.weight /= self.scale
        self.scale = 1.0

    @torch.no_grad()
    def unfold(self, scale: float) -> None:
        self.proj.weight *= scale / self.scale
        self.scale = scale


def choose(log_damage: Tensor, log_lambda: Tensor, gain: Tensor) -> Tensor:
    """The level `[...]`, int64, with the least damage less what it saves at price λ; the whole MLP where none gains.

    `log_damage` `[..., levels - 1]`, `log_lambda` `[...]` or one number, `gain` `[levels - 1]` of `GateShape.gains`.
    """
    cost, level = (log_damage.exp() - log_lambda.exp()[..., None] * gain).min(-1)
    return torch.where(cost < 0, level + 1, 0)


def by_level(run: Sequence[Callable[[Tensor], Tensor]], x: Tensor, level: Tensor, step: int = 1) -> Tensor:
    """`run[j]` of the tokens at level j, gathered so that it sees no others, `[tokens, hidden]`.

    With a `step`, more tokens than it are rounded up to a multiple of it, by neighbours whose results are dropped: where
    every new number of rows costs a compilation there are fewer of them.
    """
    tokens = len(x)
    counts = torch.bincount(level, minlength=len(run)).tolist()
    if tokens in counts:
        return run[counts.index(tokens)](x)
    out, order, start = torch.empty_like(x), level.argsort(stable=True), 0
    for own, count in zip(run, counts, strict=True):
        if count:
            size = min(tokens, -(-count // step) * step) if count > step else count
            first = min(start, tokens - size)
            result = own(x[order[first : first + size]])
            out[order[start : start + count]] = result[start - first :][:count].to(out.dtype)
        start += count
    return out


class Gates(nn.Module):
    """All gates and adapters of one model, and the order of importance of its neurons."""

    def __init__(self, shape: GateShape):
        super().__init__()
        self.shape = shape
        count = len(shape.levels) - 1
        self.banks = nn.ModuleList(  # by layer; there are none outside the window, nor for levels in bits
            AdapterBank(shape.hidden_size, shape.adapter_rank, count)
            if layer in shape.window and not shape.bits
            else nn.Identity()
            for layer in range(shape.num_layers)
        )
        self.gates = nn.ModuleDict({str(layer): Gate(shape.hidden_size, count) for layer in shape.leaders})
        natural = torch.arange(shape.intermediate_size).repeat(shape.num_layers, 1)
        self.register_buffer("order", natural)  # [layers, intermediate], the most important neuron first
        self._rounded: dict[int, tuple[nn.Module, RoundedMLP]] = {}

    def rounded(self, layer: int, mlp: nn.Module) -> RoundedMLP:
        """This layer's MLP by rounded weights; made at the first call, when `order` must be what it will stay."""
        if layer not in self._rounded or self._rounded[layer][0] is not mlp:
            self._rounded[layer] = mlp, RoundedMLP(mlp, self.order[layer])
        return self._rounded[layer][1]

    @property
    def position(self) -> Tensor:
        """Each neuron's place in the order, `[layers, intermediate]`: the inverse permutation."""
        return self.order.argsort(1)

    def save(self, folder: Path) -> None:
        """Write adapters.safetensors: adapters in bfloat16, as served; gates, which decide, in float32."""
        from safetensors.torch import save

        tensors = {f"layers.{layer}.order": order.to(torch.int32) for layer, order in enumerate(self.order)}
        for layer, bank in enumerate(self.banks):
            tensors |= {f"layers.{layer}.adapter.{name}": t.bfloat16() for name, t in bank.state_dict().items()}
        for layer, gate in self.gates.items():
            tensors |= {f"layers.{layer}.gate.{name}": t.float() for name, t in gate.state_dict().items()}
        with replacing(adapters_path(folder)) as temporary:
            temporary.write_bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, device: Any = "cpu") -> "Gates":
        """Read what `save` wrote, checked against the manifest; adapters and gates in float32."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        gates = cls(shape_of(manifest))
        path, train = (
            adapters_path(folder),
            f"train it (python train_multilayer_probes.py --policy {manifest.policy} ...)",
        )
        try:
            found = load_file(path)
        except FileNotFoundError:
            raise SedacError(f"SEDAC adapters are missing: {path}: {train}") from None
        except (SafetensorError, OSError) as error:
            raise SedacError(f"{path} cannot be read ({error}): {train}") from None
        state = {}
        for name in gates.state_dict():
            kind, _, rest = name.partition(".")
            if kind != "order":
                layer, _, rest = rest.partition(".")
                state[name] = f"layers.{layer}.{'adapter' if kind == 'banks' else 'gate'}.{rest}"
        wanted = set(state.values()) | {f"layers.{layer}.order" for layer in range(gates.shape.num_layers)}
        if wanted != found.keys():
            odd = sorted(wanted ^ found.keys())[0]
            raise SedacError(f"{path} does not fit its manifest: tensor {odd} is in only one of them: {train}")
        loaded = {name: found[source].float() for name, source in state.items()}
        try:
            loaded["order"] = torch.stack([found[f"layers.{i}.order"] for i in range(gates.shape.num_layers)]).long()
            gates.load_state_dict(loaded, assign=True)  # in float32 also where torch's default is another type
        except RuntimeError as error:
            raise SedacError(
                f"{path} does not fit its manifest ({str(error).splitlines()[-1].strip()}): {train}"
            ) from None
        if not all(tensor.isfinite().all() for tensor in loaded.values()):
            raise SedacError(f"{path} holds NaN or infinity: {train}")
        natural = torch.arange(gates.order.shape[1], device=gates.order.device)
        if not torch.equal(gates.order.sort(1).values, natural.expand_as(gates.order)):
            raise SedacError(f"{path} holds an order of neurons that is no permutation: {train}")
        return gates.to(device).requires_grad_(False).eval()


def adapters_path(folder: Path) -> Path:
    return folder / "adapters.safetensors"


def shape_of(manifest: Manifest) -> GateShape:
    """The shape of the gates, or of the cascade with adapters, that a manifest names."""
    if not manifest.gates:
        raise SedacError(
            f"this artefact has policy {manifest.policy} and no adapters: "
            "train gates (python train_multilayer_probes.py --policy gates) into a folder of their own"
        )
    fingerprint, gates = manifest.fingerprint, manifest.gates
    try:
        return GateShape(
            fingerprint.hidden_size,
            fingerprint.intermediate_size,
            fingerprint.num_hidden_layers,
            tuple(gates["levels"]),
            gates["adapter_rank"],
            gates["gate_every"],
            tuple(gates.get("checkpoints", ())),
            gates.get("keep_last", 0),
        )
    except (KeyError, TypeError) as error:
        raise SedacError(f"the manifest's record of its gates is incomplete ({error!r}): train them again") from None


def trained_prices(manifest: Manifest) -> dict[float, float]:
    """log λ by the share of bytes that it was trained to save, by rising share."""
    budgets = manifest.gates.get("budgets")
    if not budgets:
        raise SedacError("the manifest names no λ for any budget: train the gates to their end")
    return {budget["saved_bytes"]: budget["log_lambda"] for budget in budgets}
