"""`python -m sedac_core.bench cpu`: SEDAC inside vLLM against stock on a CPU, both engines in one process.

The overhead of SEDAC when nothing exits, and its speed-up when everything does, on real weights, with compilation on; of gates the
overhead when nothing narrows, and the speed-up at the price of each budget that they were trained for. The
engines take turns round by round (engines.py), in one process that can force exits;
sedac_test_suite.py measures servers, which have processes of their own beside the worker. Needs vLLM patched (step 4).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from . import demo_model, vllm_patch
from .artifacts import Manifest
from .bench import ratios, results_file, spread
from .engines import Engine, steps_of
from .gates import trained_prices
from .metrics import saved_share


class CpuEngine(Engine):
    OPTIONS: ClassVar[dict[str, Any]] = {
        "gpu_memory_utilization": 0.3,  # of the machine's memory, for all that vLLM says
        "max_model_len": 1024,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 16,
    }

    def counters(self) -> torch.Tensor:
        found = self.runtime.counters
        saved = found.tokens * found.num_layers - found.rows_computed
        return torch.tensor([found.steps, found.tokens, saved, sum(found.exits)])

    def cases(self, manifest: Manifest) -> Iterator[tuple[str, dict[str, float], Callable[[], torch.Tensor]]]:
        """What to time: its name, what records say of it, and what sets it up and returns the counters."""
        for case, rate in (("no exits", 0.0), ("all exit", 1.0)):
            yield case, {"exit_rate": rate}, partial(self.force, rate)

    def saved(self, counted: torch.Tensor) -> dict[str, Any]:
        """The record of what was saved while so much was counted."""
        share = float(counted[2] / (counted[1] * self.runtime.counters.num_layers))
        return {"metric": "mlp_rows_saved", "value": share, "unit": "share"}


class GatedCpuEngine(CpuEngine):
    """The same under gates."""

    def counters(self) -> torch.Tensor:
        return torch.tensor(self.runtime.counters.levels)

    def cases(self, manifest: Manifest) -> Iterator[tuple[str, dict[str, float], Callable[[], torch.Tensor]]]:
        yield "nothing narrows", {}, partial(self.price, -100.0)
        for budget, log_lambda in trained_prices(manifest).items():
            about = {"budget": budget, "log_lambda": log_lambda}
            yield f"the price for {budget:.1%}", about, partial(self.price, log_lambda)

    def price(self, log_lambda: float) -> torch.Tensor:
        self.runtime.policy.log_lambda.fill_(log_lambda)
        return self.counters()

    def saved(self, counted: torch.Tensor) -> dict[str, Any]:
        share = saved_share(self.runtime.policy.shape, counted.tolist())
        return {"metric": "saved_bytes", "value": share, "unit": "share"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench cpu", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", default="default", help="model folder, Hub name or 'default' (default: %(default)s)")
    option("--name", help="what records call the model (default: the last part of --model)")
    option("--probe-dir", type=Path, default=Path("sedac_data"), help="its artefact (default: %(default)s)")
    option("--batches", type=int, nargs="*", default=[1, 4, 16], help="decode")
    option("--prefill", type=int, nargs="*", default=[128, 512], help="tokens of the prompt")
    option("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    option("--repeats", type=int, default=11)
    option("--out", type=Path, default=Path("docs/results/cpu.json"))
    arguments = parser.parse_args()
    vllm_patch.require_patched()
    results_file(arguments.out, list(measure(arguments)))
    print(json.dumps({"results": str(arguments.out)}))


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    folder = Path(demo_model.resolve(arguments.model))
    on = {
        "SEDAC_ENABLED": "1",
        "SEDAC_PROBE_DIR": str(arguments.probe_dir),
        "SEDAC_ADAPTIVE": "0",
        "SEDAC_LOG_EVERY": "0",
    }
    manifest = Manifest.load(arguments.probe_dir)
    CpuEngine.OPTIONS = CpuEngine.OPTIONS | {"dtype": arguments.dtype}
    sedac_engine = GatedCpuEngine if manifest.gates else CpuEngine
    engines = {"stock": CpuEngine(folder, {"SEDAC_ENABLED": "0"}), "sedac": sedac_engine(folder, on)}
    sedac = engines["sedac"]
    known = {"system": "sedac", "model": arguments.name or Path(arguments.model).name, "dtype": arguments.dtype}
    phases = [("decode", batch) for batch in arguments.batches] + [("prefill", size) for size in arguments.prefill]
    for phase, size in tqdm(phases, desc="cpu", file=sys.stderr):
        for case, about, set_up in sedac.cases(manifest):
            before = set_up()
            times = steps_of(
                {name: getattr(engine, phase)(size) for name, engine in engines.items()}, arguments.repeats
            )
            saved = sedac.saved(sedac.counters() - before)
            here = {**known, "case": case, "phase": phase, **about}
            here["batch" if phase == "decode" else "tokens"] = size
            yield {**here, "metric": "speedup", **spread(ratios(times["stock"], times["sedac"])), "unit": "x"}
            for name, samples in times.items():
                milliseconds = spread([1000 * seconds for seconds in samples])
                yield {**here, "system": name, "metric": "time_ms", **milliseconds, "unit": "ms"}
            yield {**here, **saved}
