"""Another engine's GGUF file, run by vlac's engines: an artifact is made from it for as long as it is used.

Linears and embeddings keep the format that the file stores them in wherever packing them again gives the same bytes;
others, and what is not a linear, become f32.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlac.errors import ArtifactError
from vlac.formats import get_format
from vlac.registry import Progress, ReadOptions, silent

EXACT = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0")
"""Formats whose values, unpacked, pack into the same bytes again."""


@contextmanager
def runnable(
    path: str | Path, read: ReadOptions | None = None, *, goldens: int = 0, progress: Progress = silent
) -> Iterator[Path]:
    """`path` itself, or a temporary artifact made from the GGUF file of another engine that it is.

    Args:
        read: where cameras, statistics and tokenizer come from (`stats_from`), for files that lack them.
        goldens: how many golden answers to make when the file carries none, from its own unpacked weights.

    Raises ArtifactError for a file that its own engine would refuse, abort on or misread.
    """
    from vlac.gguf_dialects import check_file, foreign_file

    file = foreign_file(Path(path))
    if file is None:
        yield Path(path)
        return
    check_file(file)
    with tempfile.TemporaryDirectory(prefix="vlac-adopted-") as folder:
        try:
            yield _adopt(file, read or ReadOptions(), Path(folder), goldens, progress)
        except OSError as error:
            raise ArtifactError(f"{folder}: {error.strerror or error}", remedy="set TMPDIR to a larger disk") from None


def _adopt(file: Path, read: ReadOptions, folder: Path, goldens: int, progress: Progress) -> Path:
    from vlac import manifest as m
    from vlac.api import draw
    from vlac.artifact import Sidecars, write_goldens
    from vlac.checkpoint import read_policy
    from vlac.goldens import answer, synthetic
    from vlac.lower import assign_formats, lower, roles
    from vlac.registry import families, targets

    policy = read_policy(str(file), read)
    program = lower(draw(policy))

    def as_stored(name: str, shape: tuple[int, ...], role: str) -> str:
        kept = program.weights[name].dtype
        suits = kept in EXACT and shape[-1] % get_format(kept).block == 0
        return kept if role in ("linear", "embed") and suits else "f32"

    entry = dataclasses.replace(targets.get("gguf-f32"), name=f"{file.name} as it is stored")
    formatted = entry.lower(assign_formats(program, as_stored), {})
    role = roles(program)
    table = m.census({name: p.format for name, p in formatted.params.items()}, formatted, role)
    carried, floor, kind = _carried(file), None, "carried by the file"
    if carried is None and goldens:
        answered, floor = answer(policy, synthetic(policy.io, goldens), progress)
        carried, kind = write_goldens(answered), "the file's own weights in fp32"
    title = families.get(policy.family).title or policy.family
    manifest = m.build(policy, entry, table, role, {}, floor, kind if carried else "none", title)
    sidecars = Sidecars(str(formatted), policy.io.to_json(), manifest, policy.tokenizer, carried)
    entry.emit(formatted, sidecars, folder, {}, progress)
    (made,) = folder.glob("*.gguf")
    return made


def _carried(file: Path) -> bytes | None:
    """Golden answers that vlac put into the file."""
    from vlac.gguf import GOLDEN, read_gguf

    opened = read_gguf(file)
    return opened.data(GOLDEN).tobytes() if GOLDEN in opened.tensors else None
