"""Conditional nodes in a captured CUDA graph: at each MLP a number on the device chooses how many rows it runs for.

Where cuBLAS beats this package's kernels, and for weights that they cannot read, a SWITCH node stands in the graph in place of
an MLP. Each of its bodies is a graph, captured from the model's own MLP for another number of rows: none, the first 128
running ones, 256, and so on (in larger strides where a step has more than 2,048), all. One small kernel reads how many rows run and sets the switches of all MLPs that its
number holds for, as far as they are in the same graph: vLLM captures whole decode steps as one graph, and every other step in
pieces from one attention to the next, where each MLP sets its own.

A node costs 8 to 15 µs where all rows run and 8 where none does, half of it for a body that is not empty (H200,
kernel_settings.json), so it pays for large MLPs only. One of 7B with its bodies takes 0.3 to 0.8 MiB of device memory and 0.7 to
1.7 ms to capture.

A size's bodies run once before it is captured, and the first time a graph of one MLP is captured, replayed and
compared with the plain MLP: a driver or a layer that cannot do this is found before anything depends on it.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import kernels

TILE = 128  # rows of a body, or a multiple: products of fewer read the same weights, and take nearly as long
STRIDES = 16  # at most, between no rows and all
DRIVER = 12080  # the first CUDA version that has switches
BINDINGS = 13  # of cuda-bindings, whose calls took other arguments before
CLOSE = 0.1  # relative error that another number of rows may make, with activations quantised to 8 bits: far from wrong rows

_SOURCE = """
typedef unsigned long long Handle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(Handle handle, unsigned int value);
struct Choice {
  Handle handles[HANDLES];
  const int* running;
  const long long* slots;
  long long* saved;
  int limits[BODIES], rows[BODIES];
  int count, bodies, tokens;
};
extern "C" __global__ void choose(const __grid_constant__ Choice choice) {
  __shared__ int seen;
  int running = *choice.running, body = 0, real = 0;
  while (body < choice.bodies - 1 && choice.limits[body] < running) body++;
  for (int i = threadIdx.x; i < choice.count; i += blockDim.x) cudaGraphSetConditional(choice.handles[i], body);
  for (int i = threadIdx.x; i < choice.tokens; i += blockDim.x) real += !choice.slots || choice.slots[i] >= 0;
  real = __reduce_add_sync(0xffffffff, real);
  if (threadIdx.x == 0) seen = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicAdd(&seen, real);
  __syncthreads();
  if (threadIdx.x == 0) *choice.saved += (long long)(seen - min(seen, choice.rows[body])) * choice.count;
}
"""


@dataclasses.dataclass(frozen=True)
class Body:
    """One way through a node."""

    limit: int  # taken where at most so many rows run, and more than the body before it allows
    rows: int  # that it computes


def bodies_of(tokens: int) -> list[Body]:
    """The bodies of a step of so many tokens, from no rows to all; the last one has no exited row to set to zero."""
    narrow = [Body(rows, rows) for rows in range(0, tokens, stride(tokens))]
    some = [] if narrow[-1].limit == tokens - 1 else [Body(tokens - 1, tokens)]
    return [*narrow, *some, Body(tokens, tokens)]


def stride(tokens: int) -> int:
    """How many rows one body computes more than the one before it."""
    return TILE * -(-tokens // (TILE * STRIDES))


class Unavailable(Exception):
    """Conditional nodes cannot be used here; the message says why."""


class Switches:
    """Builds the nodes of one model's graphs, all captured by one thread."""

    def __init__(self, device: torch.device, layers: int):
        """For at most so many layers that one number of running rows holds for. `Unavailable` where there are no switches."""
        self.layers, self.device = layers, device
        self.runtime, self.driver, self.function = _kernel(device, layers)
        self.side = torch.cuda.Stream(device)  # bodies are captured on it
        self.pool = torch.cuda.MemPool()  # bodies' temporaries: no two bodies run at the same time
        self.decided_in = 0  # the capture in which the last checkpoint ran
        self.handles: dict[int, Any] = {}  # by layer, set but without a node so far
        self.handles_in = 0  # the capture that they belong to
        self.ready: set[int] = set()  # sizes whose bodies have run
        self.scratch = torch.zeros(1, dtype=torch.int64, device=device)

    def checkpoint(self) -> None:
        """A checkpoint has just decided, whether under capture or not."""
        self.decided_in = self._capture(torch.cuda.current_stream(self.device))[0]

    def mlp(
        self,
        x: Tensor,
        rows: Tensor,
        n_running: Tensor,
        layers: Sequence[int],
        whole: Callable[[Tensor], Tensor],
        slots: Tensor | None,
        saved: Tensor,
    ) -> Tensor:
        """Under capture: `whole(x)` `[tokens, hidden]` for the first `n_running` of `rows`, zeros elsewhere, by a node.

        layers: this layer and those after it that the same `n_running` `[1]`, int32, holds for. slots `[tokens]`, int64,
        negative for padding (None: no padding); `saved` `[1]`, int64, grows by the MLP rows of real tokens not computed.
        """
        stream = torch.cuda.current_stream(self.device)
        capture, graph, _ = self._capture(stream)
        if self.handles_in != capture:
            self.handles, self.handles_in = {}, capture
        if layers[0] not in self.handles:
            sets = layers if capture == self.decided_in else layers[:1]
            self.handles = {layer: self._call("cudaGraphConditionalHandleCreate", graph, 0, 0) for layer in sets}
            self._choose(stream, len(x), n_running, slots, saved)
        bodies = bodies_of(len(x))
        graphs = self._node(stream, self.handles.pop(layers[0]), len(bodies))
        out = self._body(graphs[-1], lambda: whole(x))  # the others write into what it makes
        for body, graph in zip(bodies[:-1], graphs[:-1], strict=True):
            self._body(graph, functools.partial(run, body, x, rows, n_running, whole, out))
        return out

    def prepare(self, x: Tensor, whole: Callable[[Tensor], Tensor]) -> None:
        """Before a size is captured, not under capture: run all that its bodies need once. `Unavailable` where the first
        graph captured here does not do what it should."""
        tokens = len(x)
        if tokens in self.ready:
            return
        if not self.ready:
            try:
                self._rehearse(x, whole)
            except RuntimeError as error:
                raise Unavailable(f"a graph with a conditional node failed ({error})") from error
        rows, n_running = torch.arange(tokens, device=x.device), torch.zeros(1, dtype=torch.int32, device=x.device)
        self._run_all(x, rows, n_running, whole)
        self.ready.add(tokens)

    def _run_all(self, x: Tensor, rows: Tensor, n_running: Tensor, whole: Callable[[Tensor], Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        self.side.wait_stream(stream)
        with torch.cuda.stream(self.side), torch.cuda.use_mem_pool(self.pool):
            out = whole(x)
            for body in bodies_of(len(x))[:-1]:
                run(body, x, rows, n_running, whole, out)
        stream.wait_stream(self.side)

    def _rehearse(self, x: Tensor, whole: Callable[[Tensor], Tensor]) -> None:
        """Capture a graph of one MLP on random inputs, and see that each body does what the plain MLP does."""
        tokens, generator = len(x), torch.Generator(x.device).manual_seed(0)
        x = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        rows = torch.randperm(tokens, device=x.device, generator=generator)
        n_running = torch.zeros(1, dtype=torch.int32, device=x.device)
        self._run_all(x, rows, n_running, whole)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):
            self.checkpoint()
            found = self.mlp(x, rows, n_running, (0,), whole, None, self.scratch)
        for body in bodies_of(tokens):
            n_running.fill_(body.limit)
            graph.replay()
            wanted = kernels.zero_exited(whole(x), rows, n_running)
            error = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)
            if not error <= CLOSE or found[rows[body.limit :]].any():
                raise Unavailable(
                    f"a graph with a conditional node was wrong for {body.limit} of {tokens} rows: relative error "
                    f"{error.item():.3g}"
                )

    def _call(self, name: str, *arguments: Any) -> Any:
        return _checked(name, getattr(self.runtime, name)(*arguments))

    def _capture(self, stream: torch.cuda.Stream) -> tuple[int, Any, list[Any]]:
        """The capture under way: a number of its own (0: none), its graph, and what the next node comes after."""
        status, number, graph, after, *_ = self._call("cudaStreamGetCaptureInfo", stream.cuda_stream)
        active = status == self.runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive
        return (int(number), graph, after) if active else (0, None, [])

    def _choose(
        self, stream: torch.cuda.Stream, tokens: int, n_running: Tensor, slots: Tensor | None, saved: Tensor
    ) -> None:
        """Launch the kernel that sets the switches of `handles`."""
        bodies = bodies_of(tokens)
        assert len(self.handles) <= self.layers and len(bodies) <= _MOST_BODIES
        assert n_running.dtype == torch.int32 and saved.dtype == torch.int64 and n_running.numel() == saved.numel() == 1
        assert slots is None or (slots.shape == (tokens,) and slots.dtype == torch.int64 and slots.is_contiguous())
        choice = _choice_type(self.layers)()
        choice.running, choice.saved = n_running.data_ptr(), saved.data_ptr()
        choice.slots = None if slots is None else slots.data_ptr()
        choice.count, choice.bodies, choice.tokens = len(self.handles), len(bodies), tokens
        for i, handle in enumerate(self.handles.values()):
            choice.handles[i] = int(handle)
        for i, body in enumerate(bodies):
            choice.limits[i], choice.rows[i] = body.limit, body.rows
        threads = min(1024, -(-tokens // 32) * 32)
        launched = self.driver.cuLaunchKernel(
            self.function, 1, 1, 1, threads, 1, 1, 0, stream.cuda_stream, ((choice,), (None,)), 0
        )
        _checked("cuLaunchKernel", launched)

    def _node(self, stream: torch.cuda.Stream, handle: Any, size: int) -> list[Any]:
        """Add a switch after what `stream` has captured; returns its empty bodies."""
        runtime = self.runtime
        _, graph, after = self._capture(stream)
        parameters = runtime.cudaGraphNodeParams()
        parameters.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        parameters.conditional.handle = handle
        parameters.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeSwitch
        parameters.conditional.size = size
        parameters.conditional.ctx = _checked("cuCtxGetCurrent", self.driver.cuCtxGetCurrent())
        node = self._call("cudaGraphAddNode", graph, after, None, len(after), parameters)
        instead = int(runtime.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies)
        self._call("cudaStreamUpdateCaptureDependencies", stream.cuda_stream, [node], None, 1, instead)
        return [parameters.conditional.phGraph_out[i] for i in range(size)]

    def _body(self, graph: Any, work: Callable[[], Tensor]) -> Tensor:
        """Capture `work` into an empty body; what it allocates comes from the bodies' pool."""
        side, relaxed = self.side.cuda_stream, self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._call("cudaStreamBeginCaptureToGraph", side, graph, None, None, 0, relaxed)
        try:
            with torch.cuda.stream(self.side), torch.cuda.use_mem_pool(self.pool):
                made = work()
        except BaseException:
            self.runtime.cudaStreamEndCapture(side)
            raise
        self._call("cudaStreamEndCapture", side)
        return made


def run(
    body: Body, x: Tensor, rows: Tensor, n_running: Tensor, whole: Callable[[Tensor], Tensor], out: Tensor
) -> Tensor:
    """What a body does, any but the last: into `out` `[tokens, hidden]`, `whole` of the running rows and zeros elsewhere."""
    if body.rows == 0:
        return out.zero_()
    if body.rows == len(x):
        return kernels.place(whole(x), rows, n_running, out, gathered=False)
    return kernels.place(whole(x.index_select(0, rows[: body.rows])), rows, n_running, out, gathered=True)


_MOST_BODIES = 32


@functools.cache
def _choice_type(layers: int) -> type[ctypes.Structure]:
    """The kernel's parameter."""

    class Choice(ctypes.Structure):
        _fields_ = (
            ("handles", ctypes.c_uint64 * layers),
            ("running", ctypes.c_void_p),
            ("slots", ctypes.c_void_p),
            ("saved", ctypes.c_void_p),
            ("limits", ctypes.c_int * _MOST_BODIES),
            ("rows", ctypes.c_int * _MOST_BODIES),
            ("count", ctypes.c_int),
            ("bodies", ctypes.c_int),
            ("tokens", ctypes.c_int),
        )

    return Choice


def _checked(name: str, result: tuple) -> Any:
    """The values of a CUDA call, or a RuntimeError with its name and what CUDA calls the error."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"{name}: {getattr(error, 'name', error)}")
    return values[0] if len(values) == 1 else values


def _kernel(device: torch.device, layers: int) -> tuple[Any, Any, Any]:
    """The bindings of CUDA's runtime and driver, and the kernel that sets switches; `Unavailable` where one is missing."""
    try:
        import cuda.bindings
        from cuda.bindings import driver, nvrtc, runtime
    except ImportError:
        raise Unavailable("cuda-bindings is not installed (pip install cuda-bindings)") from None
    version = cuda.bindings.__version__
    if int(version.split(".")[0]) < BINDINGS:
        raise Unavailable(f"cuda-bindings {version} is older than {BINDINGS}")
    try:
        found = _checked("cudaDriverGetVersion", runtime.cudaDriverGetVersion())
        if found < DRIVER:
            raise Unavailable(
                f"the NVIDIA driver is for CUDA {_dotted(found)}, and conditional nodes need {_dotted(DRIVER)}"
            )
        torch.zeros(1, device=device)  # makes the context current
        code = _compiled(nvrtc, torch.cuda.get_device_capability(device), layers)
        module = _checked("cuModuleLoadData", driver.cuModuleLoadData(code))
        return runtime, driver, _checked("cuModuleGetFunction", driver.cuModuleGetFunction(module, b"choose"))
    except RuntimeError as error:  # cuda-bindings says so, too, where a library is missing
        raise Unavailable(f"the kernel that chooses cannot be built ({str(error).splitlines()[0]})") from error


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _compiled(nvrtc: Any, capability: tuple[int, int], layers: int) -> bytes:
    """PTX of the kernel."""
    program = _checked("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(_SOURCE.encode(), b"choose.cu", 0, [], []))
    options = [
        f"--gpu-architecture=compute_{capability[0]}{capability[1]}",
        f"-DHANDLES={layers}",
        f"-DBODIES={_MOST_BODIES}",
    ]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(error):
        log = b" " * _checked("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(" ".join(log.decode(errors="replace").split()))
    code = b" " * _checked("nvrtcGetPTXSize", nvrtc.nvrtcGetPTXSize(program))
    nvrtc.nvrtcGetPTX(program, code)
    return code
