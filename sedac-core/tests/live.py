"""What the tests of live servers share: servers as the launcher starts them, and a client."""

import sys
from pathlib import Path

import openai
from conftest import ROOT

from sedac_core import serving

KEY = "sedac-test-key"
EAGER = ["--enforce-eager"]
VLLM = ["--dtype", "float32", "--max-model-len", 512, "--max-num-batched-tokens", 512]
KEYED = ["--api-key", KEY]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "SEDAC_LOG_EVERY": "0"}


def started(name: str, model: Path, folder: Path, options: list, vllm: list = (), settings=None) -> serving.Server:
    port = serving.free_port()
    launcher = [sys.executable, ROOT / "sedac_start_server.py", "--model", model, "--port", port]
    command = [*launcher, *options, "--", *VLLM, *vllm]
    log, environment = folder / f"{name}.log", SETTINGS | (settings or {})
    return serving.Server(str(model), log, environment, port=port, command=[str(part) for part in command], name=name)


def client(server: serving.Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def complete(server: serving.Server, prompt: list[int], choice: str | None = None, **options):
    extra = {"ignore_eos": True, "return_token_ids": True}
    if choice is not None:
        extra["vllm_xargs"] = {"sedac": choice}
    options = {"max_tokens": 12, "temperature": 0} | options
    return client(server).completions.create(model=server.model, prompt=prompt, extra_body=extra, **options)


def tokens(answer) -> list[int]:
    return answer.choices[0].token_ids
