"""`python -m sedac_core.bench cpu`: SEDAC inside vLLM against stock on a CPU, both engines in one process.

The overhead of SEDAC when nothing exits, and its speed-up when everything does, on real weights, with compilation on. The
engines take turns round by round (engines.py), in one process that can force exits;
sedac_test_suite.py measures servers, which have processes of their own beside the worker. Needs vLLM patched (step 4).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from . import demo_model, vllm_patch
from .bench import ratios, results_file, spread
from .engines import Engine, steps_of


class CpuEngine(Engine):
    OPTIONS: ClassVar[dict[str, Any]] = {
        "dtype": "float32",
        "gpu_memory_utilization": 0.3,  # of the machine's memory, for all that vLLM says
        "max_model_len": 1024,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 16,
    }

    def counters(self) -> torch.Tensor:
        found = self.runtime.counters
        saved = found.tokens * found.num_layers - found.rows_computed
        return torch.tensor([found.steps, found.tokens, saved, sum(found.exits)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sedac_core.bench cpu", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", default="default", help="model folder, Hub name or 'default' (default: %(default)s)")
    option("--probe-dir", type=Path, default=Path("sedac_data"), help="its artefact (default: %(default)s)")
    option("--batches", type=int, nargs="*", default=[1, 4, 16], help="decode")
    option("--prefill", type=int, nargs="*", default=[128, 512], help="tokens of the prompt")
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
    engines = {"stock": CpuEngine(folder, {"SEDAC_ENABLED": "0"}), "sedac": CpuEngine(folder, on)}
    sedac = engines["sedac"]
    phases = [("decode", batch) for batch in arguments.batches] + [("prefill", size) for size in arguments.prefill]
    for phase, size in tqdm(phases, desc="cpu", file=sys.stderr):
        for case, rate in (("no exits", 0.0), ("all exit", 1.0)):
            before = sedac.force(rate)
            times = steps_of(
                {name: getattr(engine, phase)(size) for name, engine in engines.items()}, arguments.repeats
            )
            seen = sedac.counters() - before
            here = {"system": "sedac", "model": arguments.model, "case": case, "phase": phase, "exit_rate": rate}
            here["batch" if phase == "decode" else "tokens"] = size
            yield {**here, "metric": "speedup", **spread(ratios(times["stock"], times["sedac"])), "unit": "x"}
            for name, samples in times.items():
                milliseconds = spread([1000 * seconds for seconds in samples])
                yield {**here, "system": name, "metric": "time_ms", **milliseconds, "unit": "ms"}
            saved = float(seen[2] / (seen[1] * sedac.runtime.counters.num_layers))
            yield {**here, "metric": "mlp_rows_saved", "value": saved, "unit": "share"}
