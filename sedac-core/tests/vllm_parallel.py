"""Runs vLLM's workers in processes of their own, for test_vllm.py: `vllm_parallel.py MODEL WORKERS`, prompts as JSON on stdin.

Prints what greedy sampling answers and what each worker counted. SEDAC comes by its plugin, as with a user. `AS_A_GPU` in the environment is
"interpreted" where each process is to have a GPU's runtime, whose kernels Triton interprets, and "real" where each has a GPU, whose large steps are
to gather rows however small the model: a plugin of this file's, `as_a_gpu`, sees to either.
"""

import json
import os
import sys

import vllm_worker

GPU = os.environ.get("AS_A_GPU")


def as_a_gpu() -> None:
    if GPU == "interpreted":
        vllm_worker.interpret_the_gpus_kernels("plain")
    elif GPU == "real":
        from sedac_core import gpu_cascade

        gpu_cascade.GATHER_FROM = 0


def counted(worker) -> list[int]:
    """Forward steps, tokens, MLP rows saved and exits, as this worker counted them; nothing of stock."""
    runtime = worker.model_runner.model.model.sedac
    if runtime is None:
        return []
    if GPU:
        from sedac_core.checkpoint_parts import BY_CHECKPOINT, PER_CHECKPOINT, ROWS_SAVED
        from sedac_core.step_counters import STEPS, TOKENS

        found = runtime.rule.counters
        return [*found[[STEPS, TOKENS, ROWS_SAVED]].tolist(), *found[BY_CHECKPOINT::PER_CHECKPOINT].tolist()]
    found = runtime.counters
    return [found.steps, found.tokens, found.tokens * found.num_layers - found.rows_computed, *found.exits]


def main() -> None:
    from vllm import LLM, SamplingParams

    model, workers = sys.argv[1], int(sys.argv[2])
    options = {"max_model_len": 512, "max_num_batched_tokens": 512, "enable_prefix_caching": False, "dtype": "float32"}
    llm = LLM(model, seed=0, tensor_parallel_size=workers, enforce_eager=True, **options)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in json.load(sys.stdin)], params, use_tqdm=False)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "log_probs": [next(iter(p.values())).logprob for output in outputs for p in output.prompt_logprobs if p],
        "counted": llm.collective_rpc(counted),
    }
    print("ANSWER", json.dumps(found))


if __name__ == "__main__":
    os.environ.update(vllm_worker.ENVIRONMENT)
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(int(sys.argv[2]))))}
    main()
