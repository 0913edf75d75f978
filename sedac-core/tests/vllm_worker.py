"""Runs vLLM for test_vllm.py and test_vllm_gates.py: imports it once, and forks a process for each job, a path read from stdin.

When a job is over, its exit code stands on stdout and its answer in the file that the job names. The installed vLLM is not
touched: its stock qwen2.py, patched or not as the job says, is loaded from a folder of the job.
"""

import contextlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "VLLM_USE_AOT_COMPILE": "0",  # vLLM compiles again where it cannot load what it stored
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    os.environ.update(ENVIRONMENT)
    with interpreted(), contextlib.suppress(ImportError):
        import triton.language  # noqa: F401
    import vllm.v1.engine.llm_engine  # the slow part of a start: ten seconds
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                run(json.loads(Path(line.strip()).read_text()))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(job: dict) -> None:
    with open(Path(job["folder"]) / "log.txt", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(job["environment"])
    load_qwen2(Path(job["folder"]), job["patched"])
    if job["gpu"]:
        interpret_the_gpus_kernels(job["gpu"])
    from vllm import LLM, SamplingParams

    options = {"max_model_len": 512, "max_num_batched_tokens": 512, "enable_prefix_caching": False, "dtype": "float32"}
    adapters = job["lora"] and adapters_of(job["lora"])
    llm = LLM(job["model"], seed=0, **options | job["llm"] | ({"enable_lora": True} if adapters else {}))
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    runtime = getattr(runner.model.model, "sedac", None)
    gates = hasattr(runtime, "gate") or hasattr(runtime, "gated_mlp")
    kind, record = ("levels", record_levels) if gates else ("margins", record_margins)
    decisions = record(runtime) if runtime and not job["gpu"] else None
    polled = seen_by_hand(runtime) if job["gpu"] else None
    answer = {"batches": []}
    for batch in job["batches"]:
        if polled and polled.advance(runtime, *polled.buffers):
            polled.steer(runtime)
        if "change" in batch:
            answer["batches"].append(changed(runtime, batch["change"]))
            continue
        sampling = batch["sampling"]  # of all prompts, or a list, of each
        each = sampling if isinstance(sampling, list) else [sampling] * len(batch["prompts"])
        params = [SamplingParams(temperature=0, **own) for own in each]
        if decisions is not None:
            decisions.clear()
        asked = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        outputs = llm.generate(asked, params, use_tqdm=False, lora_request=adapters)
        answer["batches"].append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "prompt_logprobs": [
                    [next(iter(p.values())).logprob for p in (output.prompt_logprobs or []) if p] for output in outputs
                ],
                kind: decisions and [list(step) for step in decisions],
            }
        )
    if polled:
        polled.advance(runtime, *polled.buffers)
    if runtime:
        counters = runtime.counters
        names = ("steps", "tokens", "levels") if gates else ("steps", "tokens", "exits", "rows_computed")
        answer["counters"] = {name: getattr(counters, name) for name in names}
        answer["metrics"] = told()
        answer["shares"] = list(runtime.pick.shares) if job["gpu"] else None
        answer["whole"] = sorted({found.func.__name__ for found in runtime.whole.values()}) if job["gpu"] else None
        answer["layers_whole"] = len(runtime.whole) if job["gpu"] else None
        answer["tried"] = tried() if job["gpu"] else None
        answer["results"] = RESULTS
    Path(job["answer"]).write_text(json.dumps(answer))


def adapters_of(folders: list[str | None]) -> list:
    from vllm.lora.request import LoRARequest

    number = {folder: i + 1 for i, folder in enumerate(dict.fromkeys(filter(None, folders)))}
    return [folder and LoRARequest(f"adapter {number[folder]}", number[folder], folder) for folder in folders]


@contextlib.contextmanager
def interpreted():
    """What Triton and modules of kernels are imported in here can be interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    yield
    del os.environ["TRITON_INTERPRET"]


def interpret_the_gpus_kernels(how: bool | str) -> None:
    """Give the model the runtime of a GPU, whose kernels Triton interprets on this CPU: steps of up to 64 tokens run as
    captured ones do, larger ones as those do that are not. `how`: "whole" or "skipping" runs them as that one of two recordings, "zeros tried" as
    where weights are quantised, "zeros apart" as where such layers give no zeros for zeros; "plain" leaves weights as they are on a GPU, and with "plain, dense"
    no step gathers; "compiled": so that vLLM compiles pieces between attentions, and sizes apart at which all MLPs run whole, as on a GPU it does; "sparing": large steps of gates run by kernels only while they narrow; "untimed": nobody timed kernels of levels in bits."""
    import torch

    os.environ["TRITON_INTERPRET"] = "1"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode

    from sedac_core import gpu_cascade, gpu_gates, gpu_mlps, kernels, polling, vllm_runtime
    from sedac_core.policy_gates import GatedWidths

    polling.start = lambda runtime, watch: None  # by hand, between batches
    gpu_cascade.GATHER_FROM = gpu_gates.LARGE_FROM = 1e18 if how in ("plain, dense", "compiled") else 0
    few = kernels.Fused(block_n=32, block_k=32, down_n=32, down_k=32, splits=3, programs_per_sm=1)
    more = kernels.Tiled((16, 32, 32, 4, 2), (32, 32, 32, 4, 2), 2)
    costs = {"dense": 9, "all rows": 10, "all at width 0": 1, "mixed": 9}
    path, us = ("dense", costs) if how in ("whole", "skipping", "sparing") else ("predicated", None)
    kernels.DEFAULTS = {16: kernels.MlpSettings(few, path, us), 512: kernels.MlpSettings(more, path, us)}
    if how != "untimed":
        groups = kernels.Fused(block_n=32, block_k=32, down_n=32, down_k=64, splits=2, programs_per_sm=1)
        kernels.ROUNDED_DEFAULTS = {16: kernels.MlpSettings(groups, path, us), 512: kernels.MlpSettings(few, "dense")}
    if how in ("zeros tried", "zeros apart"):
        gpu_mlps.UnquantizedLinearMethod = type("Other", (), {})  # layers count as quantised
    if how == "zeros apart":
        give_no_zeros(gpu_mlps)
    if how in ("plain", "plain, dense", "compiled"):
        leave_weights_plain()

    def make_runtime(name, model, policy, settings, vllm_config):
        gates = isinstance(policy, GatedWidths)
        if how == "compiled":
            compilation = vllm_config.compilation_config
            compilation.mode, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, []
            compilation.splitting_ops = list(compilation._attention_ops)
            gpu_cascade.why_no_kernels = lambda config: None  # small steps skip, large ones run whole
            FixFunctionalizationPass.__call__ = lambda self, graph: None  # it names operators that a CPU's vLLM lacks
            record_results()
        of_policy = gpu_gates.GpuGates if gates else gpu_cascade.GpuCascade
        runtime = of_policy(name, model, policy, settings, vllm_config)
        if gates and how in ("whole", "skipping"):
            runtime.twice, runtime.pick.captured = True, how == "skipping"
            runtime.large.captured = runtime.pick.captured
        return runtime

    vllm_runtime.make_runtime = make_runtime


def give_no_zeros(gpu_mlps) -> None:
    """Last products that divide by the greatest number of all their inputs, as some quantised ones do: NaN if all are zero."""
    product = gpu_mlps.linear

    def dividing(layer, x):
        greatest = x.abs().max() if "down_proj" in layer.prefix else 1.0
        return product(layer, x / greatest) * greatest

    gpu_mlps.linear = dividing


def tried() -> list[bool]:
    """Whether last products that count as quantised give zeros for zeros."""
    from sedac_core import gpu_mlps

    return sorted(set(gpu_mlps.tried.values()))


RESULTS: list[int] = []  # of each piece that vLLM compiles


def record_results() -> None:
    """See how many results each piece of a compiled model returns."""
    from vllm.compilation.piecewise_backend import PiecewiseBackend

    compile_piece = PiecewiseBackend.__init__

    def recording(self, graph, *args, **kwargs):
        results = graph.graph.output_node().args[0]
        RESULTS.append(len(results) if isinstance(results, tuple) else 1)
        compile_piece(self, graph, *args, **kwargs)

    PiecewiseBackend.__init__ = recording


def leave_weights_plain() -> None:
    """vLLM's linear layers keep their weights, as on a GPU, and do not pack them for this CPU."""
    import torch
    from vllm.model_executor.layers import linear, utils

    linear.dispatch_unquantized_gemm = lambda *backend: utils.default_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
        layer, "cpu_linear", torch.nn.functional.linear
    )


def seen_by_hand(runtime):
    from sedac_core import polling

    return (polling.SeenLevels if hasattr(runtime, "gated_mlp") else polling.Seen)(runtime)


def changed(runtime, change: dict) -> dict:
    """What an admin call is answered."""
    from sedac_core.cli import SedacError
    from sedac_core.control import Change

    try:
        runtime.change(Change.parse(change))
    except SedacError as error:
        return {"error": str(error)}
    return runtime.state() | {"metrics": told()}


def told() -> dict[str, float]:
    """SEDAC's metrics: NaN as 'nan', which JSON has no number for."""
    from prometheus_client import generate_latest

    lines = [line.rsplit(" ", 1) for line in generate_latest().decode().splitlines() if line.startswith("sedac_")]
    return {name: "nan" if value == "NaN" else float(value) for name, value in lines if value != "+Inf"}


def load_qwen2(folder: Path, patched: bool) -> None:
    """Load vLLM's stock qwen2.py, patched or not, under its own name."""
    from sedac_core import vllm_patch

    target = vllm_patch.Target.read(vllm_patch.find_target())
    text = (target.text if target.state() == "stock" else target.original()).decode()
    source = folder / "qwen2.py"
    source.write_text(vllm_patch.apply(text) if patched else text)
    name = "vllm.model_executor.models.qwen2"
    spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    import vllm.model_executor.models

    sys.modules[name] = module
    spec.loader.exec_module(module)
    vllm.model_executor.models.qwen2 = module


def record_margins(runtime) -> list:
    """Every checkpoint's margins for real tokens, in the order of the forward steps: 'exit' once a token has exited."""
    from sedac_core import cpu_cascade

    found = []
    count = runtime.count

    def recording(decided):
        tokens = cpu_cascade.actual_tokens()
        if tokens:
            for margin in decided[1::2, :tokens].tolist():
                found.append(["exit" if m == float("inf") else m for m in margin])
        count(decided)

    runtime.count = recording
    return found


def record_levels(runtime) -> list:
    """Every gate's levels for real tokens, in the order of the layers that have one and of the forward steps."""
    found = []
    gate = runtime.gate

    def recording(x, leader):
        level = gate(x, leader)
        if runtime.tokens:
            found.append(level[: runtime.tokens].tolist())
        return level

    runtime.gate = recording
    return found


if __name__ == "__main__":
    main()
