"""vLLM engines in this process, stock and patched, side by side, and how benchmarks time them in turns.

Weights are dummies. A probe of random weights makes exits that have nothing to do with the text; its threshold is moved until the
asked share of tokens exits, or, for the pattern all_or_none, thrown to infinity or zero before each step. Gates of random weights are
each scaled on the inputs they get, and the price λ is the one at which the asked share of tokens runs at one narrow level. Exits are
forced from this process, so an engine's worker runs in it.
"""

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from .artifacts import Fingerprint, Manifest, probe_path, save_tensor
from .bench import in_turns, paired
from .cli import SedacError
from .gates import MOST_LOG_DAMAGE, Gates, GateShape, in_bits
from .probe import LREProbe
from .recordings import Recordings

CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def random_artefact(folder: Path, model: str, config: dict[str, Any], checkpoint: int) -> None:
    """A probe whose risk spreads tokens at random."""
    torch.manual_seed(0)
    probe = LREProbe(config["hidden_size"], 64)
    probe.head.weight.data.mul_(8)
    save_tensor(probe.state_dict(), probe_path(folder, checkpoint))
    fingerprint = Fingerprint(*(config[name] for name in Fingerprint.__dataclass_fields__))
    Manifest(model=model, fingerprint=fingerprint, checkpoints=(checkpoint,), rank=64).save(folder)


def random_gates(folder: Path, model: str, config: dict[str, Any], levels: tuple[float, ...]) -> None:
    """Gates, and adapters where levels are shares of neurons, that nobody trained; `GatedEngine` scales the gates."""
    torch.manual_seed(0)
    rank = 0 if in_bits(levels) else GateShape.adapter_rank
    sizes = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shape = GateShape(*sizes, levels, rank)
    gates = Gates(shape)
    for gate in gates.gates.values():
        torch.nn.init.normal_(gate.head.weight)
    gates.order.copy_(torch.rand(gates.order.shape).argsort(1))
    gates.save(folder)
    fingerprint = Fingerprint(*(config[name] for name in Fingerprint.__dataclass_fields__))
    manifest = Manifest(model=model, fingerprint=fingerprint, checkpoints=(), policy="gates")
    manifest.gates = shape.as_json() | {"budgets": [{"saved_bytes": 0.25, "log_lambda": 0.0}]}
    manifest.save(folder)


class Engine:
    """One vLLM engine of this process, stock or patched, and the work it is timed on."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "seed": 0,
        "max_model_len": 8200,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 512,
        "compilation_config": {"cudagraph_capture_sizes": CAPTURED},
    }

    def __init__(self, folder: Path, settings: dict[str, str], engines: int = 2):
        """`engines`: how many of them share the GPU's memory."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the exits are forced from this process
        for name in [name for name in os.environ if name.startswith("SEDAC_")]:
            del os.environ[name]
        os.environ.update(settings)
        from vllm import LLM
        from vllm.compilation.cuda_graph import CUDAGraphWrapper
        from vllm.config import CUDAGraphMode

        from .vllm_requests import runtimes_of

        CUDAGraphWrapper._all_instances.clear()  # vLLM drops these engines' graphs when it profiles another
        self.llm = LLM(str(folder), **{"gpu_memory_utilization": 0.84 / engines} | self.OPTIONS)
        config = self.llm.llm_engine.vllm_config
        self.vocabulary = config.model_config.get_vocab_size()
        self.runtime: Any = next(iter(runtimes_of(config)), None)
        self.steps = {  # captured decode steps by the requests that they have room for: vLLM's graphs, and the key there
            key.num_tokens: (wrapper.concrete_cudagraph_entries, key)
            for wrapper in CUDAGraphWrapper._all_instances
            if wrapper.runtime_mode == CUDAGraphMode.FULL
            for key in wrapper.concrete_cudagraph_entries
        }
        self.coin: random.Random | None = None
        self.rate = 0.0
        self.found: dict[float, float] = {}  # thresholds by exit rate

    def counters(self) -> torch.Tensor:
        """The device's own: forward steps, tokens, MLP rows saved, exits of the first checkpoint."""
        from .checkpoint_parts import BY_CHECKPOINT, ROWS_SAVED
        from .step_counters import STEPS, TOKENS

        return self.runtime.rule.counters.cpu()[[STEPS, TOKENS, ROWS_SAVED, BY_CHECKPOINT]]

    def force(self, rate: float, pattern: str = "random") -> torch.Tensor:
        """Let this share of tokens exit: chosen by the random probe, or all of a step or none. Returns the counters."""
        thresholds = self.runtime.policy.thresholds
        self.rate, self.coin = rate, random.Random(0) if pattern == "all_or_none" else None
        if thresholds.is_cuda:  # what the poll finds a moment later; so that no sample falls before it
            self.runtime.pick.ran([1 - rate] * len(self.runtime.checkpoints))
        if self.coin is not None or rate in (0, 1):
            thresholds.fill_(float("inf") if rate == 1 else 0.0)
            return self.counters()
        if rate in self.found:
            thresholds.fill_(self.found[rate])
            return self.counters()
        low, high = 1e-6, 1e4
        for _ in range(24):  # bisect in the logarithm
            thresholds.fill_((low * high) ** 0.5)
            before = self.counters()
            self.run([self.prompt(2048, seed=1)], 1)
            seen = self.counters() - before
            if seen[3] < rate * seen[1]:
                low = float(thresholds[0])
            else:
                high = float(thresholds[0])
        self.found[rate] = float(thresholds[0])
        return self.counters()

    @contextlib.contextmanager
    def without_graphs(self) -> Iterator[None]:
        """The model of this engine runs as it is written meanwhile, whatever the size of a step: neither captured nor compiled, as a
        compiled graph may have no operator (compiled_steps.py)."""

        def run(worker: Any, graphs: bool) -> None:
            worker.model_runner.cudagraph_dispatcher.keys_initialized = graphs
            worker.model_runner.get_model().model.do_not_compile = not graphs

        self.llm.collective_rpc(run, args=(False,))
        try:
            yield
        finally:
            self.llm.collective_rpc(run, args=(True,))

    def prompt(self, tokens: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocabulary, (tokens,), generator=generator).tolist()

    def run(self, prompts: list[list[int]], tokens: int) -> None:
        """Answers of so many random tokens to all prompts, in one batch."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False, seed=None)
        engine = self.llm.llm_engine
        for index, prompt in enumerate(prompts):
            engine.add_request(f"{time.perf_counter_ns()}-{index}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            if self.coin is not None:
                self.runtime.policy.thresholds.fill_(float("inf") if self.coin.random() < self.rate else 0.0)
            engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def decode(self, batch: int) -> tuple[Callable[[], None], Callable[[], None], int]:
        """Short and long answers, and the steps between them."""
        prompts = [self.prompt(8, seed) for seed in range(batch)]
        steps = 48 if batch <= 64 else 24
        return (lambda: self.run(prompts, 1)), (lambda: self.run(prompts, 1 + steps)), steps

    def captured_for(self, batch: int) -> int:
        """The captured size that a decode step of so many requests runs in."""
        sizes = [size for size in self.steps if size >= batch]
        if not sizes:
            raise SedacError(f"vLLM captured no whole decode step of {batch} requests: choose among {CAPTURED}")
        return min(sizes)

    def step_of(self, batch: int, recording: str | None = None) -> torch.cuda.CUDAGraph:
        """The captured decode step of so many requests, on the inputs that the last one left: of two recordings the one that
        is asked for, or the one that the host picks."""
        graphs, key = self.steps[self.captured_for(batch)]
        if isinstance(graphs, Recordings):
            graphs.pick.waited = 0  # not to look
            if graphs.pick.second(key.num_tokens):  # else there is one, whatever its name
                graphs = {"whole": graphs.whole, "predicated": graphs.skipping}.get(recording, graphs)
        if key not in graphs:  # asks which recording is in force
            raise SedacError(f"the captured decode step of {batch} requests is gone")
        return graphs[key].cudagraph

    def replays(self, batch: int, recording: str | None = None, number: int = 20) -> float:
        """Seconds of a captured decode step, the mean of so many replays in a row. Under all_or_none all tokens exit in the
        asked share of them, exactly."""
        graph = self.step_of(batch, recording)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # so that the GPU has work while the next ones are launched
        start.record()
        for turn in range(number):
            if self.coin is not None:
                exits = int((turn + 1) * self.rate) > int(turn * self.rate)
                self.runtime.policy.thresholds.fill_(float("inf") if exits else 0.0)
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / number

    def prefill(self, tokens: int, prompts: int = 1) -> tuple[None, Callable[[], None], int]:
        """So many prompts of so many tokens, in one step where that takes them all."""
        several = [self.prompt(tokens, seed) for seed in range(prompts)]
        return None, (lambda: self.run(several, 1)), 1

    def trace(self, batch: int) -> dict[str, tuple[float, float]]:
        """Launches and microseconds of each kernel of a captured decode step, as the profiler sees its replays."""
        steps = 8
        self.run([self.prompt(8, seed) for seed in range(batch)], 4)
        graph = self.step_of(batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                graph.replay()
            torch.cuda.synchronize()
        found: dict[str, tuple[float, float]] = {}
        for event in profile.key_averages():
            launches, microseconds = found.get(event.key[:80], (0.0, 0.0))
            found[event.key[:80]] = (
                launches + event.count / steps,
                microseconds + event.device_time_total / steps,
            )
        return dict(sorted(found.items(), key=lambda item: -item[1][1])[:40])


class GatedEngine(Engine):
    """The engine with gates, and the price at which a share of tokens narrows to one level."""

    SPREAD = 0.5  # of the predicted log damages, in nats

    def __init__(self, folder: Path, settings: dict[str, str], engines: int):
        super().__init__(folder, settings, engines)
        self.bias: dict[int, torch.Tensor] = {}  # by layer: at which each level's log damages have mean 0
        self.border: dict[int, torch.Tensor] = {}  # by layer: log λ from which a level is taken, [tokens, levels - 1]
        self.scale()

    def counters(self) -> torch.Tensor:
        """The device's own, `[2, 2 + levels]`: forward steps, tokens, MLP rows by level; of steps whose gates ran, and of all
        others."""
        from .step_counters import BY_LEVEL, STEPS, TOKENS

        counted = self.runtime.counted.cpu()
        return torch.cat([counted[:, [STEPS, TOKENS]], counted[:, BY_LEVEL:]], 1)

    def recordings(self, batch: int) -> list[str]:
        """What there is of the captured decode step of so many requests, first what the host picks."""
        size = self.captured_for(batch)
        if not self.runtime.second(size):
            return ["whole" if self.runtime.path(size) == "dense" else "predicated"]
        return ["predicated", "whole"] if self.runtime.pick.pays(size) else ["whole", "predicated"]

    def scale(self) -> None:
        """Give every gate log damages of mean 0 and the same spread on the inputs that a random prompt brings it."""
        from .norm_kernels import normed

        runtime, decide = self.runtime, self.runtime.gated_mlp

        def recording(
            hidden: torch.Tensor, residual: torch.Tensor, least: None, layer: int
        ) -> tuple[torch.Tensor, ...]:
            if layer not in self.bias:
                gate, (x, _) = runtime.gates[layer], normed(hidden, residual, runtime.norm(layer))
                z = x.float() @ gate.proj.float().T
                gate.proj.div_(z.std(0)[:, None])
                gate.proj_bias.copy_(-z.mean(0) / z.std(0))
                inner = torch.nn.functional.silu(x.float() @ gate.proj.float().T + gate.proj_bias)
                gate.head.mul_(self.SPREAD / (inner @ gate.head.T).std(0)[:, None])
                log_damage = inner @ gate.head.T
                self.bias[layer] = -log_damage.mean(0)
                self.border[layer] = log_damage + self.bias[layer] - gate.gain.log()
            return decide(hidden, residual, least, layer)

        runtime.gated_mlp = recording
        with self.without_graphs():
            self.run([self.prompt(2048, seed=1)], 1)
        runtime.gated_mlp = decide

    def narrow(self, rate: float, level: int) -> None:
        """Let this share of tokens run at this level in each layer, the others whole."""
        runtime = self.runtime
        for layer, gate in runtime.gates.items():
            gate.head_bias.fill_(2 * MOST_LOG_DAMAGE)
            gate.head_bias[level - 1] = self.bias[layer][level - 1]
        runtime.policy.log_lambda.fill_(self.price_of(rate, level))
        rows = [0.0] * len(runtime.policy.shape.levels)
        rows[0], rows[level] = 1 - rate, rate
        # What the poll will find, so that no sample falls before it, and of so many tokens that the rows before count little.
        runtime.ran(10_000, [10_000 * len(runtime.gates) * share for share in rows])

    def price_of(self, rate: float, level: int) -> float:
        """The price at which this share of a random prompt's tokens, over all layers, would run at this level."""
        if rate in (0, 1):
            return -30.0 if rate == 0 else 4.0
        return torch.cat([border[:, level - 1] for border in self.border.values()]).quantile(rate).item()


def steps_of(actions: dict[str, tuple], repeats: int) -> dict[str, list[float]]:
    """Seconds a step of each engine, `[repeats]`, engines in turn."""
    flat = {f"{name} long": long for name, (_, long, _) in actions.items()}
    flat |= {name: short for name, (short, _, _) in actions.items() if short is not None}
    times = paired(flat, repeats, warmup=1)
    return {
        name: [
            (long - (statistics.median(times[name]) if short is not None else 0)) / steps
            for long in times[f"{name} long"]
        ]
        for name, (short, _, steps) in actions.items()
    }


def replays_of(
    engines: dict[str, Engine], batch: int, repeats: int, recordings: tuple[str, ...] = ("sedac",)
) -> dict[str, list[float]]:
    """Seconds of a captured decode step of stock and of each recording of SEDAC's ("sedac": the one that is picked),
    `[repeats]`, in turns, after a round that is not counted."""
    for engine in engines.values():
        engine.run([engine.prompt(8, seed) for seed in range(batch)], 4)
    actions = {"stock": partial(engines["stock"].replays, batch)}
    actions |= {name: partial(engines["sedac"].replays, batch, name) for name in recordings}
    return in_turns(actions, repeats)
