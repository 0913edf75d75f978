"""Every SEDAC_* environment variable, read and validated in this one place.

The patched vLLM and the launcher read `Settings.from_env()`; the README's table is compared with `VARIABLES` by a test.
A field that is None was not set: the artefact's manifest decides, and without one the default of `DEFAULTS`.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

from .cli import SedacError, float_list, layer_list

EXIT_MODES = ("hard", "soft", "gates")

# Thresholds by checkpoint that the README names; the entropy probes' risk is in nats.
PRESETS = {
    "conservative": (0.7, 0.8, 0.9),
    "balanced": (0.8, 1.0, 1.2),
    "aggressive": (1.0, 1.3, 1.7),
}


@dataclasses.dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its default as a user types it, its meaning."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable("SEDAC_ENABLED", "0", "1 switches SEDAC on in a patched vLLM; otherwise it builds stock's graph"),
    Variable("SEDAC_PROBE_LAYERS", "7,14,21", "checkpoints: layers after which a probe reads the residual stream"),
    Variable("SEDAC_PROBE_DIR", "./sedac_data", "folder of the probes and their manifest"),
    Variable("SEDAC_PROBE_RANK", "64", "rank of the probes"),
    Variable("SEDAC_ADAPTIVE", "1", "1 lets the thresholds follow SEDAC_EXIT_RATES; 0 when SEDAC_THRESHOLDS is set"),
    Variable("SEDAC_THRESHOLDS", "0.8,1.3,1.7", "risk under which a token exits, by checkpoint; inf exits all, 0 none"),
    Variable("SEDAC_EXIT_RATES", "0.2,0.6,0.9", "adaptive: share of tokens to have exited by each checkpoint"),
    Variable("SEDAC_CALIBRATION_STEPS", "50", "adaptive: forward steps that only observe, before the first exit"),
    Variable("SEDAC_LOG_EVERY", "50", "log the counters every so many decisions (forward steps); 0 never"),
    Variable(
        "SEDAC_EXIT_MODE",
        "hard",
        "policy: hard skips an exited token's MLPs, soft narrows them, gates narrows each MLP by itself; must be the manifest's",
    ),
    Variable("SEDAC_LAMBDA", "the manifest's", "gates: log λ, the logarithm of the price, as the manifest stores it"),
    Variable(
        "SEDAC_GAMMA", "0", "γ, the share of accumulated confidence kept from one checkpoint to the next; 0 is V6.0"
    ),
    Variable("SEDAC_WEIGHTS", "1,1,1", "weight of each checkpoint in the accumulated confidence"),
    Variable("SEDAC_LEVEL", "0.5", "share of the greatest possible confidence at which a token exits"),
    Variable("SEDAC_KEEP_LAST", "2", "last layers that always run whole"),
    Variable("SEDAC_ADAPTIVE_ALPHA", "0.2", "adaptive: weight of the newest quantile in the thresholds' EMA"),
    Variable("SEDAC_ADAPTIVE_WINDOW", "8192", "adaptive: tokens that the risk quantiles look back on"),
    Variable("SEDAC_ADMIN", "off", "the admin call: off, loopback, or anywhere; the launcher's --admin sets it"),
)
DEFAULTS = {variable.name: variable.default for variable in VARIABLES}


@dataclasses.dataclass(frozen=True)
class Settings:
    """SEDAC's settings; fields left None come from the manifest, else from the defaults."""

    enabled: bool = False
    probe_dir: Path = Path("./sedac_data")
    layers: tuple[int, ...] | None = None
    rank: int | None = None
    adaptive: bool = True
    thresholds: tuple[float, ...] | None = None
    exit_rates: tuple[float, ...] = (0.2, 0.6, 0.9)
    calibration_steps: int = 50
    log_every: int = 50
    exit_mode: str | None = None
    log_lambda: float | None = None
    gamma: float | None = None
    weights: tuple[float, ...] | None = None
    level: float | None = None
    keep_last: int | None = None
    adaptive_alpha: float = 0.2
    adaptive_window: int = 8192
    admin: str = "off"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the variables; raises `SedacError` naming the variable, the value found and what is expected."""
        unknown = sorted(name for name in environ if name.startswith("SEDAC_") and name not in DEFAULTS)
        if unknown:
            raise SedacError(f"unknown variable {unknown[0]}: SEDAC knows {', '.join(DEFAULTS)}")

        def read(name, convert, test, expected, optional=False):
            text = environ.get(name, "").strip()
            if not text and optional:
                return None
            text = text or DEFAULTS[name]
            try:
                value = convert(text)
            except (ValueError, argparse.ArgumentTypeError):
                value = None
            if value is None or not test(value):
                raise SedacError(f"{name} must be {expected}, found {text!r}")
            return value

        def flag(name):
            return read(name, {"0": False, "1": True}.get, lambda v: True, "0 or 1")

        def all_in(low, high):
            return lambda values: all(low <= v <= high for v in values)

        inf = float("inf")
        thresholds = read(
            "SEDAC_THRESHOLDS", float_list, all_in(0, inf), "numbers from 0 on, such as 0.8,1.3,1.7", True
        )
        adaptive = flag("SEDAC_ADAPTIVE") if environ.get("SEDAC_ADAPTIVE", "").strip() else thresholds is None
        rates = read(
            "SEDAC_EXIT_RATES",
            float_list,
            lambda v: all_in(0, 1)(v) and list(v) == sorted(v),
            "shares from 0 to 1 that do not fall, such as 0.2,0.6,0.9",
        )
        settings = cls(
            enabled=flag("SEDAC_ENABLED"),
            probe_dir=Path(environ.get("SEDAC_PROBE_DIR") or DEFAULTS["SEDAC_PROBE_DIR"]),
            layers=read("SEDAC_PROBE_LAYERS", layer_list, bool, "layers that rise, such as 7,14,21", True),
            rank=read("SEDAC_PROBE_RANK", int, lambda v: v > 0, "a positive whole number", True),
            adaptive=adaptive,
            thresholds=thresholds,
            exit_rates=rates,
            calibration_steps=read("SEDAC_CALIBRATION_STEPS", int, lambda v: v >= 0, "a whole number from 0 on"),
            log_every=read("SEDAC_LOG_EVERY", int, lambda v: v >= 0, "a whole number from 0 on"),
            exit_mode=read("SEDAC_EXIT_MODE", str, EXIT_MODES.__contains__, " or ".join(EXIT_MODES), True),
            log_lambda=read("SEDAC_LAMBDA", float, math.isfinite, "log λ, a finite number such as -6.5", True),
            gamma=read("SEDAC_GAMMA", float, lambda v: 0 <= v < inf, "a number from 0 on", True),
            weights=read("SEDAC_WEIGHTS", float_list, all_in(1e-6, 1e6), "positive numbers such as 1,1,1", True),
            level=read("SEDAC_LEVEL", float, lambda v: 0 < v < 1, "a number between 0 and 1", True),
            keep_last=read("SEDAC_KEEP_LAST", int, lambda v: v >= 0, "a whole number from 0 on", True),
            adaptive_alpha=read("SEDAC_ADAPTIVE_ALPHA", float, lambda v: 0 < v <= 1, "a number over 0, at most 1"),
            adaptive_window=read("SEDAC_ADAPTIVE_WINDOW", int, lambda v: v > 0, "a positive whole number"),
            admin=read("SEDAC_ADMIN", str, ("off", "loopback", "anywhere").__contains__, "off, loopback or anywhere"),
        )
        return settings


def check_lengths(layers: tuple[int, ...], **lists: tuple | None) -> None:
    """Refuse a list that has not one entry a checkpoint; `lists` maps a name to a list or None."""
    for name, values in lists.items():
        if values is not None and len(values) != len(layers):
            raise SedacError(
                f"{name} has {len(values)} values ({','.join(map(str, values))}) for {len(layers)} checkpoints "
                f"({','.join(map(str, layers))}): give one value for each checkpoint"
            )
