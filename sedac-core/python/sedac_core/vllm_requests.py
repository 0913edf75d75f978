"""What one request may ask for: `vllm_xargs {"sedac": "off"}` or a preset's name, beside others in one batch.

In the process that takes requests, a wrong value is refused and the KV blocks of a request that chose something are
salted by its choice, so that prefix caching never hands it blocks computed under another policy. In the worker a logits
processor, which changes no logits, learns which rows of the batch chose what, and the runtime asks it for the row of the
policy's table for each token.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.sampling_params import SamplingParams
from vllm.v1 import sample
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from .artifacts import Manifest
from .control import Change
from .policy import choices
from .settings import Settings

ARGUMENT = "sedac"
SALT = "sedac:"  # starts the cache salt of requests that chose something, and of no others


def choice_of(params: SamplingParams) -> Any:
    """What a request asks of SEDAC; None if nothing."""
    return params.extra_args.get(ARGUMENT) if params.extra_args else None


class PerRequest:
    """The part of a runtime that knows what the requests of the step under way chose."""

    choices: tuple[str, ...] = ()  # names that a request may ask for; row i + 1 of the policy's table is the i-th
    chosen: Mapping[int, str] = MappingProxyType({})  # by the place in the batch, of the requests that chose something

    def state(self) -> dict[str, Any]:
        """What is in force, as JSON."""
        raise NotImplementedError

    def change(self, change: Change) -> None:
        """Put other settings in force between two steps."""
        raise NotImplementedError

    def rows_chosen(self, tokens: int) -> Tensor | None:
        """Each token's row of the policy's table `[tokens]`, int64; None where all are row 0, what is in force."""
        metadata = get_forward_context().attn_metadata if self.chosen else None
        if not metadata:  # a dummy run of vLLM's has none
            return None
        start = next(iter(metadata.values())).query_start_loc.tolist()  # [requests + 1]
        rows = torch.zeros(tokens, dtype=torch.int64)
        for request, name in self.chosen.items():
            rows[start[request] : start[request + 1]] = 1 + self.choices.index(name)
        return rows


class RequestChoices(LogitsProcessor):
    """Follows the batch from step to step and tells the model's runtime what its requests chose."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.layers = vllm_config.compilation_config.static_forward_context
        self.chosen: dict[int, str] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def update_state(self, batch_update: Any) -> None:
        if process_dict_updates(self.chosen, batch_update, lambda params, *_: choice_of(params)):
            for layer in self.layers.values():
                if isinstance(layer, PerRequest):
                    layer.chosen = self.chosen


@functools.cache
def allowed() -> tuple[str, ...]:
    """The names that a request may ask for, of the artefact that this process's environment names."""
    settings = Settings.from_env()
    return choices(settings, Manifest.load(settings.probe_dir))


refusal: str | None = None  # why this server takes no choices at all


def refusal_of(vllm_config: Any) -> str | None:
    """Why a server of this configuration takes no choices of requests, if it does not."""
    device = vllm_config.device_config.device_type
    if device != "cpu":
        return f"this server takes no 'sedac' argument: it runs on {device}, and choices by request are for CPUs so far"
    if getattr(vllm_config, "use_v2_model_runner", False):
        return "this server takes no 'sedac' argument: start it with VLLM_USE_V2_MODEL_RUNNER=0"
    return None


def check(choice: Any) -> None:
    """Refuse, as HTTP 400, a choice that this server does not know, or any where it takes none."""
    if choice is not None and (refusal or choice not in allowed()):
        said = refusal or f"'sedac' must be one of {', '.join(allowed())}, found {choice!r}"
        raise VLLMValidationError(said, parameter="vllm_xargs")


def salted(salt: str | None, choice: str | None) -> str | None:
    """The cache salt under which a request's KV blocks are shared: with those of the same choice and own salt alone."""
    if salt is not None and salt.startswith(SALT):
        raise VLLMValidationError(f"cache_salt must not start with {SALT!r}", parameter="cache_salt")
    return salt if choice is None else f"{SALT}{choice}:{salt or ''}"


def install() -> None:
    """Put all of this into the vLLM of this process, before it makes an engine. Once."""
    sample.logits_processor.BUILTIN_LOGITS_PROCESSORS.append(RequestChoices)
    make, start, process = SamplingParams.from_optional, InputProcessor.__init__, InputProcessor.process_inputs

    @functools.wraps(make)
    def from_optional(*args: Any, **kwargs: Any) -> SamplingParams:  # every endpoint's way to its parameters
        params = make(*args, **kwargs)
        check(choice_of(params))
        return params

    @functools.wraps(start)
    def __init__(self: InputProcessor, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        global refusal
        refusal = refusal_of(vllm_config)
        allowed()  # read now what the manifest says: it may be gone when the first request asks
        refuse_in_beam_search()
        start(self, vllm_config, *args, **kwargs)

    @functools.wraps(process)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:  # every request's way to the engine
        request = process(self, *args, **kwargs)
        choice = choice_of(request.sampling_params) if request.sampling_params else None
        check(choice)
        request.cache_salt = salted(request.cache_salt, choice)
        return request

    SamplingParams.from_optional = staticmethod(from_optional)
    InputProcessor.__init__ = __init__
    InputProcessor.process_inputs = process_inputs


def refuse_in_beam_search() -> None:
    """Beam search drops a request's extra arguments: refuse ours there, which would be ignored."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for kind in (ChatCompletionRequest, CompletionRequest):
        make = kind.to_beam_search_params
        if hasattr(make, "__wrapped__"):
            continue

        @functools.wraps(make)
        def to_beam_search_params(self: Any, *args: Any, make: Any = make, **kwargs: Any) -> Any:
            if self.vllm_xargs and ARGUMENT in self.vllm_xargs:
                raise VLLMValidationError("'sedac' cannot be chosen with use_beam_search", parameter="vllm_xargs")
            return make(self, *args, **kwargs)

        kind.to_beam_search_params = to_beam_search_params
