"""Step 5: serve a model with SEDAC on vLLM's OpenAI-compatible server.

    python sedac_start_server.py --model Qwen/Qwen2.5-3B-Instruct --port 8000 --sedac-layer 21 --sedac-threshold 0.45
    python sedac_start_server.py --model default --presets conservative -- --max-model-len 2048 --dtype float32
    python sedac_start_server.py --model default --probe-dir my_gates -- --max-model-len 2048 --dtype float32

Checks the patch (in vLLM's file, or applied in memory by SEDAC's plugin), the probes and the model before anything heavy, prints what SEDAC will do, the environment and the command,
and becomes vLLM's server (exec): Ctrl-C and SIGTERM reach vLLM itself. Whatever stands after -- goes to vLLM. Without
--sedac-threshold, --presets or --exit-rates the thresholds are the manifest's; with --exit-rates they follow the load. A folder
of gates is served as gates, at the manifest's price or --sedac-lambda.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sedac_core import cli, demo_model, serving, vllm_patch
from sedac_core.cli import SedacError
from sedac_core.settings import PRESETS, Settings

if TYPE_CHECKING:
    from sedac_core.policy import GatedWidths, HardExit

METRICS_ROOM = 16 << 20  # bytes: a few files of 1 MiB for each of vLLM's processes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="model folder, hub name, or 'default' (the embedded model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    parser.add_argument("--probe-dir", type=Path, help="folder of probes and manifest (SEDAC_PROBE_DIR)")
    parser.add_argument("--sedac-layer", type=cli.layer_list, metavar="LAYERS", help="checkpoints (SEDAC_PROBE_LAYERS)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--sedac-threshold",
        type=cli.float_list,
        metavar="THRESHOLDS",
        help="one for each checkpoint (SEDAC_THRESHOLDS)",
    )
    source.add_argument("--presets", choices=PRESETS, help="thresholds by name, for three checkpoints")
    source.add_argument(
        "--exit-rates", type=cli.float_list, metavar="RATES", help="adaptive: cumulative exit rates (SEDAC_EXIT_RATES)"
    )
    parser.add_argument("--sedac-lambda", type=float, metavar="LOG_LAMBDA", help="gates: log λ (SEDAC_LAMBDA)")
    parser.add_argument("--gamma", type=float, help="confidence kept between checkpoints (SEDAC_GAMMA)")
    parser.add_argument("--weights", type=cli.float_list, help="weight of each checkpoint (SEDAC_WEIGHTS)")
    parser.add_argument("--level", type=float, help="exit level (SEDAC_LEVEL)")
    parser.add_argument("--keep-last", type=int, help="last layers that always run whole (SEDAC_KEEP_LAST)")
    parser.add_argument(
        "--admin",
        nargs="?",
        const="loopback",
        choices=("loopback", "anywhere"),
        help="let an admin call, with the API key, change settings while the server runs, from this machine or anywhere",
    )
    parser.add_argument("--stock", action="store_true", help="serve without SEDAC, for comparison")
    parser.add_argument("--dry-run", action="store_true", help="check, print environment and command, start nothing")
    parser.add_argument("vllm", nargs=argparse.REMAINDER, metavar="-- VLLM ARGUMENTS", help="passed on to vLLM")
    args = parser.parse_args()
    args.vllm = args.vllm[1:] if args.vllm[:1] == ["--"] else args.vllm
    return args


def main() -> None:
    args = parse_args()
    sedac = sedac_environment(args)
    settings = Settings.from_env({**os.environ, **sedac})
    serving.check_port(args.host, args.port)
    if settings.enabled:
        vllm_patch.require_servable()

    model = demo_model.resolve(args.model)
    if settings.enabled:
        policy = check_artefact(settings, model)
        print(f"SEDAC: {policy.describe(settings)}, from {settings.probe_dir}", flush=True)
        if policy.warning:
            print(f"warning: {policy.warning}", file=sys.stderr, flush=True)
    metrics_dir = os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    if settings.enabled and not metrics_dir and not args.dry_run:
        metrics_dir = new_metrics_dir(args.port)
    if metrics_dir and has_room(metrics_dir):
        sedac["PROMETHEUS_MULTIPROC_DIR"] = metrics_dir
    environment = serving.server_environment(model, sedac)
    more = [*name_arguments(args, model), *args.vllm, *admin_arguments(args)]
    command = serving.server_command(model, args.port, args.host, more)

    changed = {name: value for name, value in sorted(environment.items()) if os.environ.get(name) != value}
    print(" ".join(f"{name}={shlex.quote(value)}" for name, value in changed.items()), shlex.join(command), flush=True)
    if not args.dry_run:
        os.execvpe(command[0], command, environment)


def sedac_environment(args: argparse.Namespace) -> dict[str, str]:
    """The SEDAC_* variables that the options stand for; options not given leave the environment as it is."""
    if args.stock:
        return {"SEDAC_ENABLED": "0"}

    def text(given: float | Sequence[float] | None) -> str | None:
        return ",".join(map(str, given)) if isinstance(given, Sequence) else None if given is None else str(given)

    thresholds = PRESETS[args.presets] if args.presets else args.sedac_threshold
    chosen = {
        "SEDAC_ENABLED": "1",
        "SEDAC_PROBE_DIR": str(args.probe_dir.resolve()) if args.probe_dir else None,
        "SEDAC_PROBE_LAYERS": text(args.sedac_layer),
        "SEDAC_THRESHOLDS": text(thresholds),
        "SEDAC_EXIT_RATES": text(args.exit_rates),
        "SEDAC_ADAPTIVE": "1" if args.exit_rates else os.environ.get("SEDAC_ADAPTIVE", "0"),
        "SEDAC_LAMBDA": text(args.sedac_lambda),
        "SEDAC_GAMMA": text(args.gamma),
        "SEDAC_WEIGHTS": text(args.weights),
        "SEDAC_LEVEL": text(args.level),
        "SEDAC_KEEP_LAST": text(args.keep_last),
        "SEDAC_ADMIN": args.admin,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def gives(args: argparse.Namespace, option: str) -> bool:
    """Whether this option is among vLLM's arguments, as `--option value` or `--option=value`."""
    return any(argument.split("=")[0] == option for argument in args.vllm)


def name_arguments(args: argparse.Namespace, model: str) -> list[str]:
    """vLLM's arguments by which a model that was given by another name than its folder's is served by both."""
    return (
        [] if gives(args, "--served-model-name") or args.model == model else ["--served-model-name", model, args.model]
    )


def admin_arguments(args: argparse.Namespace) -> list[str]:
    """vLLM's arguments for the admin call; refuses to open it without the key that guards it."""
    if args.stock or not args.admin:
        return []
    if not (gives(args, "--api-key") or os.environ.get("VLLM_API_KEY")):
        raise SedacError("--admin needs an API key: set VLLM_API_KEY, or give vLLM one (-- --api-key KEY)")
    return ["--middleware", "sedac_core.control.Admin", "--worker-extension-cls", "sedac_core.control.Worker"]


def new_metrics_dir(port: int) -> str:
    """An empty folder for the worker's counters. Named by port: exec leaves nobody to remove it, the next start does."""
    folder = Path(tempfile.gettempdir()) / f"sedac-metrics-{os.getuid()}-{port}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise SedacError(
            f"cannot make {folder} ({error.strerror}): set PROMETHEUS_MULTIPROC_DIR to a new folder"
        ) from None
    return str(folder)


def has_room(folder: str) -> bool:
    """Whether counters can be kept there; says so where not. vLLM would not start with a folder it cannot write."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, METRICS_ROOM)
    except OSError as error:
        print(
            f"warning: metrics cannot be kept in {folder} ({error.strerror}): serving without SEDAC's; set "
            f"PROMETHEUS_MULTIPROC_DIR to a folder with {METRICS_ROOM >> 20} MiB of room",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def check_artefact(settings: Settings, model: str) -> "HardExit | GatedWidths":
    """Load the policy as the server will, so that a wrong folder is refused in seconds and not in a minute."""
    from transformers import AutoConfig

    from sedac_core.policy import GatedWidths, load_policy
    from sedac_core.policy_gates import check_gpu

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise SedacError(f"cannot read the config of {model}: {str(error).splitlines()[0]}") from None
    policy = load_policy(settings, config)
    if isinstance(policy, GatedWidths) and not serving.is_cpu_build():
        check_gpu()
    return policy


if __name__ == "__main__":
    cli.run(main)
