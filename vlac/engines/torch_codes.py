"""Packed keys and values in torch: column_mean, pack_codes and unpack_codes as vlac.kv_codes has them.

In float64 like the reference: one code must not differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlac import kv_codes
from vlac.rotations import rotation

Tensor = Any
"""torch.Tensor; torch is imported only when a session is made."""

TorchOp = Callable[[Sequence[Tensor], Mapping[str, Any]], Tensor]


def code_ops(torch: Any) -> dict[str, TorchOp]:
    """The ops by name."""
    f64, i64 = torch.float64, torch.int64

    def constant(values: Any, like: Tensor) -> Tensor:
        return torch.tensor(np.asarray(values), dtype=f64, device=like.device)

    def mean(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        rows = x[0][x[1]] if len(x) > 1 else x[0]
        return (rows.to(f64).sum(0, keepdim=True) / max(len(rows), 1)).to(x[0].dtype)

    def join(fields: Tensor, width: int) -> Tensor:
        per = 32 // width
        padded = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % per))
        parts = padded.reshape(*fields.shape[:-1], -1, per)
        return (parts << (width * torch.arange(per, device=fields.device))).sum(-1)

    def split(packed: Tensor, width: int, count: int) -> Tensor:
        fields = (packed[..., None] >> (width * torch.arange(32 // width, device=packed.device))) & ((1 << width) - 1)
        return fields.reshape(*packed.shape[:-1], -1)[..., :count]

    def log_scale(s: Tensor) -> Tensor:
        c = (torch.log2(s) * kv_codes.STEPS).round() + kv_codes.ZERO
        return torch.where(s > 0, c.clamp(1, 65535), 0.0).to(i64)

    def from_log(c: Tensor) -> Tensor:
        return torch.where(c > 0, torch.exp2((c.to(f64) - kv_codes.ZERO) / kv_codes.STEPS), 0.0)

    def quantise(y: Tensor, bits: int, d: int) -> Tensor:
        table = torch.tensor(kv_codes.nearest(bits, d), device=y.device).to(i64)
        top, cells = kv_codes.levels(bits, d)[-1], kv_codes.CELLS
        return table[((y / top + 1) * (cells / 2)).clamp(0, cells - 1).to(i64)]

    def pack(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        d, bits, form, n = a["head_dim"], a["bits"], a["form"], x[0].shape[0]
        v = x[0].to(f64) - (x[1].to(f64) if len(x) > 1 else 0.0)
        v = v.reshape(n, -1, d) @ constant(kv_codes.turn(d, a["seed"]), v)
        norm = v.square().sum(-1, keepdim=True).sqrt()
        y = torch.where(norm > 0, v * d**0.5 / torch.where(norm > 0, norm, 1.0), 0.0)
        coarse, tail = bits - (form == "inner"), []
        if form == "groups":
            ratios = constant(kv_codes.RATIOS, v)
            parts = y.reshape(*y.shape[:-1], kv_codes.groups(d), -1)
            at = constant(kv_codes.levels(bits, d), v)
            tried = [quantise(parts / r, bits, d) for r in ratios]
            best = torch.stack([(r * at[c] - parts).square().sum(-1) for r, c in zip(ratios, tried, strict=True)])
            chosen = best.argmin(0)
            codes = torch.stack(tried).gather(0, chosen[None, ..., None].expand(1, *parts.shape))[0].reshape(y.shape)
            q = at[codes] * ratios[chosen].repeat_interleave(d // kv_codes.groups(d), dim=-1)
            tail = [chosen]
        else:
            codes = quantise(y, coarse, d)
            q = constant(kv_codes.levels(coarse, d), v)[codes]
        square, norm = q.square().sum(-1), norm[..., 0]
        s = {
            "norm": lambda: norm / square.sqrt(),
            "least_squares": lambda: norm * (q * y).sum(-1) / (d**0.5 * square),
            "raw": lambda: norm / d**0.5,
        }[a["scale"]]()
        logs = [log_scale(s)]
        out, shift = [], 0
        for width in kv_codes.planes(coarse, "head"):
            out.append(join((codes >> shift) & ((1 << width) - 1), width))
            shift += width
        if form == "inner":
            rest = v - from_log(logs[0])[..., None] * q
            logs.append(log_scale(rest.square().sum(-1).sqrt()))
            turned = rest @ constant(rotation(d, abs(a["seed"]) + kv_codes.SIGNS), v)
            out.append(join((turned >= 0).to(i64), 1))
        out.append(join(torch.cat([*(split(c[..., None], 4, 4) for c in logs), *tail], dim=-1), 4))
        both = torch.cat(out, dim=-1).reshape(n, -1)
        return torch.where(both >= 2**31, both - 2**32, both).to(torch.int32)

    def unpack(x: Sequence[Tensor], a: Mapping[str, Any]) -> Tensor:
        d, bits, form, n = a["head_dim"], a["bits"], a["form"], x[0].shape[0]
        parts = x[0].reshape(n, -1, kv_codes.words(bits, d, form)).to(i64) & 0xFFFFFFFF
        value, at, shift = 0, 0, 0
        for width in kv_codes.planes(bits, form):
            count = -(-d * width // 32)
            value = value | (split(parts[..., at : at + count], width, d) << shift)
            at, shift = at + count, shift + width
        tail = split(parts[..., at:], 4, kv_codes.nibbles(d, form))
        logs = [join(tail[..., i : i + 4], 4) for i in range(0, 8 if form == "inner" else 4, 4)]
        coarse = bits - (form == "inner")
        values = from_log(logs[0]) * constant(kv_codes.levels(coarse, d), parts)[value & ((1 << coarse) - 1)]
        if form == "inner":
            back = constant(rotation(d, abs(a["seed"]) + kv_codes.SIGNS).T, parts)
            values = values + from_log(logs[1]) * (np.pi / (2 * d)) ** 0.5 * (
                ((value >> coarse) * 2.0 - 1).to(f64) @ back
            )
        if form == "groups":
            ratios = constant(kv_codes.RATIOS, parts)[tail[..., 4:]]
            values = values * ratios.repeat_interleave(d // kv_codes.groups(d), dim=-1)
        values = (values @ constant(kv_codes.turn(d, a["seed"]).T, parts)).reshape(n, -1)
        return (values + x[1].to(f64) if len(x) > 1 else values).to(torch.float32)

    return {"column_mean": mean, "pack_codes": pack, "unpack_codes": unpack}
