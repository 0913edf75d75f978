"""vLLM's own way in: the entry point `vllm.general_plugins`, which vLLM calls in each of its processes.

Where SEDAC_ENABLED=1 it applies the text patch of vllm_patch.py to qwen2.py in memory, as Python imports it, unless the
file carries it already, and lets requests choose (vllm_requests.py). Nothing is written to site-packages. It also sees to it
that no model is served that was loaded without SEDAC, that a full disk under the metrics does not end the process, and that a
server whose engine died ends with an error.
"""

import atexit
import functools
import inspect
import linecache
import multiprocessing
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from . import vllm_patch
from .cli import SedacError
from .settings import Settings

MODULE = "vllm.model_executor.models.qwen2"
registered = False


def register() -> None:
    """What the entry point names. vLLM may call it more than once; with SEDAC off it does nothing."""
    global registered
    if registered or not switched_on():
        return
    Settings.from_env()  # a misspelt variable stops the start here, not after the model has loaded
    patch_on_import()
    from . import metrics, vllm_requests

    metrics.survive_a_full_folder()
    fail_with_the_engine()
    refuse_models_without_sedac()
    vllm_requests.install()
    registered = True


def switched_on() -> bool:
    return os.environ.get("SEDAC_ENABLED", "0") not in ("", "0")


def require_registered() -> None:
    """For the worker: requests' choices must have been taken care of where they come in."""
    if registered:
        return
    if multiprocessing.parent_process() is not None:
        raise SedacError(
            "vLLM did not load SEDAC's plugin, so requests' own 'sedac' arguments would be ignored: install the package "
            "(pip install ./sedac-core), leave VLLM_PLUGINS unset or name sedac in it, and do not start an engine with SEDAC "
            "from a process that has made one without"
        )
    register()  # an engine inside the user's own process, whose way in was not watched when it started
    from . import vllm_requests

    vllm_requests.refusal = "'sedac' cannot be chosen: SEDAC's plugin was not loaded when the engine started"


def patch_on_import() -> None:
    """See to it that vLLM's qwen2 is imported with SEDAC's lines in it, whatever becomes of the file until then."""
    loaded = sys.modules.get(MODULE)
    if loaded is not None:
        if "mlp" not in inspect.signature(loaded.Qwen2DecoderLayer.forward).parameters:  # the patch's argument
            raise SedacError(f"{MODULE} was imported before SEDAC could patch it: run python patch_vllm_surgical.py")
    else:
        vllm_patch.patched_text(vllm_patch.find_target())  # a vLLM that cannot be patched stops the start here
        sys.meta_path.insert(0, PatchingFinder())


def fail_with_the_engine() -> None:
    """vLLM's server ends with exit code 0 when its engine has died under it: make that 1, for whoever supervises it."""
    from vllm.v1.engine.core_client import BackgroundResources

    clean_up, died = BackgroundResources.__call__, []

    def note_and_clean_up(self: BackgroundResources) -> None:
        if self.engine_dead:  # before anyone asked it to stop
            died.append(self)
        clean_up(self)

    def end() -> None:
        if died:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    BackgroundResources.__call__ = note_and_clean_up
    atexit.register(end)  # early, so that it runs late


def refuse_models_without_sedac() -> None:
    """A model that is not made of SEDAC's qwen2 would be served as stock, and nothing would say so: stop the start."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from .vllm_requests import runtimes_of

    initialize = WorkerWrapperBase.initialize_from_config

    @functools.wraps(initialize)
    def initialize_from_config(self: WorkerWrapperBase, *args: Any, **kwargs: Any) -> Any:  # the model is there
        # Asked again, since a stock engine may be made after SEDAC's in the same process.
        if switched_on() and not runtimes_of(self.vllm_config):
            name = self.vllm_config.model_config.architecture
            raise SedacError(
                f"SEDAC is on, but vLLM loaded {name} without it: choose a Qwen2 or Qwen2.5 model, or unset SEDAC_ENABLED"
            )
        return initialize(self, *args, **kwargs)

    WorkerWrapperBase.initialize_from_config = initialize_from_config


class PatchingFinder(MetaPathFinder):
    """Finds qwen2 where Python finds it, and has its text patched on the way in where it is not yet."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = PatchingLoader(fullname, spec.origin)
        return spec


class PatchingLoader(SourceFileLoader):
    """Compiles the patched text. Nothing is cached on disk, and what shows source lines shows the patched ones."""

    def get_source(self, fullname: str) -> str:
        return vllm_patch.patched_text(Path(self.path))

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_source(fullname)
        linecache.cache[self.path] = (len(source), None, source.splitlines(True), self.path)
        return compile(source, self.path, "exec", dont_inherit=True)
