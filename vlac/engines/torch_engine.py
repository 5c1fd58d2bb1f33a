"""The fp32 reference of the whole product: any program, op by op, in torch on CPU or CUDA.

A stage is bound to numbers once per bucket and becomes a list of steps (function, operands, result, what to free).
Nodes without inputs (`arange`, `full` and what follows from them) run once, at binding.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import numpy as np

from vlac.artifact import Artifact
from vlac.engines.base import Engine, EngineSession, NpArray, Values, gathered
from vlac.engines.torch_codes import code_ops
from vlac.engines.torch_device import Resident, checked_device, checked_dtype, checked_sdpa, settings
from vlac.engines.torch_graphs import Graphs, on_cuda
from vlac.engines.torch_plan import Plan, Step, TorchOp, with_frees
from vlac.engines.torch_precision import NARROW, NarrowProducts, only_multiplied
from vlac.engines.torch_rounding import rounding_ops
from vlac.errors import EngineError
from vlac.graph import Node, Program, Repeat, stage_symbols

Tensor = Any
"""torch.Tensor; torch is imported only when a session is made."""

DECLINES: dict[str, str] = {}
"""Ops this engine does not run, with the reason; none."""

UNRECORDED = ("column_mean", "pack_codes", "unpack_codes")
"""Ops that read tables from the host or pick rows by a mask, which a CUDA graph cannot hold."""

COMPILER = "inductor"
"""torch.compile's backend."""

MASKED = -1e30
"""Added to logits where a mask is false; finite, so that a row without a true entry stays finite."""


# --- ops -------------------------------------------------------------------------------------------------------


def _index_ops(torch: Any, dtypes: Mapping[str, Any], device: Any) -> dict[str, TorchOp]:
    """Index and mask arithmetic."""
    i32 = torch.int32
    return {
        "arange": lambda x, a: torch.arange(a["start"], a["stop"], dtype=i32, device=device),
        "full": lambda x, a: torch.full(tuple(a["shape"]), a["value"], device=device).to(dtypes[a["dtype"]]),
        "cast": lambda x, a: x[0].to(dtypes[a["dtype"]]),
        "cumsum": lambda x, a: torch.cumsum(x[0], 0, dtype=i32),
        "reduce_sum": lambda x, a: x[0].sum(dtype=i32).reshape(1),
        "repeat_each": lambda x, a: torch.repeat_interleave(x[0], a["times"]),
        "attention_mask": lambda x, a: (x[1][None, :] <= x[0][:, None]) & x[2][None, :],
        "weighted_mask": lambda x, a: torch.where(x[0], x[1].to(torch.float64).log()[None], MASKED).to(dtypes["f32"]),
        "argmax": lambda x, a: x[0].argmax(dim=1).to(i32),
        "pick": lambda x, a: x[0].index_select(0, x[1]),
    }


def _layout_ops(torch: Any) -> dict[str, TorchOp]:
    """Ops that move values and do not change them."""

    def pad(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        return torch.nn.functional.pad(x[0], (0, a["size"] - x[0].shape[-1]))

    def write_rows(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        at = x[2] + torch.arange(x[1].shape[0], device=x[0].device)
        return x[0].index_copy(0, at.to(torch.int64), x[1])

    def patchify(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        c, s, _ = x[0].shape
        p, b = a["patch"], a["block"]
        g = s // p // b
        v = x[0].reshape(c, g, b, p, g, b, p).permute(1, 4, 2, 5, 0, 3, 6)
        return v.reshape((g * b) ** 2, c * p * p)

    def pixel_shuffle(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        rows, width = x[0].shape
        f = a["factor"]
        g = int(rows**0.5 + 0.5) // f
        return x[0].reshape(g, f, g, f, width).permute(0, 2, 1, 3, 4).reshape(g * g, f * f * width)

    return {
        "concat": lambda x, a: torch.cat(tuple(x), dim=a["axis"]),
        "slice": lambda x, a: x[0].narrow(a["axis"], a["start"], a["stop"] - a["start"]),
        "reshape": lambda x, a: x[0].reshape(tuple(a["shape"])),
        "transpose": lambda x, a: x[0].permute(tuple(a["perm"])),
        "pad": pad,
        "tile": lambda x, a: x[0].expand(a["rows"], *x[0].shape[1:]),
        "write_rows": write_rows,
        "patchify": patchify,
        "pixel_shuffle": pixel_shuffle,
    }


def _gelu(torch: Any, x: Tensor, approximate: str) -> Tensor:
    if approximate == "quick":
        return x * torch.sigmoid(1.702 * x)
    return torch.nn.functional.gelu(x, approximate=approximate)


def _rms_norm(torch: Any, x: Sequence[Tensor], eps: float) -> Tensor:
    v = x[0] * torch.rsqrt(x[0].square().mean(-1, keepdim=True) + eps)
    return v * x[1] if len(x) > 1 else v


def _attention(torch: Any, x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
    """`x[3]`, if there, is a float mask to be added (see `MASKED`)."""
    h, g = a["heads"], a["kv_heads"]
    q, k, v = (t.reshape(t.shape[0], n, -1).transpose(0, 1)[None] for t, n in zip(x, (h, g, g), strict=False))
    if h != g:
        k, v = (t.repeat_interleave(h // g, dim=1) for t in (k, v))
    mask = x[3][None, None] if len(x) > 3 else None
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a["scale"])
    return y[0].transpose(0, 1).reshape(q.shape[2], -1)  # (Nq, H*e)


def _rotation(torch: Any, dtype: Any, x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
    """cos and sin for positions (N,): (2, N, 1, d/2), computed in float64."""
    exponent = torch.arange(0, a["head_dim"], 2, dtype=torch.float64, device=x[0].device) / a["head_dim"]
    angle = x[0].to(torch.float64)[:, None] / float(a["base"]) ** exponent
    return torch.stack([angle.cos(), angle.sin()])[:, :, None].to(dtype)


def _rotate(torch: Any, x: Tensor, rotation: Tensor) -> Tensor:
    half = rotation.shape[-1]
    cos, sin = rotation
    x1, x2 = x.reshape(x.shape[0], -1, 2, half).unbind(2)
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=2).reshape(x.shape)


def _time_embedding(torch: Any, t: Tensor, a: Mapping[str, Any]) -> Tensor:
    fraction = torch.linspace(0.0, 1.0, a["dim"] // 2, dtype=torch.float64, device=t.device)
    period = a["min_period"] * (a["max_period"] / a["min_period"]) ** fraction
    angle = (2 * np.pi / period)[None, :] * t.to(torch.float64)
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(t.dtype)


def _float_ops(torch: Any) -> dict[str, TorchOp]:
    """Arithmetic."""
    fn = torch.nn.functional

    def layer_norm(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        return fn.layer_norm(x[0], (x[0].shape[-1],), *x[1:], eps=a["eps"])

    return {
        "add": lambda x, a: x[0] + x[1],
        "sub": lambda x, a: x[0] - x[1],
        "mul": lambda x, a: x[0] * x[1],
        "scale": lambda x, a: x[0] * float(np.float32(a["factor"])),
        "linear": lambda x, a: fn.linear(*x),
        "embed": lambda x, a: fn.embedding(x[0], x[1]),
        "layer_norm": layer_norm,
        "rms_norm": lambda x, a: _rms_norm(torch, x, a["eps"]),
        "silu": lambda x, a: fn.silu(x[0]),
        "sigmoid": lambda x, a: torch.sigmoid(x[0]),
        "tanh": lambda x, a: torch.tanh(x[0]),
        "relu": lambda x, a: torch.relu(x[0]),
        "gelu": lambda x, a: _gelu(torch, x[0], a["approximate"]),
        "softmax": lambda x, a: torch.softmax(x[0], dim=-1),
        "attention": lambda x, a: _attention(torch, x, a),
        "rope": lambda x, a: _rotate(torch, x[0], x[1]),
        "time_embedding": lambda x, a: _time_embedding(torch, x[0], a),
    }


# --- session ---------------------------------------------------------------------------------------------------


class TorchSession(EngineSession):
    """Runs a program; `weight(name)` gives float32 values and is asked once per parameter, when first needed.

    Args:
        threads: intra-op threads, None for torch's own choice; set for the time of a call and restored.
        device: "cpu", "cuda" or "cuda:1".
        dtype: "f32", or "f64" for a reference closer to the truth; products in "bf16", "f16" or "int8"
            (torch_precision.py).
        keep_weights: False asks `weight` anew whenever a parameter is used and keeps none: slow, for models that do not
            fit into memory in float32.
        profile: note how long each kind of op takes (on a CPU: nothing waits for a device).
        linears: weights whose products may be narrow; None: of all linears.
        tf32: float32 products rounded to 10 bits, where the device has them. sdpa: "math" for attention by plain
            products, on CUDA.
        graphs: record stages and loops as CUDA graphs (torch_graphs.py); None: on CUDA, unless they are profiled.
        compile: have torch.compile fuse each stage; the first call takes long, and more where a GPU is waited for.
    """

    engine = "torch"

    def __init__(
        self,
        program: Program,
        weight: Callable[[str], NpArray],
        threads: int | None = None,
        device: str = "cpu",
        dtype: str = "f32",
        keep_weights: bool = True,
        profile: bool = False,
        linears: frozenset[str] | None = None,
        tf32: bool = False,
        sdpa: str = "auto",
        graphs: bool | None = None,
        compile: bool = False,
    ) -> None:
        # a busy core must not make the other threads spin: it can cost ten times the run on a shared machine
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        self._torch = torch
        self.program = program
        self._weight = weight
        self._keep = keep_weights
        self._threads = threads
        self._device = checked_device(torch, device)
        self._float = checked_dtype(torch, dtype)
        kinds = {"f32": self._float, "i32": torch.int32, "bool": torch.bool}
        self._ops = {**_index_ops(torch, kinds, self._device), **_layout_ops(torch), **_float_ops(torch)}
        self._ops |= code_ops(torch) | rounding_ops(torch)
        self._narrow = None
        if dtype in NARROW:
            self._narrow = NarrowProducts(torch, dtype, only_multiplied(program, linears))
            self._ops["linear"] = self._narrow.linear(self._ops["linear"])
            self._ops["attention"] = self._narrow.attention(self._ops["attention"])
        cuda = self._device.type == "cuda"
        if graphs and not cuda:
            raise EngineError(f"torch engine: graphs=True on {device}", remedy="CUDA graphs need device=cuda")
        record = cuda and graphs is not False and keep_weights and not profile
        self._graphs = Graphs(on_cuda(torch, self._device)) if record else None
        self._compiled: dict[Any, Callable[..., dict[str, Tensor]]] | None = {} if compile else None
        self._resident = Resident() if cuda else None
        self._tf32, self._sdpa = tf32, checked_sdpa(sdpa) if cuda else "auto"
        self._indices: dict[int, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._plans: dict[tuple[str, tuple[tuple[str, int], ...]], Plan] = {}
        self._symbols: dict[str, frozenset[str]] = {}
        self.profiling = profile
        self._op_ms: dict[str, dict[str, float]] = {}
        self.info = {
            "engine": "torch",
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "dtype": dtype,
            "threads": threads or torch.get_num_threads(),
            **({"tf32": tf32, "sdpa": self._sdpa, "graphs": self._graphs is not None} if cuda else {}),
            **({"compile": True} if compile else {}),
        }

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        with self._settings():
            s = self.program.stage(stage)
            given = {name: self._tensor(inputs[name]) for name, _ in s.inputs}
            return self._download(self._replayed(("stage", stage), stage, self._run_alone, given, symbols))

    def repeat(self, step: Repeat, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        """All turns on the device; only the first inputs and the last outputs cross."""
        with self._settings():
            own = {step.index, *(into for _, into, _ in step.carry)}
            s = self.program.stage(step.stage)
            env = {name: self._tensor(inputs[name]) for name, _ in s.inputs if name not in own}
            env.update({into: self._tensor(inputs[initial]) for _, into, initial in step.carry})
            if not (step.until or step.collect):
                loop = partial(self._loop, step)
                return self._download(self._replayed(("loop", step), step.stage, loop, env, symbols))
            out: dict[str, Tensor] = {}
            turns: list[dict[str, Tensor]] = []
            for i in range(step.times):
                out = self._turn(step, i, env, symbols)
                turns.append({name: out[name] for name, _ in step.collect})
                if step.until and int(out[step.until][0]) in step.stop:
                    break
            return {**self._download(out), **gathered(step, [self._download(t) for t in turns])}

    def op_times(self) -> dict[str, dict[str, float]]:
        return self._op_ms

    def close(self) -> None:
        self._weights.clear()
        self._plans.clear()

    # --- internals

    def _replayed(
        self,
        key: tuple[Any, ...],
        stage: str,
        function: Callable[[str, Mapping[str, Tensor], Mapping[str, int]], dict[str, Tensor]],
        given: Mapping[str, Tensor],
        symbols: Mapping[str, int],
    ) -> dict[str, Tensor]:
        """function(stage, given, symbols), by a CUDA graph where there are such and the stage can be recorded."""
        if self._graphs is None or any(n.op in UNRECORDED for n in self.program.stage(stage).nodes):
            return function(stage, given, symbols)

        def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return function(stage, values, symbols)

        return self._graphs.run((key, *self._key(stage, symbols)), run, given)

    def _run_alone(self, stage: str, given: Mapping[str, Tensor], symbols: Mapping[str, int]) -> dict[str, Tensor]:
        if self._compiled is None:
            return self._run(stage, given, symbols)
        key = self._key(stage, symbols)
        if key not in self._compiled:
            self._plan(stage, symbols)  # weights are read outside of what is compiled
            run = partial(self._run, stage, symbols=dict(symbols))
            self._compiled[key] = self._torch.compile(run, dynamic=False, backend=COMPILER)
        return self._compiled[key](dict(given))

    def _loop(
        self, step: Repeat, stage: str, given: Mapping[str, Tensor], symbols: Mapping[str, int]
    ) -> dict[str, Tensor]:
        env, out = dict(given), {}
        for i in range(step.times):
            out = self._turn(step, i, env, symbols)
        return out

    def _turn(self, step: Repeat, i: int, env: dict[str, Tensor], symbols: Mapping[str, int]) -> dict[str, Tensor]:
        """One turn; what it carries on is written into `env`."""
        if i not in self._indices:
            self._indices[i] = self._tensor(np.array([i], dtype=np.int32))
        env[step.index] = self._indices[i]
        out = self._run_alone(step.stage, env, symbols)
        env.update({into: out[name] for name, into, _ in step.carry})
        return out

    def _run(self, stage: str, given: Mapping[str, Tensor], symbols: Mapping[str, int]) -> dict[str, Tensor]:
        plan = self._plan(stage, symbols)
        env = {**plan.constants, **given}
        for step in plan.steps:
            operands = [env[i] if i in env else self._parameter(i[1:]) for i in step.operands]
            began = time.perf_counter() if self.profiling else 0.0
            env[step.result] = step.fn(operands, step.attrs)
            if self.profiling:
                self._note(stage, step.result, began)
            for name in step.free:
                del env[name]
        return {o: env[o] for o in self.program.stage(stage).outputs}

    def _note(self, stage: str, result: str, began: float) -> None:
        kinds = {n.name: n.op for n in self.program.stage(stage).nodes}
        kind, times = kinds.get(result, "masks and angles"), self._op_ms.setdefault(stage, {})
        times[kind] = times.get(kind, 0.0) + 1e3 * (time.perf_counter() - began)

    def _key(self, stage: str, symbols: Mapping[str, int]) -> tuple[str, tuple[tuple[str, int], ...]]:
        if stage not in self._symbols:
            self._symbols[stage] = stage_symbols(self.program.stage(stage))
        return stage, tuple(sorted((k, v) for k, v in symbols.items() if k in self._symbols[stage]))

    def _plan(self, stage: str, symbols: Mapping[str, int]) -> Plan:
        key = self._key(stage, symbols)
        if key not in self._plans:
            self._plans[key] = self._build(stage, symbols)
        return self._plans[key]

    def _build(self, stage: str, symbols: Mapping[str, int]) -> Plan:
        s = self.program.bind(symbols).stage(stage)
        constants: dict[str, Tensor] = {}
        steps: list[Step] = []
        for step in self._expand(s.nodes):
            for i in step.operands:
                if i.startswith("@") and i not in constants and self._keep:
                    constants[i] = self._parameter(i[1:])
            if all(i in constants and not i.startswith("@") for i in step.operands):
                constants[step.result] = step.fn([constants[i] for i in step.operands], step.attrs)
            else:
                steps.append(step)
        return Plan(with_frees(steps, set(s.outputs)), constants)

    def _expand(self, nodes: Sequence[Node]) -> Iterator[Step]:
        """Nodes as steps; a rope's cos and sin and an attention's additive mask become steps that are shared."""
        seen: set[str] = set()
        for n in nodes:
            operands = n.inputs
            shared = self._shared_part(n)
            if shared is not None:
                operands = (*operands[:-1], shared.result)
                if shared.result not in seen:
                    seen.add(shared.result)
                    yield shared
            yield Step(self._ops[n.op], operands, n.attr, n.name)

    def _shared_part(self, node: Node) -> Step | None:
        """What a rope or attention makes of its last operand; the name holds a space, as no value's does."""
        last = node.inputs[-1:]
        if node.op == "rope":
            fn = partial(_rotation, self._torch, self._float)
            return Step(fn, last, node.attr, f"rotation {last[0]} {node.attrs}")
        if node.op == "attention" and len(node.inputs) > 3:
            bools = self._torch.bool

            def added(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
                return (~x[0]).to(self._float) * MASKED if x[0].dtype == bools else x[0]

            return Step(added, last, {}, f"added {last[0]}")
        return None

    def _parameter(self, name: str) -> Tensor:
        if name in self._weights:
            return self._weights[name]
        weight = self._tensor(self._weight(name))
        if self._narrow is not None and name in self._narrow.chosen:
            weight = self._narrow.stored(weight)
        if self._keep:
            self._weights[name] = weight
        return weight

    def _tensor(self, array: NpArray) -> Tensor:
        """Shares memory with `array` on CPU in float32; nothing here ever writes to a tensor."""
        if self._resident is not None and (known := self._resident.find(array)) is not None:
            return known
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
            t = self._torch.from_numpy(np.ascontiguousarray(array))
        return t.to(self._device, self._float if t.is_floating_point() else t.dtype)

    def _download(self, values: Mapping[str, Tensor]) -> dict[str, NpArray]:
        """Copies, because a result may be a view of an input or of another result."""
        f32 = self._torch.float32
        result = {
            name: np.array((t.to(f32) if t.is_floating_point() else t).cpu().numpy(), order="C")
            for name, t in values.items()
        }
        if self._resident is not None:
            for name, array in result.items():
                self._resident.note(array, values[name])
        return result

    def _settings(self) -> AbstractContextManager[None]:
        return settings(self._torch, self._threads, self._tf32, self._sdpa)


OPTIONS = frozenset(("device", "dtype", "linear", "profile", "tf32", "sdpa", "graphs", "compile"))


class TorchEngine(Engine):
    """torch, from an artifact of any target: weights are decoded, the program runs in float32 unless asked."""

    name = "torch"
    parity_options: ClassVar[Mapping[str, Any]] = {"sdpa": "math"}

    def missing(self) -> str:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed; pip install torch"
        return ""

    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        """Options: device ("cpu", "cuda", "cuda:1"), dtype ("f32", "f64", "bf16", "f16", "int8"), tf32, sdpa, graphs,
        compile, profile (see TorchSession), linear ("nf4", "fp4", "int8": see bitsandbytes_linear.py)."""
        if why := self.missing():
            raise EngineError(f"engine torch: {why}", remedy="pip install torch")
        given = dict(options or {})
        unknown = set(given) - OPTIONS
        if unknown:
            raise EngineError(
                f"engine torch: unknown option {sorted(unknown)[0]!r}; there are: {', '.join(sorted(OPTIONS))}"
            )
        from vlac.engines.bitsandbytes_linear import BitsandbytesSession, linear_weights

        if "linear" in given:
            if beside := sorted(set(given) - {"linear", "device", "dtype"}):
                raise EngineError(f"engine torch: option {beside[0]!r} does not go with linear")
            return BitsandbytesSession(artifact, given.pop("linear"), threads, **given)
        weight = lambda name: artifact.tensors[name].decode()  # noqa: E731
        # heads that touch state and actions stay wide; where the census is missing, nothing is known of them
        linears = linear_weights(artifact) or None
        return TorchSession(artifact.program, weight, threads, linears=linears, **given)


ENGINE = TorchEngine()
