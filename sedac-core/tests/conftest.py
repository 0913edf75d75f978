"""What the tests share: two real models on disk, and a way to run SEDAC's scripts as a person does."""

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for each other
INTERPRETED = not shutil.which("nvidia-smi")  # kernels run in Triton's interpreter where there is no GPU
if importlib.util.find_spec("triton") and INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and the kernels are first imported, so before all tests
    importlib.import_module("sedac_core.kernels")
    importlib.import_module("sedac_core.checkpoint_kernels")
    del os.environ["TRITON_INTERPRET"]  # a server that a test starts is not interpreted


@pytest.fixture
def interpreter(monkeypatch):
    """For tests that run kernels: running them asks again whether to interpret them."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a random Qwen2ForCausalLM in float32: 6 layers, hidden 64, one token a byte, with a chat template.

    Its weights are large enough that tokens differ; its heads (2 of 32, 1 for keys) are ones that vLLM runs on CPUs.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=512,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )
    config = Qwen2Config(
        vocab_size=len(names) + 5,  # 264: a multiple of 8
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
        eos_token_id=2,
        pad_token_id=2,
        dtype=torch.float32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The embedded default model's folder: the first use downloads it, so tests that take it are marked slow."""
    from sedac_core import demo_model

    return demo_model.path()


@pytest.fixture(scope="session")
def script():
    """`script("test_v6_local.py", "--level", 0.5)` runs it from the repo's root; returns the finished process."""

    def run(name: str, *arguments, timeout: float = 300, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / name, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **options)

    return run


def run_main(name: str, *arguments) -> None:
    """Run a script's main in this process, with these arguments."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(name).stem}", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        spec.loader.exec_module(module)
        module.main()


@pytest.fixture
def call(capsys):
    """`call("test_v6_local.py", "--level", 0.5)` runs a script's main here; returns its stdout and last line's JSON.

    What it raises (`SedacError`, argparse's `SystemExit`) comes through.
    """

    def run(name: str, *arguments) -> tuple[str, dict]:
        capsys.readouterr()
        run_main(name, *arguments)
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model, tmp_path_factory) -> Path:
    """A folder of the tiny model after steps 1 and 2, made by the scripts themselves: checkpoints 1 and 3, rank 16.

    Read only: copy it (shutil.copytree) to change it.
    """
    folder = tmp_path_factory.mktemp("tiny_artifact")
    text = ["--dataset", "pydoc", "--samples", 48, "--max-length", 96, "--batch-size", 16]
    run_main("collect_multilayer_data.py", "--model", tiny_model, "--layers", "1,3", "--save-dir", folder, *text)
    run_main("train_multilayer_probes.py", "--data-dir", folder, "--layers", "1,3", "--rank", 16, "--held-out", 0.3)
    return folder


@pytest.fixture(scope="session")
def three_checkpoints(tiny_model, tmp_path_factory) -> Path:
    """Three checkpoints, whose random probes see risks on both sides of every preset's thresholds."""
    import torch
    from transformers import AutoConfig

    from sedac_core.artifacts import Fingerprint, Manifest, probe_path, save_tensor
    from sedac_core.probe import LREProbe

    folder = tmp_path_factory.mktemp("three_checkpoints")
    with torch.random.fork_rng():
        for layer in (1, 2, 3):
            torch.manual_seed(layer)
            probe = LREProbe(64, 16)
            torch.nn.init.normal_(probe.head.weight, std=0.35)
            torch.nn.init.constant_(probe.head.bias, 0.8)
            save_tensor(probe.state_dict(), probe_path(folder, layer))
    fingerprint = Fingerprint.of(AutoConfig.from_pretrained(tiny_model))
    manifest = Manifest(str(tiny_model), fingerprint, (1, 2, 3), rank=16, keep_last=1)
    manifest.thresholds = {1: 1.0, 2: 1.3, 3: 1.7}
    manifest.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_damage(tiny_model, tmp_path_factory) -> Path:
    """The same with checkpoints 0 and 2 and the last layer whole, where the probes estimate damage. Read only."""
    folder = tmp_path_factory.mktemp("tiny_damage")
    text = ["--dataset", "pydoc", "--samples", 24, "--max-length", 96, "--target", "damage", "--keep-last", 1]
    run_main("collect_multilayer_data.py", "--model", tiny_model, "--layers", "0,2", "--save-dir", folder, *text)
    run_main("train_multilayer_probes.py", "--data-dir", folder, "--layers", "0,2", "--rank", 16, "--held-out", 0.3)
    run_main("sedac_calibrate.py", "--probe-dir", folder, "--exit-rates", "0.1,0.3")
    return folder


@pytest.fixture(scope="session")
def gates_text(tmp_path_factory) -> Path:
    """400 paragraphs of Python's documentation, a document each."""
    from sedac_core.collection import read_documents

    paragraphs = [p for text in read_documents("pydoc") for p in text.split("\n\n") if len(p) > 150]
    path = tmp_path_factory.mktemp("text") / "paragraphs.jsonl"
    path.write_text("\n".join(json.dumps({"text": p}) for p in paragraphs[:400]))
    return path


@pytest.fixture(scope="session")
def gates_options(tiny_model, gates_text):
    """`gates_options(folder, steps)`: the command line of a short training of the tiny model."""

    def make(folder, steps=60, *more):
        return ["--policy", "gates", "--model", tiny_model, "--dataset", gates_text, "--data-dir", folder,
                "--steps", steps, "--max-length", 64, "--batch-size", 512, "--adapter-rank", 4, "--lr", 5e-3, "--gate-lr", 1e-2,
                "--levels", "1,0.5,0.25,0", "--budgets", "0.125,0.25,0.4", "--held-out", 0.5, *more]  # fmt: skip

    return make


@pytest.fixture(scope="session")
def tiny_gates(gates_options, tmp_path_factory) -> Path:
    """A gates artefact of the tiny model, trained by the script. Read only."""
    folder = tmp_path_factory.mktemp("tiny_gates")
    run_main("train_multilayer_probes.py", *gates_options(folder))
    return folder


@pytest.fixture(scope="session")
def vllm_worker():
    """Gives a job to vllm_worker.py, which forks a process for it; returns its exit code.

    Tests that use it belong to the xdist_group "one worker": starting it costs ten seconds.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SEDAC_", "VLLM_"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    script = Path(__file__).with_name("vllm_worker.py")
    with subprocess.Popen([sys.executable, script], env=clean, **pipes) as process:

        def run(job: Path) -> int:
            print(job, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture
def vllm(vllm_worker, tmp_path):
    """`vllm(model, [prompts], SEDAC_THRESHOLDS="0,0")` runs them greedily in a fresh process; returns its answer. A dict in
    place of prompts is what an admin call changes; `gpu` is a GPU's runtime, its kernels interpreted (or how it runs: vllm_worker.py);
    `lora` the folder of the adapter that each prompt of a batch uses, or None."""
    runs = iter(range(100))

    def run(model, *batches, patched=True, sampling=None, llm=None, gpu=False, lora=None, **environment):
        folder = tmp_path / f"run{next(runs)}"
        folder.mkdir()
        job = {
            "folder": str(folder),
            "answer": str(folder / "answer.json"),
            "model": str(model),
            "patched": patched,
            "gpu": gpu,
            "lora": lora,
            "environment": environment,
            "llm": {"enforce_eager": True, **(llm or {})},
            "batches": [
                {"change": prompts}
                if isinstance(prompts, dict)
                else {"prompts": prompts, "sampling": sampling or {"max_tokens": 16, "ignore_eos": True}}
                for prompts in batches
            ],
        }
        (folder / "job.json").write_text(json.dumps(job))
        assert vllm_worker(folder / "job.json") == 0, (folder / "log.txt").read_text()[-4000:]
        return json.loads((folder / "answer.json").read_text()) | {"log": (folder / "log.txt").read_text()}

    return run


def prompts(count: int, length: int, vocabulary: int = 256, seed: int = 0) -> list[list[int]]:
    """Random token ids of the tiny model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator).tolist()


@pytest.fixture
def full_disk():
    """`with full_disk(4000):` no file that this process writes grows over so many bytes: as if the disk were full."""

    @contextlib.contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def patched_vllm():
    """The installed vLLM carries this SEDAC's patch during the test, and afterwards what it carried before.

    Tests that use it belong to one xdist_group, so that none reverts it under another.
    """
    from sedac_core import vllm_patch

    target = vllm_patch.find_target()
    was = vllm_patch.Target.read(target).state()
    vllm_patch.patch(target)
    yield
    if was == "stock":
        vllm_patch.revert(target)


@pytest.fixture(scope="module")
def stock_vllm():
    """The installed vLLM's file is stock during a module's tests, so that servers are patched in memory, by the plugin.

    The same group as for `patched_vllm`.
    """
    from sedac_core import vllm_patch

    target = vllm_patch.find_target()
    was = vllm_patch.Target.read(target).state()
    vllm_patch.revert(target)
    yield
    if was == "patched":
        vllm_patch.patch(target)


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model in transformers, and its tokenizer."""
    from sedac_core import collection

    return collection.load_model(str(tiny_model))
