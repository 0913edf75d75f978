"""What counting costs a captured decode step on a GPU.

One engine serves the model and the artefact in this process. What counts in its steps, the gated MLPs of all leaders or all
checkpoints, is captured by itself, on the engine's own weights and random inputs: as it is, as it is once more, and from a copy
of the kernels that does not count (`EDITS`, texts that must each be there just once). These graphs take turns, in the same memory. What the
first takes longer than the last is what counting costs a step, and what it takes longer than the second says how well that is known: two
engines, in processes of their own, differ by a percent though both count. A step is the graph that vLLM captured of it, all
layers, without LM head and sampling, on inputs that a real step has left. The polling thread, which copies the counters to the host
ten times a second, is held still meanwhile; steps are timed with it as well, and the processor time that it takes.
"""

import importlib
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint_kernels, graph_times, kernels
from .bench import in_turns, ratios, spread
from .cli import SedacError
from .engines import Engine
from .polling import CALLED

KERNELS = (
    "step_counters",
    "gate_parts",
    "gate_kernels",
    "norm_kernels",
    "checkpoint_kernels",
    "fused_kernel",
    "tiled_kernels",
    "kernels",
)
EDITS = {  # what counts, by module
    "step_counters": {
        '    tl.atomic_add(counters + at, number, sem="relaxed")  # nobody waits': "    pass  # nobody waits"
    },
    "checkpoint_kernels": {
        '    tl.atomic_add(mine + 2 + bucket, tl.full((BLOCK_M,), 1, tl.int64), mask=finite, sem="relaxed")\n': "",
        '    tl.atomic_add(risk_sums + index, total.to(tl.float64), sem="relaxed")  # nobody waits for it, unlike for a sum\n': "",
    },
}
COPY = "sedac_uncounted"
BATCHES = (1, 16, 64)
REPEATS = 9
SECONDS = 0.2  # of replays in a row
STEPS = 8  # whose counting is one graph

Calls = list[Callable[[], Any]]
Makes = Callable[[dict[str, ModuleType]], Calls]


class Served(Engine):
    """The engine on real weights."""

    OPTIONS = Engine.OPTIONS | {
        "load_format": "auto",
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 2 << 30,
        "max_model_len": 2048,
        "compilation_config": {"cudagraph_capture_sizes": list(BATCHES)},
    }


def records(model: str, probe_dir: Path, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """The records of one model and artefact, batch by batch."""
    Served.OPTIONS = Served.OPTIONS | {"dtype": dtype}
    settings = {"SEDAC_ENABLED": "1", "SEDAC_PROBE_DIR": str(probe_dir.resolve())}
    settings |= {"SEDAC_ADAPTIVE": "0", "SEDAC_LOG_EVERY": "0"}
    with tempfile.TemporaryDirectory() as folder:
        silent = uncounted(Path(folder))  # before the long work
        engine = Served(Path(model), settings, engines=1)
        for batch in tqdm(BATCHES, "captured decode steps", file=sys.stderr):
            engine.run([engine.prompt(8, seed) for seed in range(batch)], 4)
            yield [{"phase": "decode", "batch": batch, **record} for record in compare(engine, batch, silent)]


def uncounted(folder: Path) -> dict[str, ModuleType]:
    """The modules `kernels` and `checkpoint_kernels` of a copy, made in `folder`, that does not count; what has no kernels is
    imported from this package."""
    package, copy = Path(__file__).parent, folder / COPY
    copy.mkdir()
    shutil.copy(kernels.SETTINGS_FILE, copy)
    for name in KERNELS:
        text = (package / f"{name}.py").read_text(encoding="utf-8")
        for old, new in EDITS.get(name, {}).items():
            if text.count(old) != 1:
                raise SedacError(f"{name} counts in another way than counting.py knows: bring its EDITS up to date")
            text = text.replace(old, new)
        text = re.sub(rf"^from \.(?!(?:{'|'.join(KERNELS)}) )", f"from {__package__}.", text, flags=re.MULTILINE)
        (copy / f"{name}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        return {name: importlib.import_module(f"{COPY}.{name}") for name in ("kernels", "checkpoint_kernels")}
    finally:
        sys.path.remove(str(folder))


def gated(runtime: Any, tokens: int) -> Makes:
    """What makes the calls of a step of so many tokens whose gates decide and count, by some modules' kernels."""
    proj = next(iter(runtime.gates.values())).proj
    x, slots, chosen = inputs(tokens, proj.shape[1], proj.dtype, proj.device)
    rest = (runtime.policy.prices, slots, torch.zeros_like(runtime.by_kernels))
    return lambda modules: [
        partial(
            modules["kernels"].gated_mlp, x, x, runtime.norm(layer), runtime.weights[layer], gate, *rest, chosen=chosen
        )
        for layer, gate in runtime.gates.items()
    ]


def checkpoints(runtime: Any, tokens: int, dtype: torch.dtype) -> Makes:
    """The same of a cascade's checkpoints, in a model of this type."""
    probes, rule = runtime.probes, runtime.rule
    hidden, slots, chosen = inputs(tokens, probes[0].proj.shape[1], dtype, rule.table.device)
    margin = torch.zeros(tokens, device=rule.table.device)
    rest = (slots, rule.counting_apart())
    return lambda modules: [
        partial(modules["checkpoint_kernels"].checkpoint, probe, hidden, hidden, margin if index else None, *rest, index, 1, chosen)
        for index, probe in enumerate(probes)
    ]  # fmt: skip


def inputs(tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random states `[tokens, hidden]`, slots and choices `[tokens]`."""
    x = torch.randn(tokens, hidden_size, dtype=dtype, device=device)
    return x, torch.arange(tokens, device=device), torch.zeros(tokens, dtype=torch.int32, device=device)


def counting_of(runtime: Any, tokens: int, dtype: torch.dtype) -> Makes:
    return gated(runtime, tokens) if hasattr(runtime, "gates") else checkpoints(runtime, tokens, dtype)


def compare(engine: Engine, batch: int, silent: dict[str, ModuleType]) -> Iterator[dict[str, Any]]:
    """The costs at one batch size."""
    own = {"kernels": kernels, "checkpoint_kernels": checkpoint_kernels}
    dtype = engine.llm.llm_engine.vllm_config.model_config.dtype
    with engine.runtime.lock:  # the polling thread waits for it in each of its turns
        graphs: dict[str, Any] = {}
        make = counting_of(engine.runtime, batch, dtype)
        for name, modules in (("counting", own), ("again", own), ("silent", silent)):
            calls = make(modules)
            for call in calls:  # compiles
                call()
            graphs[name] = graph_times.captured(
                lambda i, calls=calls: calls[i % len(calls)](), STEPS * len(calls), graphs.get("counting")
            )
        counted = turns({name: partial(step_us, graph) for name, graph in graphs.items()})
    steps = turns({"held": partial(replays, engine, batch, False), "polled": partial(replays, engine, batch, True)})
    counting, again, silence = counted["counting"], counted["again"], counted["silent"]
    held, polled = ([us for us, _ in steps[name]] for name in ("held", "polled"))
    step = spread(held)
    costs = [a - b for a, b in zip(counting, silence, strict=True)]
    yield {"metric": "step_us", **step, "unit": "µs"}
    yield {"metric": "counting_us", **spread(costs), "unit": "µs"}
    known = [a - b for a, b in zip(counting, again, strict=True)]
    yield {"metric": "counting_known_to_us", **spread(known), "unit": "µs"}
    yield {"metric": "counting_share", **spread([cost / step["value"] for cost in costs]), "unit": ""}
    yield {"metric": "polling_share", **spread([r - 1 for r in ratios(polled, held)]), "unit": ""}
    yield {"metric": "polling_processor_share", **spread([share for _, share in steps["polled"]]), "unit": ""}


def turns(actions: dict[str, Callable[[int], Any]]) -> dict[str, list[Any]]:
    """What each action returns, `[REPEATS]`, in turns; each is given a number of replays that takes SECONDS or so."""
    start, few = time.perf_counter(), 20
    for action in actions.values():
        action(few)
    one = (time.perf_counter() - start) / few / len(actions)
    number = max(few, int(SECONDS / one))
    return in_turns({name: partial(action, number) for name, action in actions.items()}, REPEATS)


def step_us(graph: torch.cuda.CUDAGraph, number: int) -> float:
    """Microseconds that the counting calls of one step take, over so many replays in a row."""
    return graph_times.replay_us(graph, STEPS, number)


def replays(engine: Engine, batch: int, polled: bool, number: int) -> tuple[float, float]:
    """Microseconds of a captured step, over so many replays in a row, and the polling thread's share of a processor meanwhile;
    unless polled, that is held still."""
    (thread,) = [thread for thread in threading.enumerate() if thread.name == CALLED]
    clock = time.pthread_getcpuclockid(thread.ident)
    lock = engine.runtime.lock
    if not polled:
        lock.acquire()
    try:
        start, before = time.perf_counter(), time.clock_gettime(clock)
        seconds = engine.replays(batch, "predicated", number)
        share = (time.clock_gettime(clock) - before) / (time.perf_counter() - start)
    finally:
        if not polled:
            lock.release()
    return 1e6 * seconds, share
