"""The policy `gates`: in each layer or group of layers a gate decides, token by token, how wide its MLPs run.

There are no checkpoints and there is no latch: what a token does in one layer says nothing about the next group. The
policies `hard` and `soft` with adapters are gates too: few, in the layers after checkpoints, and with a latch. What serves
beside the artefact is one number, the price λ.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .artifacts import Manifest
from .cli import SedacError
from .gates import Gates, GateShape, choose
from .settings import Settings

HOPPER = (9, 0)  # compute capability of the GPUs that the kernels were made for
USUAL_BUDGET = 0.25  # share of MLP bytes to save where nobody calibrated a price
PRESET_SHARES = {
    "conservative": 0.12,
    "balanced": 0.25,
    "aggressive": 0.4,
}  # of MLP bytes to save: what requests may choose
CALIBRATE = "calibrate it (python sedac_calibrate.py --probe-dir FOLDER --max-damage 0.02) or set SEDAC_LAMBDA"


@dataclasses.dataclass
class GatedWidths:
    """Gates and adapters of one model at one price, on the CPU until a runtime takes them.

    `prices` `[1 + choices]` holds log λ: entry 0 the one in force, which `log_lambda` is a view of, and one for each entry
    of `choices`, which a request may ask for by name. They may be overwritten in place while a server runs.
    """

    gates: Gates
    log_lambda: Tensor  # [], float32
    source: str  # 'SEDAC_LAMBDA', 'certified', 'calibrated' or 'budget'
    bounds: list[dict[str, Any]]  # the certificate: what step 8 certified for this price
    name: str = "gates"  # or 'hard' or 'soft': a cascade with adapters
    choices: dict[str, float] = dataclasses.field(default_factory=lambda: {"off": -math.inf})  # off: all MLPs whole
    withheld: tuple[str, ...] = ()  # presets that are not offered, as their prices lie above the certified one

    def __post_init__(self) -> None:
        self.gains = self.shape.gains("cpu")
        # The greatest log λ for which the bounds hold.
        self.certified = float(self.log_lambda) if self.source == "certified" else None
        prices = [float(self.log_lambda), *self.choices.values()]
        self.prices = torch.tensor(prices, dtype=torch.float32, device="cpu")
        self.move_prices("cpu")

    def move_prices(self, device: Any) -> None:
        self.prices = self.prices.to(device)
        self.log_lambda = self.prices[0]

    @property
    def shape(self) -> GateShape:
        return self.gates.shape

    def graph_key(self) -> dict[str, Any]:
        """Whatever of this policy is built into a traced graph: part of the key of vLLM's compile cache."""
        window = [self.shape.window.start, self.shape.window.stop]
        return {"policy": self.name, "leaders": list(self.shape.leaders), "window": window}

    def level(self, leader: int, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The level `[tokens]`, int64, at which each token runs the MLPs of a group, x `[tokens, hidden]` being the
        input of its leader's, a latch being for the caller to apply; `chosen` `[tokens]`, int32, is each token's entry of the
        prices, None entry 0 for all."""
        price = self.log_lambda if chosen is None else self.prices[chosen]
        return choose(self.gates.gates[str(leader)](x), price, self.gains[leader])

    def describe(self, settings: Settings) -> str:
        """One line for the log and the launcher."""
        shape = self.shape
        levels = f"MLP widths {', '.join(map(str, shape.widths))}"
        if shape.bits:
            levels = f"MLP weights of {', '.join(f'{bits:g}' for bits in shape.bits)} bits"
        where = f"gates in {len(shape.leaders)} of {shape.num_layers} layers"
        if shape.latch:
            where = f"{self.name} cascade with adapters, checkpoints {shape.checkpoints}, window layers "
            where += f"{shape.window.start} to {shape.window.stop - 1}"
        return (
            f"{where}, {levels}, log λ {self.log_lambda.item():.4g} ({self.source}){promise(self.bounds)}"
            f"{not_offered(self.withheld)}"
        )

    @property
    def warning(self) -> str | None:
        """What a user should know before trusting this policy."""
        if self.source == "budget":
            return f"the price was never calibrated, using training's for about {USUAL_BUDGET:.0%} of MLP bytes: {CALIBRATE}"
        return None


def promise(bounds: Sequence[Mapping[str, Any]]) -> str:
    """The rest of a line that says what is certified."""
    return "".join(
        f"; certified with confidence {bound['confidence']:g}: {bound['loss']} is under {bound['bound']:g}"
        for bound in bounds
    )


def not_offered(presets: Sequence[str]) -> str:
    """The rest of a line that says which presets a certificate keeps from requests."""
    return f"; beyond the certificate and not offered to requests: {', '.join(presets)}" if presets else ""


def load_gates(settings: Settings, manifest: Manifest) -> GatedWidths:
    """The gates in the settings' folder at the price that SEDAC_LAMBDA, calibration or training names, in this order."""
    for name, value in {
        "SEDAC_PROBE_LAYERS": settings.layers,
        "SEDAC_PROBE_RANK": settings.rank,
        "SEDAC_THRESHOLDS": settings.thresholds,
        "SEDAC_GAMMA": settings.gamma,
        "SEDAC_WEIGHTS": settings.weights,
        "SEDAC_LEVEL": settings.level,
        "SEDAC_KEEP_LAST": settings.keep_last,
    }.items():
        if value is not None:
            raise SedacError(
                f"{name} is a plain cascade's, and {settings.probe_dir} holds adapters: unset it (SEDAC_LAMBDA steers them)"
            )
    gates = Gates.load(settings.probe_dir, manifest)
    source, log_lambda, bounds = _price(settings, manifest)
    price = torch.tensor(log_lambda, dtype=torch.float32, device="cpu")
    choices, withheld = gate_choices(settings, manifest)
    return GatedWidths(gates, price, source, bounds, manifest.policy, choices, withheld)


def gate_choices(settings: Settings, manifest: Manifest) -> tuple[dict[str, float], tuple[str, ...]]:
    """log λ by the name that a request may ask for, and the presets that the certificate in force rules out."""
    source, certified, _ = _price(settings, manifest)
    limit = certified if source == "certified" else math.inf
    try:
        known = manifest.gates.get("presets", {})
        prices = {name: float(known[name]["log_lambda"]) for name in PRESET_SHARES if name in known}
        if not all(map(math.isfinite, prices.values())):
            raise ValueError(prices)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SedacError(
            f"the manifest in {settings.probe_dir} holds no usable presets ({error!r}): calibrate again (python "
            "sedac_calibrate.py)"
        ) from None
    offered = {name: price for name, price in prices.items() if price <= limit}
    return {"off": -math.inf, **offered}, tuple(name for name in prices if name not in offered)


def _price(settings: Settings, manifest: Manifest) -> tuple[str, float, list[dict[str, Any]]]:
    """Where log λ comes from, in a word, what it is, and the bounds certified for it."""
    if settings.log_lambda is not None:
        return "SEDAC_LAMBDA", settings.log_lambda, []
    try:
        if "log_lambda" in manifest.calibration:
            certified = manifest.calibration["certified"]
            bounds = manifest.calibration["bounds"] if certified else []
            return "certified" if certified else "calibrated", float(manifest.calibration["log_lambda"]), bounds
        nearest = min(manifest.gates["budgets"], key=lambda budget: abs(budget["saved_bytes"] - USUAL_BUDGET))
        return "budget", float(nearest["log_lambda"]), []
    except (KeyError, TypeError, ValueError) as error:
        raise SedacError(
            f"the manifest in {settings.probe_dir} holds no usable price λ ({error!r}): {CALIBRATE}"
        ) from None


def check_gates_supported(vllm_config: Any) -> None:
    """Refuse what gates cannot run on yet."""
    off = "or unset SEDAC_ENABLED"
    device = vllm_config.device_config.device_type
    if device not in ("cpu", "cuda"):
        raise SedacError(f"gates are served on CPUs and NVIDIA GPUs only, not on {device}: choose one of these {off}")
    if vllm_config.quant_config is not None:
        raise SedacError(
            f"gates need plain weights, found {vllm_config.quant_config.get_name()}: serve the unquantised model {off}"
        )
    if vllm_config.lora_config is not None:
        raise SedacError(f"gates do not support LoRA yet: start without --enable-lora {off}")
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        raise SedacError(f"gates do not support tensor parallelism yet: set --tensor-parallel-size 1 {off}")
    if device == "cuda":
        dtype = vllm_config.model_config.dtype
        if dtype not in (torch.bfloat16, torch.float16):
            raise SedacError(f"gates on a GPU need bfloat16 or float16, found {dtype}: set --dtype bfloat16 {off}")
        check_gpu()


def check_gpu() -> None:
    """Refuse an NVIDIA GPU that the kernels of gates were not made for."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability != HOPPER:
        found = ".".join(map(str, capability)) if capability else "no GPU"
        raise SedacError(
            f"gates run on Hopper GPUs (compute capability 9.0), found {found}: set SEDAC_PROBE_DIR to a folder of probes "
            "(policy hard) or unset SEDAC_ENABLED"
        )
