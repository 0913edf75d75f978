"""What counting costs a captured decode step on a GPU.

Two processes hold an engine each, of the same model and artefact: one of this package as it is, one of a copy of it whose
kernels do not count (`EDITS`, texts that must each be there just once). They take turns, and nothing else runs: so many replays of
the graph that vLLM captured of a whole decode step, all layers, without LM head and sampling, on inputs that a real step has left.
The polling thread, which copies the counters to the host ten times a second, is held still meanwhile; it is timed in the engine
that counts, against itself held still, and by the processor time that its thread takes.

    python -m sedac_core.counting MODEL PROBE_DIR DTYPE     # one engine, told what to do line by line
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .bench import ratios, spread
from .bench_gpu import Engine
from .cli import SedacError
from .serving import end_with_parent, log_says

EDITS = {  # what counts, by module
    "gate_kernels.py": {
        '    tl.atomic_add(counters + at, number, sem="relaxed")  # nobody waits': "    pass  # nobody waits"
    },
    "checkpoint_kernels.py": {
        '        tl.atomic_add(mine + 2 + bucket, tl.full((BLOCK_M,), 1, tl.int64), mask=finite, sem="relaxed")\n': "",
        '    tl.atomic_add(risk_sums, total.to(tl.float64), sem="relaxed")  # nobody waits for it, unlike for a sum\n': "",
    },
}
BATCHES = (1, 16, 64)
REPEATS = 9
SECONDS = 0.3  # of replays in a row
CALLED = "sedac counters"  # the polling thread


def records(model: str, probe_dir: Path, dtype: str, log_dir: Path) -> Iterator[list[dict[str, Any]]]:
    """The records of one model and artefact, batch by batch."""
    log_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        package = Path(__file__).parent
        packages = {"counting": package.parent, "not counting": uncounted(package, Path(folder))}
        asked = [model, str(probe_dir.resolve()), dtype]
        engines = {
            name: stack.enter_context(Timed(name, path, asked, log_dir / f"{name.replace(' ', '_')}.log"))
            for name, path in packages.items()
        }
        for engine in engines.values():
            engine.ready()
        for batch in tqdm(BATCHES, "captured decode steps", file=sys.stderr):
            yield [{"phase": "decode", "batch": batch, **record} for record in compare(engines, batch)]


def uncounted(package: Path, folder: Path) -> Path:
    """A copy of the package that does not count; returns the folder to import it from."""
    copy = Path(shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__")))
    for name, edits in EDITS.items():
        text = (copy / name).read_text(encoding="utf-8")
        for old, new in edits.items():
            if text.count(old) != 1:
                raise SedacError(f"{name} counts in another way than counting.py knows: bring its EDITS up to date")
            text = text.replace(old, new)
        (copy / name).write_text(text, encoding="utf-8")
    return folder


def compare(engines: dict[str, "Timed"], batch: int) -> Iterator[dict[str, Any]]:
    """The costs at one batch size, engines in turn."""
    times: dict[str, list[float]] = {"counting": [], "not counting": [], "polled": []}
    processor = []
    number = 0
    for turn in range(1 + REPEATS):
        for name in list(times)[:: 1 if turn % 2 == 0 else -1]:
            engine = engines["counting" if name == "polled" else name]
            told = engine.ask(batch=batch, number=number or 20, polled=name == "polled")
            if turn:
                times[name].append(told["seconds"])
                processor += [told["polling"]] if name == "polled" else []
        number = number or max(20, int(SECONDS / told["seconds"]))
    counts, silent, polled = times["counting"], times["not counting"], times["polled"]
    yield {"metric": "step_us", **spread([1e6 * t for t in counts]), "unit": "µs"}
    yield {
        "metric": "counting_us",
        **spread([1e6 * (a - b) for a, b in zip(counts, silent, strict=True)]),
        "unit": "µs",
    }
    yield {"metric": "counting_share", **spread([r - 1 for r in ratios(counts, silent)]), "unit": ""}
    yield {"metric": "polling_share", **spread([r - 1 for r in ratios(polled, counts)]), "unit": ""}
    yield {"metric": "polling_processor_share", **spread(processor), "unit": ""}


class Timed:
    """An engine in a process of its own, of the package that lies in `path`."""

    def __init__(self, name: str, path: Path, asked: list[str], log: Path):
        self.name, self.log = name, log
        others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *others])}
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sedac_core.counting", *asked],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip

    def __enter__(self) -> "Timed":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()  # ends it
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ready(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SedacError(f"the engine '{self.name}' ended with code {self.process.wait()}. {log_says(self.log)}")
        return json.loads(line)

    def ask(self, **what: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self.ready()


class Served(Engine):
    """The engine on real weights, beside another one on the same GPU."""

    OPTIONS = Engine.OPTIONS | {
        "load_format": "auto",
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 2 << 30,
        "max_model_len": 2048,
        "compilation_config": {"cudagraph_capture_sizes": list(BATCHES)},
    }


def main(model: str, probe_dir: str, dtype: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever vLLM prints goes to the log
    Served.OPTIONS = Served.OPTIONS | {"dtype": dtype}
    settings = {"SEDAC_ENABLED": "1", "SEDAC_PROBE_DIR": probe_dir, "SEDAC_ADAPTIVE": "0", "SEDAC_LOG_EVERY": "0"}
    engine = Served(Path(model), settings, engines=1)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == CALLED]
    clock = time.pthread_getcpuclockid(thread.ident)
    lock = engine.runtime.lock  # the polling thread waits for it in each of its turns
    lock.acquire()
    warm = set()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        what = json.loads(line)
        batch = what["batch"]
        if batch not in warm:
            engine.run([engine.prompt(8, seed) for seed in range(batch)], 4)
            warm.add(batch)
        if what["polled"]:
            lock.release()
        start, before = time.perf_counter(), time.clock_gettime(clock)
        seconds = engine.replays(batch, what["number"])
        torch.cuda.synchronize()
        polling = (time.clock_gettime(clock) - before) / (time.perf_counter() - start)
        if what["polled"]:
            lock.acquire()
        print(json.dumps({"seconds": seconds, "polling": polling}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
