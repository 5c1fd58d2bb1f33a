"""Putting a finished artifact in its place in one step: written beside it, flushed, renamed whole.

A kill at any moment leaves the earlier artifact or the new one, never a mixture; what a killed run left behind is
removed by the next.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from vlac.artifact import PREPARED
from vlac.errors import VlacError

_MARK = ".vlac-partial-"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


def check_destination(out: Path) -> None:
    """Refuses to replace anything that vlac did not write, before work begins."""
    if out.is_symlink() or not out.exists():
        if out.is_symlink():
            raise VlacError(f"{out} is a symbolic link", remedy="give the real place to -o")
        return
    if out.is_file():
        if _our_gguf(out):
            return
        raise VlacError(f"{out} exists and is not an artifact", remedy="give another place to -o")
    strangers = (str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and not _ours(out, p))
    first = sorted(islice(strangers, 5))  # not the whole tree: it may be a home folder
    if first:
        raise VlacError(
            f"{out} exists and holds files that are not of an artifact: {', '.join(first)}",
            remedy="give an empty or new folder to -o; nothing was changed",
        )


def _our_gguf(path: Path) -> bool:
    if path.suffix != ".gguf":
        return False
    with path.open("rb") as f:
        head = f.read(8 << 20)
    return head.startswith(b"GGUF") and b"vlac.manifest" in head


def _ours(out: Path, path: Path) -> bool:
    name = str(path.relative_to(out))
    if "/" not in name and _our_gguf(path):
        return True
    manifest = out / "manifest.json"
    if not manifest.is_file():
        return False
    with suppress(json.JSONDecodeError, UnicodeDecodeError, AttributeError, RecursionError):
        data = json.loads(manifest.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "format_version" in data:
            return name == "manifest.json" or name in data.get("files", {}) or name.startswith(f"{PREPARED}/")
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sweep(parent: Path, stem: str) -> None:
    for left in parent.glob(f".{stem}{_MARK}*"):
        pid = left.name.split(_MARK)[1].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def partial(out: Path, need_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `out`; moved into place when the block ends well, removed when it does not.

    When `out` ends in .gguf the folder must hold one file, which becomes `out`. Raises VlacError when the disk is full.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100  (resolve() would follow links)
    try:
        if above := next((p for p in out.parents if p.exists() and not p.is_dir()), None):
            raise VlacError(f"{out}: {above} is not a folder", remedy="give another place to -o")
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out.parent, out.name)
        free = shutil.disk_usage(out.parent).free
        if free < need_bytes:
            raise VlacError(
                f"{out.parent}: {free / 1e6:.0f} MB free, the artifact needs about {need_bytes / 1e6:.0f} MB",
                remedy="free some space or give another place to -o; nothing was written",
            )
        temp = Path(tempfile.mkdtemp(prefix=f".{out.name}{_MARK}{os.getpid()}-", dir=out.parent))
    except OSError as error:
        raise VlacError(f"{out}: {error.strerror}", remedy="give a place that can be written to -o") from None
    try:
        yield temp
        temp.chmod(0o755)
        for path in temp.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                with path.open("rb") as f:
                    os.fsync(f.fileno())
        _move(temp, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise VlacError(
                f"{out}: the disk became full while writing; nothing was changed",
                remedy="free some space or give another place to -o",
            ) from None
        raise VlacError(f"{out}: {error.strerror or error}; nothing was changed") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _move(temp: Path, out: Path) -> None:
    if out.suffix == ".gguf":
        files = list(temp.iterdir())
        if len(files) != 1:
            raise VlacError(f"{out}: this target writes a folder", remedy="give a folder to -o")
        files[0].replace(out)
    elif out.exists():
        _exchange(temp, out)
    else:
        temp.rename(out)
    with suppress(OSError):
        fd = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _exchange(temp: Path, out: Path) -> None:
    """Swaps two folders in one step where the kernel can; afterwards `temp` is the old one."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(_AT_FDCWD, os.fsencode(temp), _AT_FDCWD, os.fsencode(out), _EXCHANGE)
        if done == 0:
            return
    old = temp.with_name(temp.name + "-old")
    out.rename(old)
    temp.rename(out)
    shutil.rmtree(old, ignore_errors=True)
