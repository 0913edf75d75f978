"""What one request may ask for: `vllm_xargs {"sedac": "off"}` or a preset's name, beside others in one batch.

In the process that takes requests, a wrong value is refused and the KV blocks of a request that chose something are
salted by its choice, so that prefix caching never hands it blocks computed under another policy. In the worker the runtime
follows which requests chose what, and before each forward step, where vLLM writes the step's own inputs, the row of the
policy's table for each token is written into a buffer on the device, which operators and captured graphs read.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fastapi import HTTPException
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from .artifacts import Manifest
from .cli import SedacError
from .control import Change
from .policy import choices
from .settings import Settings

logger = init_logger("vllm.sedac")

ARGUMENT = "sedac"
SALT = "sedac:"  # starts the cache salt of requests that chose something, and of no others
FIRST, SECOND = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"  # for CPUs as well


def choice_of(params: SamplingParams) -> Any:
    """What a request asks of SEDAC; None if nothing."""
    return params.extra_args.get(ARGUMENT) if params.extra_args else None


class PerRequest:
    """The part of a runtime that knows what the requests of the step under way chose."""

    choices: tuple[str, ...] = ()  # names that a request may ask for; row i + 1 of the policy's table is the i-th
    chosen: dict[str, str]  # by the id of the request, of those that chose something
    token_rows: Tensor  # [most tokens of a step], int32: each token's row of the policy's table
    some_chose = False  # whether that holds anything but zeros
    # Ids of requests that use a LoRA adapter, which probes do not know: they are as if they had chosen "off".
    adapted: set[str]
    # Whether the step under way has one: vLLM finds a row's adapter by its place, so no rows are gathered.
    some_adapted = False

    def state(self) -> dict[str, Any]:
        """What is in force, as JSON."""
        raise NotImplementedError

    def change(self, change: Change) -> None:
        """Put other settings in force between two steps."""
        raise NotImplementedError

    def log_change(self, before: dict[str, Any]) -> None:
        """Every change of a running server stands in its log, old and new; `before` is what `state` said."""
        now = self.state()
        for name in [*before, *(name for name in now if name not in before)]:
            if before.get(name) != now.get(name):
                logger.info("SEDAC changed by an admin call: %s was %s, is %s", name, before.get(name), now.get(name))

    def make_room(self, tokens: int, device: Any) -> None:
        """For steps of up to so many tokens. Captured graphs read the buffer, so it is made once."""
        self.chosen, self.token_rows = {}, torch.zeros(tokens, dtype=torch.int32, device=device)
        self.adapted = set()

    def begin_step(self, requests: Sequence[str], tokens: np.ndarray) -> None:
        """A step of these requests in their order follows, with so many tokens `[requests]` of each.

        The copy waits for nothing, and its page of pinned memory is its own until it is done. Where nobody chose
        anything nothing is written; what lies behind the step's tokens is padding, whose rows nobody cares about.
        """
        rows = [1 + self.choices.index(self.chosen[name]) if name in self.chosen else 0 for name in requests]
        self.some_adapted = not self.adapted.isdisjoint(requests)
        if any(rows):
            host = torch.empty(int(tokens.sum()), dtype=torch.int32, pin_memory=self.token_rows.is_cuda)
            host.numpy()[:] = np.repeat(rows, tokens)
            self.token_rows[: len(host)].copy_(host, non_blocking=True)
            self.some_chose = True
        elif self.some_chose:
            self.token_rows.zero_()
            self.some_chose = False

    def rows_chosen(self, tokens: int) -> Tensor | None:
        """Each token's row of the policy's table `[tokens]`, int32; None where all are row 0, what is in force."""
        return self.token_rows[:tokens] if self.some_chose else None


def runtimes_of(vllm_config: Any) -> list[PerRequest]:
    """SEDAC's runtimes in the model that was loaded by this configuration."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, PerRequest)]


def runtimes(runner: Any) -> list[PerRequest]:
    """The same of the model of one of vLLM's model runners."""
    if not hasattr(runner, "sedac"):
        runner.sedac = runtimes_of(runner.vllm_config)
    return runner.sedac


followed: set[type] = set()  # model runners


def follow_batches(vllm_config: Any) -> None:
    """Have vLLM's model runners, of which this process has loaded one or both, tell the runtimes what runs. Once."""
    known = list(model_runners())
    second = getattr(vllm_config, "use_v2_model_runner", os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")
    if second and not any(runner.__module__ == SECOND for runner, *_ in known):
        raise SedacError(
            "SEDAC cannot follow requests in this vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0, or unset "
            "SEDAC_ENABLED"
        )
    for runner, update, prepare, batch in known:
        if runner not in followed:
            followed.add(runner)
            setattr(runner, update, following(getattr(runner, update)))
            setattr(runner, prepare, announcing(getattr(runner, prepare), batch))


def model_runners() -> Iterator[tuple[type, str, str, Any]]:
    """Each model runner that is loaded, its methods that take up requests and that write a step's inputs, and how the second
    one's arguments name the requests of the step and the tokens of each."""
    first = sys.modules.get(FIRST)
    if first is not None:
        yield (
            first.GPUModelRunner,
            "_update_states",
            "_prepare_inputs",
            lambda runner, output, tokens: (runner.input_batch.req_ids, tokens),
        )
    second = sys.modules.get(SECOND)
    if second is not None and hasattr(second, "BatchReqState"):
        yield (
            second.GPUModelRunner,
            "add_requests",
            "prepare_inputs",
            lambda runner, output, batch, *_: (batch.req_ids, batch.num_scheduled_tokens),
        )


def following(update: Callable) -> Callable:
    @functools.wraps(update)
    def follow(runner: Any, output: Any) -> Any:  # vLLM's SchedulerOutput
        for runtime in runtimes(runner):
            for name in output.finished_req_ids:
                runtime.chosen.pop(name, None)
                runtime.adapted.discard(name)
            for request in output.scheduled_new_reqs:
                choice = choice_of(request.sampling_params) if request.sampling_params else None
                if request.lora_request is not None:
                    runtime.adapted.add(request.req_id)
                    choice = "off"
                if choice is not None:
                    runtime.chosen[request.req_id] = choice
        return update(runner, output)

    return follow


def announcing(prepare: Callable, batch: Callable) -> Callable:
    @functools.wraps(prepare)
    def announce(runner: Any, *args: Any, **kwargs: Any) -> Any:
        for runtime in runtimes(runner):
            if runtime.chosen or runtime.some_chose:
                runtime.begin_step(*batch(runner, *args, **kwargs))
        return prepare(runner, *args, **kwargs)

    return announce


@functools.cache
def allowed() -> tuple[str, ...]:
    """The names that a request may ask for, of the artefact that this process's environment names."""
    settings = Settings.from_env()
    return choices(settings, Manifest.load(settings.probe_dir))


class Refused(VLLMValidationError, HTTPException):
    """Answered as HTTP 400. vLLM 0.20 leaves its own validation errors to Starlette's last resort, which answers, raises again
    and so has the connection closed under the client's next request; HTTPException has a handler of its own."""

    def __init__(self, said: str, parameter: str):
        HTTPException.__init__(self, 400, said)
        self.args, self.parameter, self.value = (said,), parameter, None

    def __str__(self) -> str:
        return f"{self.detail} (parameter={self.parameter})"


refusal: str | None = None  # why this server takes no choices at all


def check(choice: Any) -> None:
    """Refuse, as HTTP 400, a choice that this server does not know, or any where it takes none."""
    if choice is not None and (refusal or choice not in allowed()):
        said = refusal or f"'sedac' must be one of {', '.join(allowed())}, found {choice!r}"
        raise Refused(said, "vllm_xargs")


def salted(salt: str | None, choice: str | None) -> str | None:
    """The cache salt under which a request's KV blocks are shared: with those of the same choice and own salt alone."""
    if salt is not None and salt.startswith(SALT):
        raise Refused(f"cache_salt must not start with {SALT!r}", "cache_salt")
    return salt if choice is None else f"{SALT}{choice}:{salt or ''}"


def install() -> None:
    """Put all of this into the vLLM of this process, before it makes an engine. Once."""
    make, start, process = SamplingParams.from_optional, InputProcessor.__init__, InputProcessor.process_inputs

    @functools.wraps(make)
    def from_optional(*args: Any, **kwargs: Any) -> SamplingParams:  # every endpoint's way to its parameters
        params = make(*args, **kwargs)
        check(choice_of(params))
        return params

    @functools.wraps(start)
    def __init__(self: InputProcessor, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
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
                raise Refused("'sedac' cannot be chosen with use_beam_search", "vllm_xargs")
            return make(self, *args, **kwargs)

        kind.to_beam_search_params = to_beam_search_params
