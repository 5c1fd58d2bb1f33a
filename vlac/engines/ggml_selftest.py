"""Decides whether a folder of ggml libraries can be trusted: struct layout, type table and numbers against numpy.

Run as `python -m vlac.engines.ggml_selftest FOLDER [REFUSED ...]`, with the CPU libraries that failed before; prints
{"trying": name}, then {"cpu_library": name} and exits 0, or says what is wrong and exits 1. In a process of its own,
because a failed assertion inside ggml aborts the process it happens in.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlac.engines.ggml_lib import Ggml, InitParams, Tensor, cpu_variants, library
from vlac.errors import EngineError, VlacError
from vlac.formats import FORMATS, decode
from vlac.ops import OPS

CPU_S = 120
"""Seconds of CPU time after which the self-test is ended: it takes one, and ten when emulated."""
Array = np.ndarray[Any, Any]
Draw = Callable[[Ggml, int, list[int]], int]


def best_variant(directory: Path, refused: Sequence[str] = ()) -> str:
    """File name of the CPU library with the highest score on this CPU; "" when the folder has no variants.

    Each variant exports ggml_backend_score(): 0 = this CPU cannot run it. Those in `refused` are left out.
    """
    variants = cpu_variants(directory)
    if not variants:
        return ""
    variants = [v for v in variants if v.name not in refused]
    base = ctypes.CDLL(str(library(directory, "ggml-base")))
    scores: list[tuple[int, str]] = []
    for path in variants:
        try:
            score = ctypes.CDLL(str(path)).ggml_backend_score
        except (OSError, AttributeError):
            continue  # needs something this machine has not, or is no variant
        score.restype, score.argtypes = ctypes.c_int, []
        scores.append((score(), path.name))
    del base
    best, name = max(scores, default=(0, ""))
    if best <= 0:
        other = "other " if refused else ""
        raise EngineError(f"{directory}: none of {len(variants)} {other}CPU variants runs on this CPU")
    return name


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise EngineError(f"self-test: {what}")


def check_abi(lib: Ggml) -> None:
    """The struct as ctypes sees it agrees with what the library's own functions write."""
    _need(ctypes.sizeof(Tensor) == lib.tensor_overhead() - 32 == 336, f"tensor overhead {lib.tensor_overhead()}")
    for form in FORMATS.values():
        if form.ggml_type is not None:
            have = (lib.blck_size(form.ggml_type), lib.type_size(form.ggml_type))
            _need(have == (form.block, form.block_bytes), f"type {form.name} has geometry {have}")
    context = lib.init(InitParams(1 << 20, None, False))
    try:
        x = lib.set_name(lib.new_tensor_4d(context, 1, 7, 5, 3, 2), b"probe")
        t = Tensor.from_address(x)
        _need(t.type == 1 and list(t.ne) == [7, 5, 3, 2] and list(t.nb) == [2, 14, 70, 210], "type, ne or nb")
        _need(t.name == b"probe" and bool(t.data) and lib.nbytes(x) == 420, "name, data or size")
        v = Tensor.from_address(lib.view_1d(context, x, 4, 6))
        _need(v.view_src == x and v.view_offs == 6 and v.data == t.data + 6, "view fields")
        y = lib.new_tensor_4d(context, 0, 8, 1, 1, 1)
        s = Tensor.from_address(lib.scale(context, y, 2.5))
        _need(s.src[0] == y and lib.op_name(s.op) == b"SCALE", "src or op")
        _need(struct.unpack("<f", struct.pack("<i", s.op_params[0]))[0] == 2.5, "op_params")
        lib.set_output(y)
        _need(Tensor.from_address(y).flags == 2, "flags")
    finally:
        lib.free(context)


def compute(lib: Ggml, draw: Draw, leaves: Sequence[tuple[int, Array]], shape: tuple[int, ...]) -> Array:
    """Runs one small graph: leaves are (ggml type, array); draw(lib, context, tensors) gives the f32 result."""
    context = lib.init(InitParams(8 << 20, None, True))
    tensors = []
    for type_id, array in leaves:
        rows = 1 if array.ndim < 2 else array.shape[0]
        width = array.size // rows * lib.blck_size(type_id) * array.itemsize // lib.type_size(type_id)
        tensors.append(lib.new_tensor_4d(context, type_id, width, rows, 1, 1))
    out = draw(lib, context, tensors)
    graph = lib.new_graph_custom(context, 64, False)
    lib.build_forward_expand(graph, out)
    buffer = lib.backend_alloc_ctx_tensors_from_buft(context, lib.backend_cpu_buffer_type())
    _need(bool(buffer), "no memory")
    for tensor, (_, array) in zip(tensors, leaves, strict=True):
        _need(lib.nbytes(tensor) == array.nbytes, "size of a tensor")
        ctypes.memmove(Tensor.from_address(tensor).data, np.ascontiguousarray(array).ctypes.data, array.nbytes)
    backend = lib.backend(2)
    status = lib.backend_graph_compute(backend, graph)
    _need(status == 0, f"graph_compute gave {status}")
    result = np.empty(shape, dtype=np.float32)
    ctypes.memmove(result.ctypes.data, Tensor.from_address(out).data, result.nbytes)
    lib.backend_free(backend)
    lib.backend_buffer_free(buffer)
    lib.free(context)
    return result


def _close(what: str, got: Array, want: Array, limit: float) -> None:
    error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    _need(error < limit, f"{what}: relative error {error:.2e}, limit {limit:.0e}")


def check_numbers(lib: Ggml) -> None:
    """mul_mat of three formats, rope, softmax and flash attention against the numpy references."""
    draw = np.random.default_rng(7).standard_normal
    x, w = draw((70, 256)).astype(np.float32), draw((48, 256)).astype(np.float32)
    for name, limit in (("f32", 1e-5), ("q8_0", 2e-2), ("q4_k", 2e-2)):
        form = FORMATS[name]
        packed: Array = np.empty((48, form.nbytes((256,))), dtype=np.uint8)
        lib.quantize_chunk(form.ggml_type, w.ctypes.data, packed.ctypes.data, 0, 48, 256, None)
        want = x @ decode(name, packed.reshape(-1), (48, 256)).T
        leaves: list[tuple[int, Array]] = [(form.ggml_type or 0, packed), (0, x)]
        _close(f"mul_mat {name}", compute(lib, lambda g, c, t: g.mul_mat(c, *t), leaves, (70, 48)), want, limit)
    positions = np.arange(70, dtype=np.int32)

    def rope(g: Ggml, c: int, t: list[int]) -> int:
        heads = g.reshape_4d(c, t[0], 64, 4, 70, 1)
        return int(g.rope_ext(c, heads, t[1], None, 64, 2, 0, 1e4, 1.0, 0.0, 1.0, 0.0, 0.0))

    want = OPS["rope"].reference([x, positions], {"head_dim": 64, "base": 1e4})
    _close("rope", compute(lib, rope, [(0, x), (26, positions)], x.shape), want, 1e-4)
    want = OPS["softmax"].reference([x], {})
    got = compute(lib, lambda g, c, t: g.soft_max_ext(c, t[0], None, 1.0, 0.0), [(0, x)], x.shape)
    _close("soft_max", got, want, 1e-5)

    def flash(g: Ggml, c: int, t: list[int]) -> int:
        q, k, v = (g.permute(c, g.reshape_4d(c, i, 64, 4, 70, 1), 0, 2, 1, 3) for i in t)
        return int(g.flash_attn_ext(c, q, k, v, None, 0.125, 0.0, 0.0))

    k, v = draw((2, 70, 256)).astype(np.float32)
    want = OPS["attention"].reference([x, k, v], {"heads": 4, "kv_heads": 4, "scale": 0.125})
    _close("flash attention", compute(lib, flash, [(0, x), (0, k), (0, v)], x.shape), want, 1e-4)


def _limit_cpu_time() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S if hard == resource.RLIM_INFINITY else min(CPU_S, hard), hard))


def main(arguments: Sequence[str]) -> int:
    """Self-test of the folder in arguments[0], without the CPU libraries in arguments[1:]; the exit code."""
    directory = Path(arguments[0])
    try:
        name = best_variant(directory, arguments[1:])
        print(json.dumps({"trying": name}), flush=True)
        lib = Ggml(directory, name)
        check_abi(lib)
        check_numbers(lib)
    except (VlacError, OSError) as error:
        print(error.message if isinstance(error, VlacError) else error, file=sys.stderr)
        return 1
    print(json.dumps({"cpu_library": name, "version": lib.version}))
    return 0


if __name__ == "__main__":
    _limit_cpu_time()  # here, for it is the whole process's
    sys.exit(main(sys.argv[1:]))
