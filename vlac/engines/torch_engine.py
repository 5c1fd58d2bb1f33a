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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vlac.artifact import Artifact
from vlac.engines.base import Engine, EngineSession, NpArray, Values, gathered
from vlac.engines.torch_codes import code_ops
from vlac.errors import EngineError
from vlac.graph import Node, Program, Repeat, stage_symbols

Tensor = Any
"""torch.Tensor; torch is imported only when a session is made."""

TorchOp = Callable[[Sequence[Tensor], Mapping[str, Any]], Tensor]

DECLINES: dict[str, str] = {}
"""Ops this engine does not run, with the reason; none."""

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


def _round_int8(torch: Any, x: Tensor, form: str, largest: float) -> Tensor:
    """In float64, as the reference: a value between two codes must fall to the same side."""
    v = x.to(torch.float64)
    if form == "tensor":
        s = largest / 127
        return (torch.clamp(torch.round(v / s), -127, 127) * s).to(x.dtype)
    rows, width = v.shape
    block = 32 if form == "block32" else width
    parts = torch.nn.functional.pad(v, (0, -width % block)).reshape(rows, -1, block)
    s = parts.abs().amax(dim=2, keepdim=True).clamp(min=1e-30) / 127
    return (torch.round(parts / s) * s).reshape(rows, -1)[:, :width].to(x.dtype)


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
        "round_int8": lambda x, a: _round_int8(torch, x[0], a["form"], a["largest"]),
        "attention": lambda x, a: _attention(torch, x, a),
        "rope": lambda x, a: _rotate(torch, x[0], x[1]),
        "time_embedding": lambda x, a: _time_embedding(torch, x[0], a),
    }


# --- session ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One call: env[result] = fn(operands, attrs), then `free` leave the environment."""

    fn: TorchOp
    operands: tuple[str, ...]
    attrs: Mapping[str, Any]
    result: str
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """A stage for one bucket; `constants` are values that depend on nothing."""

    steps: tuple[_Step, ...]
    constants: Mapping[str, Tensor]


class TorchSession(EngineSession):
    """Runs a program; `weight(name)` gives float32 values and is asked once per parameter, when first needed.

    Args:
        threads: intra-op threads, None for torch's own choice; set for the time of a call and restored.
        device: "cpu" or "cuda".
        dtype: "f32", or "f64" for a reference closer to the truth.
        keep_weights: False asks `weight` anew whenever a parameter is used and keeps none: slow, for models that do not
            fit into memory in float32.
        profile: note how long each kind of op takes (on a CPU: nothing waits for a device).
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
    ) -> None:
        # a busy core must not make the other threads spin: it can cost ten times the run on a shared machine
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        self._torch = torch
        self.program = program
        self._weight = weight
        self._keep = keep_weights
        self._threads = threads
        self._device = _checked_device(torch, device)
        self._float = _checked_dtype(torch, dtype)
        kinds = {"f32": self._float, "i32": torch.int32, "bool": torch.bool}
        self._ops = {**_index_ops(torch, kinds, self._device), **_layout_ops(torch), **_float_ops(torch)}
        self._ops |= code_ops(torch)
        self._weights: dict[str, Tensor] = {}
        self._plans: dict[tuple[str, tuple[tuple[str, int], ...]], _Plan] = {}
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
        }

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        with self._settings():
            s = self.program.stage(stage)
            given = {name: self._tensor(inputs[name]) for name, _ in s.inputs}
            return self._download(self._run(stage, given, symbols))

    def repeat(self, step: Repeat, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        """All turns on the device; only the first inputs and the last outputs cross."""
        with self._settings():
            own = {step.index, *(into for _, into, _ in step.carry)}
            s = self.program.stage(step.stage)
            env = {name: self._tensor(inputs[name]) for name, _ in s.inputs if name not in own}
            env.update({into: self._tensor(inputs[initial]) for _, into, initial in step.carry})
            out: dict[str, Tensor] = {}
            turns: list[dict[str, Tensor]] = []
            for i in range(step.times):
                env[step.index] = self._tensor(np.array([i], dtype=np.int32))
                out = self._run(step.stage, env, symbols)
                env.update({into: out[name] for name, into, _ in step.carry})
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

    def _plan(self, stage: str, symbols: Mapping[str, int]) -> _Plan:
        if stage not in self._symbols:
            self._symbols[stage] = stage_symbols(self.program.stage(stage))
        key = (stage, tuple(sorted((k, v) for k, v in symbols.items() if k in self._symbols[stage])))
        if key not in self._plans:
            self._plans[key] = self._build(stage, symbols)
        return self._plans[key]

    def _build(self, stage: str, symbols: Mapping[str, int]) -> _Plan:
        s = self.program.bind(symbols).stage(stage)
        constants: dict[str, Tensor] = {}
        steps: list[_Step] = []
        for step in self._expand(s.nodes):
            for i in step.operands:
                if i.startswith("@") and i not in constants and self._keep:
                    constants[i] = self._parameter(i[1:])
            if all(i in constants and not i.startswith("@") for i in step.operands):
                constants[step.result] = step.fn([constants[i] for i in step.operands], step.attrs)
            else:
                steps.append(step)
        return _Plan(_with_frees(steps, set(s.outputs)), constants)

    def _expand(self, nodes: Sequence[Node]) -> Iterator[_Step]:
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
            yield _Step(self._ops[n.op], operands, n.attr, n.name)

    def _shared_part(self, node: Node) -> _Step | None:
        """What a rope or attention makes of its last operand; the name holds a space, as no value's does."""
        last = node.inputs[-1:]
        if node.op == "rope":
            fn = partial(_rotation, self._torch, self._float)
            return _Step(fn, last, node.attr, f"rotation {last[0]} {node.attrs}")
        if node.op == "attention" and len(node.inputs) > 3:
            bools = self._torch.bool

            def added(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
                return (~x[0]).to(self._float) * MASKED if x[0].dtype == bools else x[0]

            return _Step(added, last, {}, f"added {last[0]}")
        return None

    def _parameter(self, name: str) -> Tensor:
        if not self._keep:
            return self._tensor(self._weight(name))
        if name not in self._weights:
            self._weights[name] = self._tensor(self._weight(name))
        return self._weights[name]

    def _tensor(self, array: NpArray) -> Tensor:
        """Shares memory with `array` on CPU in float32; nothing here ever writes to a tensor."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
            t = self._torch.from_numpy(np.ascontiguousarray(array))
        return t.to(self._device, self._float if t.is_floating_point() else t.dtype)

    def _download(self, values: Mapping[str, Tensor]) -> dict[str, NpArray]:
        """Copies, because a result may be a view of an input or of another result."""
        f32 = self._torch.float32
        return {
            name: np.array((t.to(f32) if t.is_floating_point() else t).cpu().numpy(), order="C")
            for name, t in values.items()
        }

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Inference mode, full float32 products (no TF32, no bf16), our number of threads; all restored."""
        torch = self._torch
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.set_num_threads(threads)


def _with_frees(steps: Sequence[_Step], keep: set[str]) -> tuple[_Step, ...]:
    """Each step with the results that nobody reads after it."""
    last: dict[str, int] = {}
    for at, step in enumerate(steps):
        last.update(dict.fromkeys((*step.operands, step.result), at))
    made = {s.result for s in steps} - keep
    free: dict[int, list[str]] = {}
    for name in sorted(made):
        free.setdefault(last[name], []).append(name)
    return tuple(_Step(s.fn, s.operands, s.attrs, s.result, tuple(free.get(i, ()))) for i, s in enumerate(steps))


def _checked_device(torch: Any, device: str) -> Any:
    if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise EngineError(
            f"torch engine: device {device!r} is not there; torch {torch.__version__} sees cpu"
            + (f" and {torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else " only"),
            remedy="use device=cpu, or install a torch build with CUDA and a driver",
        )
    return torch.device(device)


def _checked_dtype(torch: Any, dtype: str) -> Any:
    kinds = {"f32": torch.float32, "f64": torch.float64}
    if dtype not in kinds:
        raise EngineError(
            f"torch engine: dtype {dtype!r}, expected one of {', '.join(kinds)}",
            remedy="the torch engine is the reference; for lower precision compile to another target",
        )
    return kinds[dtype]


class TorchEngine(Engine):
    """torch, from an artifact of any target: weights are decoded, the program runs in float32."""

    name = "torch"

    def missing(self) -> str:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed; pip install torch"
        return ""

    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        """Options: device ("cpu", "cuda"), dtype ("f32", "f64"), profile, linear ("nf4", "fp4", "int8": see
        bitsandbytes_linear.py)."""
        if why := self.missing():
            raise EngineError(f"engine torch: {why}", remedy="pip install torch")
        given = dict(options or {})
        unknown = set(given) - {"device", "dtype", "linear", "profile"}
        if unknown:
            raise EngineError(f"engine torch: unknown option {sorted(unknown)[0]!r}; there are device, dtype, linear")
        if "linear" in given:
            from vlac.engines.bitsandbytes_linear import BitsandbytesSession

            return BitsandbytesSession(artifact, given.pop("linear"), threads, **given)
        return TorchSession(artifact.program, lambda name: artifact.tensors[name].decode(), threads, **given)


ENGINE = TorchEngine()
