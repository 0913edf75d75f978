"""All eight steps on the embedded default model: what `make demo` runs.

    python demo.py --out-dir demo_data

Each step is the README's own command, printed before it runs. Steps 2 and 3 run twice: for the plain cascade that is
served, and for gates, which are judged beside it at the same saved bytes. Ends with a table and, as the last line, one
JSON object.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from sedac_core import cli, report, serving
from sedac_core.cli import SedacError

STEPS = 8
# A training of gates that takes about two minutes on two cores; docs/LOG.md says what so short a one needs.
SHORT = "--steps 40 --batch-size 256 --max-length 128 --adapter-rank 64 --lr 1.5e-3 --gate-lr 1e-2"
BUDGETS = "0.06,0.125,0.25"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="model folder, hub name or 'default' (default: %(default)s)")
    parser.add_argument("--layers", default="7,14,21", help="checkpoints (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=48, help="pieces of text to collect (default: %(default)s)")
    parser.add_argument("--exit-rates", default="0.002,0.01,0.05", help="rates to calibrate for (default: %(default)s)")
    parser.add_argument(
        "--config", default="configs/test_matrix_demo.json", help="matrix of step 7 (default: %(default)s)"
    )
    parser.add_argument(
        "--out-dir", type=Path, default=Path("demo_data"), help="data and report (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.chdir(Path(__file__).parent)
    out, curves = str(args.out_dir), args.out_dir / "curves.json"
    collect = f"collect_multilayer_data.py --model {args.model} --layers {args.layers} --samples {args.samples}"
    step(1, f"{collect} --max-length 256 --dataset pydoc --save-dir {out}")
    step(2, f"train_multilayer_probes.py --data-dir {out} --layers {args.layers}")
    step(8, f"sedac_calibrate.py --probe-dir {out} --exit-rates {args.exit_rates}")
    simulated = step(3, f"test_v6_local.py --data-dir {out} --curves {curves}")
    judged = train_and_judge_gates(args)
    step(4, "patch_vllm_surgical.py", result=False)
    served = serve_and_bench(args)
    suite = step(
        7, f"sedac_test_suite.py --config {args.config} --model {args.model} --probe-dir {out} --out-dir {out}"
    )

    results = json.loads(Path(suite["json"]).read_text())
    page = args.out_dir / "report.html"
    report.write_report(page, f"SEDAC on {args.model}", results, json.loads(curves.read_text()))
    calibrated, everything = suite["cases"].values()  # as the config lists them
    summary = {
        "model": args.model,
        "checkpoints": simulated["checkpoints"],
        "thresholds": simulated["thresholds"],
        "exit_rates": simulated["exit_rates"],
        "mlp_rows_saved": simulated["mlp_rows_saved"],
        "theoretical_speedup": simulated["theoretical_speedup"],
        "decode_speedup": last(calibrated["decode_speedup"]),
        "prefill_speedup": last(calibrated["prefill_speedup"]),
        "ppl_stock": calibrated["ppl_stock"],
        "ppl_sedac": calibrated["ppl"],
        "exits_total": calibrated["exits_total"],
        "gates_saved_bytes": judged["saved_bytes"],
        "gates_kl": judged["kl"],
        "gates_top1_agreement": judged["top1_agreement"],
        "cascade_saved_bytes": judged["cascade"]["saved_bytes"],
        "cascade_kl": judged["cascade"]["kl"],
        "cascade_top1_agreement": judged["cascade"]["top1_agreement"],
        "all_exit": everything,
        "served": served,
        "report": str(page.resolve()),
    }
    print("\n" + table(summary) + f"\nreport: {summary['report']}\n")
    print(json.dumps(summary))


def step(number: int, command: str, result: bool = True) -> dict[str, Any]:
    """Run one of the scripts; its story is shown as it goes, its last line is the JSON object it returns."""
    announce(number, command)
    script = subprocess.Popen([sys.executable, *shlex.split(command)], stdout=subprocess.PIPE, text=True)
    last = ""
    for last in script.stdout:
        if not (result and last.startswith("{")):
            print(last, end="", flush=True)
    if script.wait():
        raise SedacError(f"step {number} failed with exit code {script.returncode}: what it said is above")
    return json.loads(last) if result else {}


def announce(number: int, command: str) -> None:
    print(f"\n=== step {number} of {STEPS}: python {command}", flush=True)


def train_and_judge_gates(args: argparse.Namespace) -> dict[str, Any]:
    """What gates save and cost at the middle budget, and the plain cascade at the same bytes, on text new to both."""
    gates = args.out_dir / "gates"
    train = f"--policy gates --model {args.model} --dataset pydoc --data-dir {gates} --held-out 0.25"
    step(2, f"train_multilayer_probes.py {train} {SHORT} --budgets {BUDGETS}")
    rows = step(3, f"test_v6_local.py --data-dir {gates} --against {args.out_dir} --samples 16")["budgets"]
    return rows[len(rows) // 2]


def serve_and_bench(args: argparse.Namespace) -> dict[str, Any]:
    """Steps 5 and 6: the launcher's server, measured over HTTP, stopped again."""
    port = serving.free_port()
    vllm = json.loads(Path(args.config).read_text())["server_args"]
    launch = (
        f"sedac_start_server.py --model {args.model} --probe-dir {args.out_dir} --port {port} -- {shlex.join(vllm)}"
    )
    announce(5, launch)
    with serving.Server(
        args.model,
        log=args.out_dir / "server.log",
        port=port,
        name="the server of step 5",
        command=[sys.executable, *shlex.split(launch)],
    ):
        return step(
            6, f"qwen7b_vllm_bench.py --url http://127.0.0.1:{port} --requests 8 --concurrency 4 --max-tokens 16"
        )


def last(values: dict[str, float]) -> float:
    """The figure at the greatest batch or length, which the config names last."""
    return list(values.values())[-1]


def table(summary: dict[str, Any]) -> str:
    """The summary as two columns."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}"
        if isinstance(value, list):
            return ", ".join(map(text, value))
        return str(value)

    shown = {name: text(value) for name, value in summary.items() if not isinstance(value, dict)}
    for phase, unit in (("decode", "batch"), ("prefill", "tokens")):
        for size, speedup in summary["all_exit"][f"{phase}_speedup"].items():
            shown[f"all exit: {phase} speedup, {unit} {size}"] = text(speedup)
    return "\n".join(f"{name:42} {value}" for name, value in shown.items() if name != "report")


if __name__ == "__main__":
    cli.run(main)
