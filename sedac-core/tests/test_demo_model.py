"""The embedded default model: where it comes from, and that its conversion loses nothing."""

import os
import stat

import pytest
import torch

from sedac_core import demo_model
from sedac_core.cli import SedacError


def test_only_the_name_default_stands_for_the_embedded_model(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tmp_path / "sedac" / demo_model.FOLDER
    made.mkdir(parents=True)
    assert demo_model.resolve("default") == str(made)
    assert demo_model.resolve("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"
    assert demo_model.resolve("./default") == "./default"


def fake_installer(tmp_path, monkeypatch, script: str):
    """An installer that is no pip: what it does is the shell line `script`, with the target folder as $t."""
    tool = tmp_path / "installer"
    tool.write_text(f'#!/bin/sh\nt=$4; mkdir -p "$t"\n{script}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(demo_model, "_installers", lambda: [[str(tool)]])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "could not be downloaded"),
        ("exit 0", "holds 0"),
        ('echo damaged > "$t/model.gguf"', "sha256 .* expected " + demo_model.SHA256),
    ],
)
def test_a_download_that_fails_or_is_damaged_leaves_nothing_behind(tmp_path, monkeypatch, script, message):
    fake_installer(tmp_path, monkeypatch, script)
    with pytest.raises(SedacError, match=message):
        demo_model.path()
    assert [p.name for p in (tmp_path / "cache" / "sedac").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(SedacError, match=r"/proc/nowhere/sedac .*set XDG_CACHE_HOME"):
        demo_model.path()


def test_an_environment_without_pip_finds_another_installer(monkeypatch):
    found = list(demo_model._installers())
    assert found, "neither pip, uv nor Python's bundled pip"
    assert all(os.path.exists(command[0]) for command in found)


@pytest.mark.slow
def test_its_logits_are_the_source_models_bit_for_bit(demo_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sedac_core.demo_model import download

    gguf = download(tmp_path)
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(demo_model)
    assert type(source).__name__ == "LlamaForCausalLM"
    assert type(converted).__name__ == "Qwen2ForCausalLM" and converted.dtype == torch.float32

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    original = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = "Numbers 123, café, tabs\tand <|im_start|>special tokens<|im_end|>\n    def f(): return 1"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(source(ids).logits, converted(ids).logits)


@pytest.mark.slow
def test_it_chats_and_stops(demo_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(demo_model), AutoTokenizer.from_pretrained(demo_model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    answer = tokenizer.decode(out)
    assert "Paris" in answer and answer.endswith("<|im_end|>"), answer
