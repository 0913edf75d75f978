"""Policies: what turns a token's residual stream into a width for each later MLP.

vLLM's runtime asks a policy three things: where its checkpoints are, what state a checkpoint leaves behind, and in which
layers that state narrows the MLP. A state is `Exits`: the tokens in the order in which a kernel wants them (rows), and how
many of them run each block of an MLP's neurons (n_running). A hard exit knows one block, the whole MLP; soft exits will
hold one count for each block of neurons. Gates, which have no checkpoints, are a policy of their own (policy_gates.py).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .artifacts import Manifest, check_layers, load_probe, probe_path
from .cascade import critical_threshold, margin_step
from .cli import SedacError, float_list, layer_list
from .policy_gates import GatedWidths, gate_choices, load_gates, not_offered, promise
from .probe import LREProbe
from .settings import DEFAULTS, EXIT_MODES, PRESETS, Settings, check_lengths

INF = math.inf


class Exits(NamedTuple):
    """Which tokens still run, as one checkpoint leaves it to the layers after it."""

    margin: Tensor  # [tokens], float32: accumulated confidence less the exit level; inf once a token has exited
    rows: Tensor  # [tokens], int64: token indices, the running ones first
    n_running: Tensor  # [blocks], int32: how many of `rows` run each block of neurons
    running: Tensor | None = None  # on a GPU, [tokens], bool: whether a token runs


@dataclasses.dataclass
class HardExit:
    """The cascade: probes at a few checkpoints, confidence accumulated, one latch, width 0 after the exit.

    Takes and returns tensors on the probes' device. `table` `[1 + choices, checkpoints]` holds all thresholds: row 0 those
    in force, which `thresholds` is a view of, and a row for each entry of `choices`, which a request may ask for by name.
    All of them may be overwritten in place while a server runs.
    """

    checkpoints: tuple[int, ...]
    probes: tuple[LREProbe, ...]
    thresholds: Tensor  # [checkpoints], float32
    gamma: float
    weights: tuple[float, ...]
    level: float
    keep_last: int
    num_layers: int
    threshold_source: str  # 'SEDAC_THRESHOLDS', 'manifest', 'certified', 'default' or 'adaptive'
    choices: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    certified: tuple[float, ...] | None = None  # the greatest thresholds for which the bounds hold
    bounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the certificate: what step 8 certified
    withheld: tuple[str, ...] = ()  # presets that are not offered, as their thresholds exceed the certified ones

    def __post_init__(self) -> None:
        chosen = [float32(row).to(self.thresholds.device) for row in self.choices.values()]
        self.table = torch.stack([self.thresholds, *chosen])
        self.thresholds = self.table[0]

    @property
    def window(self) -> range:
        """The layers in which an exited token may skip its MLP."""
        return range(self.checkpoints[0] + 1, self.num_layers - self.keep_last)

    def graph_key(self) -> dict[str, Any]:
        """Whatever of this policy is built into a traced graph: part of the key of vLLM's compile cache."""
        return {
            "policy": "hard",
            "checkpoints": list(self.checkpoints),
            "rule": [self.gamma, self.level, *self.weights],
            "window": [self.window.start, self.window.stop],
        }

    def describe(self, settings: Settings) -> str:
        """One line for the log and the launcher."""
        source = self.threshold_source
        if source == "adaptive":
            source = f"adaptive to exit rates {settings.exit_rates} after {settings.calibration_steps} steps"
            if self.certified is not None:
                source += f", at most [{', '.join(f'{limit:g}' for limit in self.certified)}]"
        return (
            f"checkpoints {self.checkpoints}, window layers {self.window.start} to {self.window.stop - 1}, "
            f"thresholds {self.thresholds.tolist()} ({source}){promise(self.bounds)}{not_offered(self.withheld)}"
        )

    @property
    def warning(self) -> str | None:
        """What a user should know before trusting this policy."""
        if self.threshold_source == "default":
            return "the manifest holds no thresholds, using the defaults: calibrate (sedac_calibrate.py)"
        return None

    def to(self, device: torch.device) -> "HardExit":
        self.table = self.table.to(device)
        self.thresholds = self.table[0]
        self.probes = tuple(probe.to(device) for probe in self.probes)
        return self

    def step(
        self, index: int, stream: Tensor, margin: Tensor | None, threshold: Tensor | None = None
    ) -> tuple[Tensor, Exits]:
        """Checkpoint `index` reads the residual stream `[tokens, hidden]` and decides for each token by itself.

        `margin` is the state the checkpoint before left, None at the first. `threshold` `[tokens]` is each token's own; None is the
        one in force for all. Returns the risk `[tokens]` and what the layers after it need to know. Without a branch on data,
        so that a graph can be traced through it.
        """
        risk = self.probes[index](stream)
        threshold = self.thresholds[index] if threshold is None else threshold
        before = 0.0 if margin is None else margin
        after = margin_step(risk, threshold, before, self.gamma, self.weights[index], self.level)
        running = ~(after > 0)
        if margin is not None:
            running = running & (margin < INF)
        order, n_running = running_first(running)
        return risk, Exits(torch.where(running, after, INF), order, n_running)

    def critical(self, index: int, risk: Tensor, before: Tensor | float) -> Tensor:
        """The threshold over which each token would exit at this checkpoint, `[tokens]`."""
        return critical_threshold(risk, before, self.gamma, self.weights[index], self.level)


def running_first(running: Tensor) -> tuple[Tensor, Tensor]:
    """Token indices `[tokens]`, int64, the running ones first and each kind in its order, and the number of running
    ones `[1]`, int32."""
    before = running.cumsum(0)
    n_running = before[-1:]
    tokens = torch.arange(len(running), device=running.device)
    place = torch.where(running, before - 1, n_running + tokens - before)
    return torch.empty_like(tokens).scatter_(0, place, tokens), n_running.int()


def load_policy(settings: Settings, config: Any) -> HardExit | GatedWidths:
    """The policy of the artefact at hand, as settings, manifest and defaults, in this order, set it up.

    Which policy is the manifest's to say; SEDAC_EXIT_MODE can only confirm it, since each needs files of its own. Without a
    manifest it is `hard`. `SedacError` for a missing or unusable artefact, one of another model or policy, or settings
    that do not fit each other.
    """
    folder = settings.probe_dir
    if not (folder / "manifest.json").exists():
        if settings.exit_mode == "gates":
            raise SedacError(
                f"no manifest.json in {folder}: train gates (python train_multilayer_probes.py --policy gates "
                f"--data-dir {folder}) or set SEDAC_PROBE_DIR"
            )
        layers = settings.layers or layer_list(DEFAULTS["SEDAC_PROBE_LAYERS"])
        for layer in layers:
            if not probe_path(folder, layer).is_file():
                load_probe(folder, layer, config.hidden_size)  # refuses, with the sentence that says what to do
    manifest = Manifest.load(folder)
    mode = settings.exit_mode or manifest.policy
    if mode != manifest.policy:
        raise SedacError(
            f"SEDAC_EXIT_MODE is {mode}, and {folder} holds an artefact of policy {manifest.policy}: "
            f"unset SEDAC_EXIT_MODE, or set SEDAC_PROBE_DIR to a folder trained for {mode}"
        )
    if mode not in EXIT_MODES:
        raise SedacError(f"{folder} holds an artefact of policy {mode}: this SEDAC serves {', '.join(EXIT_MODES)}")
    manifest.check_model(config)
    if mode != "hard" or manifest.gates:
        return load_gates(settings, manifest)
    if settings.log_lambda is not None:
        raise SedacError(f"SEDAC_LAMBDA is for gates, and {folder} holds probes of a plain cascade: unset it")

    checkpoints = settings.layers or manifest.checkpoints
    gamma = manifest.gamma if settings.gamma is None else settings.gamma
    level = manifest.level if settings.level is None else settings.level
    keep_last = manifest.keep_last if settings.keep_last is None else settings.keep_last
    weights = settings.weights
    if weights is None:
        weights = (
            manifest.weights if manifest.weights and checkpoints == manifest.checkpoints else (1.0,) * len(checkpoints)
        )
    check_layers(checkpoints, config.num_hidden_layers, keep_last)
    probes = tuple(load_probe(folder, layer, config.hidden_size, settings.rank) for layer in checkpoints)
    source, thresholds = _thresholds(settings, manifest, checkpoints)
    check_lengths(
        checkpoints,
        SEDAC_WEIGHTS=weights,
        SEDAC_THRESHOLDS=thresholds,
        SEDAC_EXIT_RATES=settings.exit_rates if settings.adaptive else None,
    )
    names, withheld = cascade_choices(settings, manifest)
    limits = certified_thresholds(settings, manifest)
    return HardExit(
        checkpoints,
        probes,
        float32(thresholds),
        gamma,
        weights,
        level,
        keep_last,
        config.num_hidden_layers,
        "certified" if limits is not None and source == "manifest" else source,
        {name: CHOICES[name](len(checkpoints)) for name in names},
        limits,
        manifest.calibration["bounds"] if limits is not None else [],
        withheld,
    )


CHOICES: dict[str, Callable[[int], tuple[float, ...]]] = {
    "off": lambda checkpoints: (0.0,) * checkpoints,  # nothing exits
    **{name: lambda _, row=row: row for name, row in PRESETS.items()},
}


def choices(settings: Settings, manifest: Manifest) -> tuple[str, ...]:
    """What a request may ask for by name: `off`, and the presets where they mean something."""
    return tuple(gate_choices(settings, manifest)[0]) if manifest.gates else cascade_choices(settings, manifest)[0]


def cascade_choices(settings: Settings, manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same for a plain cascade: presets are for entropy read at three checkpoints. And the presets that exceed the
    certificate in force."""
    if manifest.target != "entropy" or len(settings.layers or manifest.checkpoints) != 3:
        return ("off",), ()
    limits = certified_thresholds(settings, manifest)
    beyond = tuple(name for name, row in PRESETS.items() if limits is not None and exceed(row, limits))
    return ("off", *(name for name in PRESETS if name not in beyond)), beyond


def exceed(thresholds: Sequence[float], limits: Sequence[float]) -> bool:
    return bool((float32(thresholds) > float32(limits)).any())


def float32(values: Sequence[float]) -> Tensor:
    """As a threshold is compared, also where a server has made another type or device the default."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def certified_thresholds(settings: Settings, manifest: Manifest) -> tuple[float, ...] | None:
    """The thresholds of the certificate in force: the manifest's, where nothing else of the rule was set otherwise."""
    rule = {name: getattr(manifest, name) for name in ("gamma", "weights", "level", "keep_last")}
    other = any(getattr(settings, name) not in (None, value) for name, value in rule.items())
    if settings.thresholds is not None or settings.layers not in (None, manifest.checkpoints) or other:
        return None
    known = all(layer in manifest.thresholds for layer in manifest.checkpoints)
    if not (known and manifest.calibration.get("certified") and manifest.calibration.get("bounds")):
        return None
    return tuple(float32([manifest.thresholds[layer] for layer in manifest.checkpoints]).tolist())


def _thresholds(settings: Settings, manifest: Manifest, checkpoints: tuple[int, ...]) -> tuple[str, tuple[float, ...]]:
    """Where the thresholds come from, in a word, and what they are."""
    if settings.adaptive:  # what is observed replaces them before the first exit
        return "adaptive", settings.thresholds or (0.0,) * len(checkpoints)
    if settings.thresholds is not None:
        return "SEDAC_THRESHOLDS", settings.thresholds
    if all(layer in manifest.thresholds for layer in checkpoints):
        return "manifest", tuple(manifest.thresholds[layer] for layer in checkpoints)
    defaults = float_list(DEFAULTS["SEDAC_THRESHOLDS"])
    if manifest.target != "entropy":
        raise SedacError(
            f"no thresholds are set for probes that estimate {manifest.target}, and the default ones are for entropy: "
            "calibrate them (python sedac_calibrate.py), or set SEDAC_THRESHOLDS"
        )
    if len(defaults) != len(checkpoints):
        raise SedacError(
            f"no thresholds for checkpoints {','.join(map(str, checkpoints))}: set SEDAC_THRESHOLDS, "
            "or calibrate them (python sedac_calibrate.py)"
        )
    return "default", defaults
