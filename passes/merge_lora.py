"""merge-lora: a LoRA adapter that was trained on this policy's checkpoint becomes part of its weights.

adapter= names a folder that peft (or LeRobot's use_peft) wrote. Its modules are found by the names that the weights had
in the checkpoint, fused projections of q, k and v included; the merged weight is W + scale B A, in float64, rounded
once (peft's own merge rounds more). Rank and alpha patterns, rsLoRA, DoRA and saved modules are applied exactly; other
variants are refused by their key. It comes first: later passes change the weights that the adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError, Inapplicable, Unsupported
from vlac.policy import Policy
from vlac.readers.peft import Adapter, Delta, merged_weight, open_adapter
from vlac.readers.safetensors_file import open_folder
from vlac.registry import Pass, passes
from vlac.weights import Array, LazyTensor, Weights


def _origins(weights: Weights) -> dict[str, list[str]]:
    """Name in the checkpoint -> the policy's weights that were made of this tensor, in order."""
    found: dict[str, list[str]] = {}
    for name, tensor in weights.items():
        found.setdefault(tensor.source.rpartition(": ")[2], []).append(name)
    return found


def _owner(name: str, origins: Mapping[str, list[str]]) -> list[str]:
    """Weights of the tensor that an adapter calls `name`; wrappers in front of its name may be on one side only."""
    if name in origins:
        return origins[name]
    ends = [ours for theirs, ours in origins.items() if name.endswith(f".{theirs}") or theirs.endswith(f".{name}")]
    return ends[0] if len(ends) == 1 else []


def _requires(policy: Policy, adapter: str) -> None:
    if policy.history:
        raise Inapplicable(
            f"after {', '.join(a.name for a in policy.history)}: the adapter was trained on the checkpoint's weights",
            remedy="put merge-lora first",
        )
    if not Path(adapter).is_dir():
        raise Inapplicable(f"adapter={adapter}: no such folder", remedy="name what peft's save_pretrained wrote")


def split(delta: Delta, start: int, stop: int) -> Delta:
    """The delta of rows start..stop-1 of a fused projection."""

    def rows(t: LazyTensor) -> LazyTensor:
        return t.map(lambda v: v[start:stop], (stop - start, *t.shape[1:]))

    magnitude = None if delta.magnitude is None else rows(delta.magnitude)
    return Delta(delta.a, rows(delta.b), delta.scale, magnitude)


def _merged(policy: Policy, name: str, delta: Delta, owners: Sequence[str], where: str) -> dict[str, LazyTensor]:
    if len(owners) == 1:
        return {owners[0]: merged_weight(policy.weights[owners[0]], delta, f"{where}: {name}")}
    kinds = [o.rpartition(".self_attn.")[2] for o in owners]
    rows = [policy.weights[o].shape[0] for o in owners]
    if kinds != ["q_proj.weight", "k_proj.weight", "v_proj.weight"] or sum(rows) != delta.shape[0]:
        raise Unsupported(f"{where}: {name} became {', '.join(owners)} here; an adapter for it cannot be divided")
    result, start = {}, 0
    for owner, count in zip(owners, rows, strict=True):
        part = split(delta, start, start + count)
        result[owner] = merged_weight(policy.weights[owner], part, f"{where}: {name}, rows of {owner}")
        start += count
    return result


def _saved(policy: Policy, adapter: Adapter, origins: Mapping[str, list[str]], base: Weights) -> dict[str, LazyTensor]:
    """Tensors that the adapter holds whole, where the policy keeps the checkpoint's tensor as it is."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in adapter.saved.items():
        owners = _owner(name, origins)
        if len(owners) != 1:
            raise CheckpointError(f"{adapter.where}: tensor {name} belongs to {len(owners)} weights of the policy")
        ours = policy.weights[owners[0]]
        theirs = base.get(ours.source.rpartition(": ")[2])
        if tensor.shape != ours.shape or theirs is None or not _same(theirs.load(), ours.load()):
            raise Unsupported(f"{adapter.where}: {name} is stored here in another form than in the checkpoint")
        result[owners[0]] = tensor
    return result


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b))


def _apply(policy: Policy, adapter: str) -> tuple[Policy, Mapping[str, Any]]:
    found, origins = open_adapter(Path(adapter)), _origins(policy.weights)
    there = open_folder(Path(policy.source.checkpoint))
    merged = _saved(policy, found, origins, there)
    whole, unread = len(merged), []
    for name, delta in found.deltas.items():
        owners = _owner(name, origins)
        if not owners and not any(n.endswith(name) or name.endswith(n) for n in there):
            raise CheckpointError(
                f"{found.where}: an adapter for {name}, which {policy.source.checkpoint} does not hold",
                remedy="the adapter was trained on another model",
            )
        if not owners:
            unread.append(name)
        merged |= _merged(policy, name, delta, owners, found.where) if owners else {}
    if not merged:
        raise CheckpointError(f"{found.where}: no module of it is in this policy; first: {unread[0]}")
    ranks = sorted({d.a.shape[0] for d in found.deltas.values()})
    figures = {
        "weights_merged": len(merged) - whole,
        "weights_replaced": whole,
        "ranks": "+".join(map(str, ranks)),
        "dora": any(d.magnitude is not None for d in found.deltas.values()),
        "not_read_by_inference": " ".join(unread),
    }
    return policy.replace(weights=policy.weights.with_(**merged)), figures


MERGE_LORA = passes.add(
    Pass(
        name="merge-lora",
        apply=_apply,
        params={"adapter": (str, None, "folder with adapter_config.json and adapter_model.safetensors")},
        requires=_requires,
        doc="A LoRA adapter becomes part of the weights.",
    )
)
