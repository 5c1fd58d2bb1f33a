"""The ggml engine: programs from GGUF artifacts as ggml graphs on the CPU, weights mapped from the file without a copy.

For every stage and bucket a graph is built once (vlac/engines/ggml_ops.py says how); a run fills the feeds whose inputs
changed, computes, and copies the outputs out. `threads` is the most that a graph uses: small ones use one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vlac.artifact import Artifact, StoredTensor
from vlac.dims import ROWS
from vlac.engines import ggml_lib
from vlac.engines.base import Engine, EngineSession, NpArray, Values
from vlac.engines.ggml_lib import Ggml, InitParams, Tensor
from vlac.engines.ggml_ops import DRAW, LAYOUTS, Drawing, Feed
from vlac.engines.ggml_plan import NEVER, StagePlan, macs, plan_stage
from vlac.errors import EngineError
from vlac.formats import decode, encode, get_format
from vlac.graph import Param, Program, Repeat, stage_symbols
from vlac.ops import DTYPES, OPS

DECLINES = NEVER

ALIGNMENT = 32
"""Bytes; ggml asserts that memory it is given starts at a multiple."""

MAX_GRAPHS = 32
"""Graphs kept per session; the one unused for longest goes first (each holds its compute buffer). Five stages in the
sizes that a robot uses are about twenty; building them anew for each other instruction leaves memory in pieces."""

WORK_TO_SHARE = 1_000_000
"""Multiply-accumulates per node from which a graph uses more than one thread. ggml waits for all threads after every
node, and one that has lost its core costs a slice of the scheduler: on a busy machine of two cores 40 nodes took 10 ms
with two threads at any size, with one 0.25 ms (0.1 M per node), 4 ms (4 M), 75 ms (67 M: as long as with two). Ten rows
of SmolVLA's loop (2 M): 44 ms with one, 24 with two on a machine of their own."""

PRIVATE_BYTES = 1 << 28
"""Most memory for weights that are kept in another format than the file's because that is faster on this CPU."""

RECODED_ROWS = 128

_WEIGHTS_USAGE = 1


class PlacedWeights:
    """Tensors of an artifact as ggml tensors that point into the mapped file (a private copy where unaligned)."""

    def __init__(self, lib: Ggml, tensors: Mapping[str, StoredTensor]) -> None:
        self.lib = lib
        self.tensors: dict[str, int] = {}
        self._held: list[NpArray] = []
        self._buffers: list[int] = []
        self._context = lib.init(InitParams((len(tensors) + 1) * lib.tensor_overhead(), None, True))
        for name, stored in tensors.items():
            self.tensors[name] = self._place(name, stored)

    def _place(self, name: str, stored: StoredTensor) -> int:
        form = get_format(stored.format)
        if stored.data is None or form.ggml_type is None:
            raise EngineError(
                f"engine ggml: tensor {name} ({stored.format}) is not stored in one of ggml's formats",
                remedy="compile with a gguf target, or run this artifact with --engine torch",
            )
        if (
            not 1 <= len(stored.shape) <= 4
            or stored.shape[-1] % form.block
            or stored.data.nbytes != form.nbytes(stored.shape)
        ):
            raise EngineError(
                f"engine ggml: tensor {name}: {stored.data.nbytes} bytes for {form.name}{list(stored.shape)}"
            )
        data = np.ascontiguousarray(stored.data)
        if data.ctypes.data % ALIGNMENT:
            data = _aligned(data)
        self._held.append(data)
        address = data.ctypes.data
        tensor = self.lib.new_tensor_4d(self._context, form.ggml_type, *(*reversed(stored.shape), 1, 1, 1)[:4])
        buffer = self.lib.backend_cpu_buffer_from_ptr(address, data.nbytes)
        if not buffer or self.lib.nbytes(tensor) != data.nbytes:
            raise EngineError(f"engine ggml: tensor {name} cannot be placed in memory")
        self._buffers.append(buffer)
        self.lib.backend_buffer_set_usage(buffer, _WEIGHTS_USAGE)
        if self.lib.backend_tensor_alloc(buffer, tensor, address) != 0:
            raise EngineError(f"engine ggml: tensor {name} cannot be placed in memory")
        return int(tensor)

    def free(self) -> None:
        for buffer in self._buffers:
            self.lib.backend_buffer_free(buffer)
        self.lib.free(self._context)
        self._buffers, self._held, self.tensors = [], [], {}


def _aligned(data: NpArray) -> NpArray:
    room = np.empty(data.nbytes + ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + data.nbytes]
    copy[:] = data
    return copy


def for_this_cpu(
    program: Program, tensors: Mapping[str, StoredTensor], bf16: bool, exact: bool = False
) -> dict[str, StoredTensor]:
    """Weights of linears that are faster in another format than the file's, in that format.

    Without instructions for bfloat16 (`bf16`), the bfloat16 weights of a file that holds blocks, too, become q8_0. With
    them, q8_0 becomes bfloat16 in stages that a loop repeats, up to PRIVATE_BYTES and unless results must stay `exact`:
    there are few rows for q8_0's kernel (50: 0.8 of the speed), and many turns to save time in.
    """
    looped = {s.stage for s in program.schedule.steps if isinstance(s, Repeat)}

    def weights(stages: Iterable[str]) -> set[str]:
        nodes = (n for s in stages for n in program.stage(s).nodes)
        return {n.inputs[1][1:] for n in nodes if n.op == "linear" and n.inputs[1][0] == "@"}

    every = weights(s.name for s in program.stages)
    if bf16 and not exact:
        chosen, fmt = [w for w in sorted(weights(looped)) if program.params[w].format == "q8_0"], "bf16"
        if sum(2 * math.prod(program.params[w].shape) for w in chosen) > PRIVATE_BYTES:
            return {}
    elif not bf16 and any(get_format(program.params[w].format).block > 1 for w in every):
        suits = (w for w in sorted(every) if program.params[w].shape[-1] % 32 == 0)
        chosen, fmt = [w for w in suits if program.params[w].format == "bf16"], "q8_0"
    else:
        return {}
    found = {}
    for w in chosen:
        found[w] = _recoded(tensors[w], fmt)
        give_back_pages(tensors[w].data)
    return found


def _recoded(stored: StoredTensor, fmt: str) -> StoredTensor:
    """The tensor in another format, made a few rows at a time: what is allocated and freed between arrays that stay is
    memory that the process keeps."""
    (rows, width), old, new = stored.shape, get_format(stored.format), get_format(fmt)
    assert stored.data is not None
    given = np.ascontiguousarray(stored.data).reshape(rows, -1).view(np.uint8)
    made = np.empty((rows, new.nbytes((1, width))), dtype=np.uint8)
    for at in range(0, rows, RECODED_ROWS):
        some = given[at : at + RECODED_ROWS]
        made[at : at + len(some)] = encode(fmt, decode(old.name, some, (len(some), width))).reshape(len(some), -1)
    return dataclasses.replace(stored, format=fmt, data=made.reshape(-1))


def give_back_pages(data: NpArray | None) -> None:
    """Takes whole pages of a mapped file out of memory; they are read again when they are touched again."""
    base: Any = data
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is None or data is None or not hasattr(base, "madvise"):
        return  # not a mapped file, or a system that cannot
    start = data.ctypes.data - np.frombuffer(base, dtype=np.uint8).ctypes.data
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        base.madvise(mmap.MADV_DONTNEED, first, end - first)


class StageGraph:
    """One stage for one bucket: its graph, its memory, and what the host knew at the last run."""

    def __init__(
        self, lib: Ggml, backend: int, plan: StagePlan, weights: Mapping[str, int], threads: int, careful: bool = False
    ) -> None:
        self.lib, self.backend, self.plan = lib, backend, plan
        self.threads = threads if macs(plan) >= WORK_TO_SHARE * len(plan.graph) else 1
        self._graph_context = self._gallocr = self._feed_buffer = None
        self._drawing = Drawing(lib, plan, weights, careful)
        try:
            self._outputs = self._drawing.draw()
            self._allocate()
        except BaseException:
            self.free()
            raise
        self._feeds = list(self._drawing.feeds.values())
        self._env: dict[str, NpArray] = {}
        self._fresh = True
        self.op_ms: dict[str, float] | None = None
        """Where each node's time is added, when it is asked for."""

    def _allocate(self) -> None:
        lib = self.lib
        size = self._drawing.count + len(self._drawing.feeds) + len(self._drawing.weights) + 64
        room = lib.graph_overhead_custom(size, False) + lib.tensor_overhead()
        self._graph_context = lib.init(InitParams(room, None, True))
        self._graph = lib.new_graph_custom(self._graph_context, size, False)
        for tensor in self._outputs.values():
            lib.build_forward_expand(self._graph, tensor)
        if self._drawing.feeds:
            self._feed_buffer = lib.backend_alloc_ctx_tensors_from_buft(
                self._drawing.leaves, lib.backend_cpu_buffer_type()
            )
            if not self._feed_buffer:
                raise EngineError(f"stage {self.plan.stage.name}: out of memory for its inputs")
        self._gallocr = lib.gallocr_new(lib.backend_cpu_buffer_type())
        if not self._gallocr or not lib.gallocr_alloc_graph(self._gallocr, self._graph):
            raise EngineError(f"stage {self.plan.stage.name}: out of memory for its graph")

    @property
    def compute_bytes(self) -> int:
        """Size of the buffer for intermediate values."""
        return int(self.lib.gallocr_get_buffer_size(self._gallocr, 0))

    def run(self, inputs: Values) -> dict[str, NpArray]:
        fresh, self._fresh = self._fresh, True  # an error below must not leave feeds older than the inputs remembered
        changed = self._take(inputs, fresh)
        for feed in self._feeds:
            if fresh or not changed.isdisjoint(self.plan.depends.get(feed.name, ())):
                self._fill(feed)
        self._fresh = False
        if self._outputs:
            self.lib.set_threads(self.backend, self.threads)
            status = self._compute() if self.op_ms is None else self._compute_each()
            if status != 0:
                raise EngineError(f"stage {self.plan.stage.name}: ggml stopped with status {status}")
        result = {name: self._output(name) for name in self.plan.stage.outputs if name not in self.plan.after}
        for name, node in self.plan.after.items():
            for i in node.inputs:
                if i not in result:
                    result[i] = self._output(i)
            result[name] = OPS[node.op].reference([result[i] for i in node.inputs], node.attr)
        return {name: result[name] for name in self.plan.stage.outputs}

    def _compute(self) -> int:
        return int(self.lib.backend_graph_compute(self.backend, self._graph))

    def _compute_each(self) -> int:
        """Node by node, each as a graph of its own in the same memory; products by the format of their weight."""
        lib, count = self.lib, int(self.lib.graph_n_nodes(self._graph))
        context = lib.init(
            InitParams(count * (lib.graph_overhead_custom(1, False) + lib.tensor_overhead()), None, True)
        )
        status = 0
        for i in range(count):
            node = lib.graph_node(self._graph, i)
            alone = lib.new_graph_custom(context, 1, False)
            lib.graph_add_node(alone, node)
            began = time.perf_counter()
            status = status or int(lib.backend_graph_compute(self.backend, alone))
            took = 1e3 * (time.perf_counter() - began)
            kind, source = lib.op_desc(node).decode(), Tensor.from_address(node).src[0]
            if kind == "MUL_MAT" and source:
                kind += f" {lib.type_name(Tensor.from_address(source).type).decode()}"
            assert self.op_ms is not None
            self.op_ms[kind] = self.op_ms.get(kind, 0.0) + took
        lib.free(context)
        return status

    def _take(self, inputs: Values, fresh: bool) -> set[str]:
        """Remembers new inputs, evaluates the host nodes that depend on them; names of the inputs that changed."""
        changed = set()
        for name, kind in self.plan.stage.inputs:
            value = inputs[name]
            if self._env.get(name) is not value:
                if value.shape != kind.shape or value.dtype != DTYPES[kind.dtype]:
                    have = f"{value.dtype}{list(value.shape)}"
                    raise EngineError(f"stage {self.plan.stage.name}: input {name} is {have}, expected {kind}")
                self._env[name] = value
                changed.add(name)
        for node in self.plan.host.values():
            if fresh or not changed.isdisjoint(self.plan.depends[node.name]):
                self._env[node.name] = OPS[node.op].reference([self._env[i] for i in node.inputs], node.attr)
        return changed

    def _fill(self, feed: Feed) -> None:
        value = self._env[feed.name] if feed.name else np.zeros(0)
        array = np.ascontiguousarray(LAYOUTS[feed.layout](value, *feed.args))
        if array.nbytes != self.lib.nbytes(feed.tensor):
            raise EngineError(f"stage {self.plan.stage.name}: input {feed.name} has {array.nbytes} bytes")
        ctypes.memmove(Tensor.from_address(feed.tensor).data, array.ctypes.data, array.nbytes)

    def _output(self, name: str) -> NpArray:
        if name not in self._outputs:
            return np.array(self._env[name])
        result = np.empty(self._drawing.shape(name), dtype=np.float32)
        ctypes.memmove(result.ctypes.data, Tensor.from_address(self._outputs[name]).data, result.nbytes)
        return result

    def free(self) -> None:
        if self._gallocr:
            self.lib.gallocr_free(self._gallocr)
        if self._feed_buffer:
            self.lib.backend_buffer_free(self._feed_buffer)
        if self._graph_context:
            self.lib.free(self._graph_context)
        self._drawing.free()
        self._gallocr = self._feed_buffer = self._graph_context = None


class GgmlSession(EngineSession):
    """Stages on ggml's CPU backend. One thread at a time runs; others wait."""

    engine = "ggml"

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, StoredTensor],
        threads: int | None = None,
        profile: bool = False,
    ) -> None:
        """`tensors` holds every parameter of the program in one of ggml's formats."""
        if threads is not None and threads < 1:
            raise EngineError(f"engine ggml: threads={threads}, expected 1 or more")
        bound = program.bind(program.max_symbols())
        for stage in bound.stages:
            plan_stage(stage, bound.params, DRAW)
        for name, param in program.params.items():
            have = tensors.get(name)
            if have is None or (have.shape, have.format) != (param.shape, param.format):
                found = f"{have.format}{list(have.shape)}" if have else "missing"
                raise EngineError(
                    f"engine ggml: tensor {name} is {found}, the program wants {param.format}{list(param.shape)}"
                )
        self._symbols = {s.name: stage_symbols(s) for s in program.stages}
        # where ids are picked, one rounding may pick another id, and all that follows: float16 products are exact there
        self._careful = any(n.op == "argmax" for s in program.stages for n in s.nodes)
        self.profiling = profile
        self._op_ms: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple[Any, ...], StageGraph] = OrderedDict()
        self._lib = lib = ggml_lib.load()
        count = self._threads = threads or ggml_lib.default_threads()
        recoded = for_this_cpu(program, tensors, "AVX512_BF16" in lib.features, self._careful)
        stored_as = {name: Param(stored.shape, stored.format) for name, stored in recoded.items()}
        self.program = program.replace(params={**program.params, **stored_as})
        placed = {name: recoded.get(name, tensors[name]) for name in program.params}
        self._weights: PlacedWeights | None = PlacedWeights(lib, placed)
        self._backend = lib.backend(count)
        self.info = {
            "engine": "ggml",
            "provider": lib.provider,
            "ggml_version": lib.version,
            "ggml_commit": lib.commit,
            "cpu_library": lib.cpu_library or "built in",
            "features": lib.features,
            "threads": count,
            **({"recoded": f"{len(recoded)} tensors as {next(iter(recoded.values())).format}"} if recoded else {}),
        }

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        with self._lock:
            return self._graph(stage, symbols).run(inputs)

    def _graph(self, stage: str, symbols: Mapping[str, int]) -> StageGraph:
        if self._weights is None:
            raise EngineError("engine ggml: the session is closed")
        key = (stage, *sorted((k, v) for k, v in symbols.items() if k in self._symbols[stage]))
        graph = self._graphs.get(key)
        if graph is None:
            bound = self.program.bind(symbols)
            plan = plan_stage(bound.stage(stage), bound.params, DRAW, ROWS in self._symbols[stage])
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)[1].free()
            weights = self._weights.tensors
            graph = StageGraph(self._lib, self._backend, plan, weights, self._threads, self._careful)
            self._graphs[key] = graph
            graph.op_ms = self._op_ms.setdefault(stage, {}) if self.profiling else None
        self._graphs.move_to_end(key)
        return graph

    def op_times(self) -> dict[str, dict[str, float]]:
        return self._op_ms

    def close(self) -> None:
        with self._lock:
            if self._weights is None:
                return
            for graph in self._graphs.values():
                graph.free()
            self._graphs.clear()
            self._lib.backend_free(self._backend)
            self._weights.free()
            self._weights = None

    def __del__(self) -> None:
        if getattr(self, "_weights", None) is not None:
            self.close()


class GgmlEngine(Engine):
    """ggml from whatever provider is installed."""

    name = "ggml"

    def missing(self) -> str:
        return ggml_lib.missing()

    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        return GgmlSession(artifact.program, artifact.tensors, threads, bool((options or {}).get("profile")))


ENGINE = GgmlEngine()
